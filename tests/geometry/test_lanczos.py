"""Extreme eigenvalues of one large operator, against dense eigenvalues."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lcogeom as lg
from tests.geometry.conftest import DenseModel

KRYLOV = 160


def spread(size: int) -> Tensor:
    return torch.linspace(0, 1, size, dtype=torch.float64)


SPECTRA = {
    "indefinite": torch.cat([torch.tensor([-7.0, 12.0], dtype=torch.float64), spread(300) - 0.3]),
    "repeated": torch.tensor([5.0] * 3 + [4.0] * 2 + [-3.0] * 2 + [-2.0]).double(),
    "repeated and a bulk": torch.cat([torch.tensor([5.0] * 3 + [4.0] * 2 + [-3.0] * 4).double(), spread(300)]),
    "clustered": torch.cat([10 + 1e-3 * spread(5), spread(200)]),
    "two copies each": spread(60).repeat(2),
    "low rank": torch.cat([torch.tensor([3.0, 2.0, 1.0, -1.0]).double(), torch.zeros(300).double()]),
    "positive, low rank": torch.cat([torch.tensor([3.0, 2.0]).double(), torch.zeros(300).double()]),
    "zero": torch.zeros(20).double(),
    "identity": torch.full((20,), -2.0).double(),
    "tiny": 1e-30 * (spread(50) - 0.5),
    "size 1": torch.tensor([7.0]).double(),
    "size 2": torch.tensor([7.0, -7.0]).double(),
    "size 3": torch.tensor([1.0, 2.0, 2.0]).double(),
}


def turned(spectrum: Tensor, device: torch.device, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues, in no special basis."""
    rng = torch.Generator().manual_seed(seed)
    size = len(spectrum)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))
    matrix = (basis * spectrum) @ basis.T
    return ((matrix + matrix.T) / 2).to(device)


def times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: matrix @ x


def both_ends(values: Tensor, k: int) -> Tensor:
    values = values.sort().values
    return torch.cat([values[:k], values[-k:]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", SPECTRA)
def test_both_ends_with_multiplicity(name: str, k: int, dtype: torch.dtype, device: torch.device) -> None:
    spectrum = SPECTRA[name]
    matrix = turned(spectrum, device).to(dtype)
    k = min(k, len(spectrum))
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    found = lg.extreme_eigenvalues(
        times(matrix), len(spectrum), k=k, steps=KRYLOV, tolerance=tolerance, vectors=True, dtype=dtype, device=device
    )
    size = float(spectrum.abs().max())
    assert found.converged.all()
    assert found.scale == pytest.approx(size, rel=tolerance)
    error = (found.values - both_ends(spectrum, k)).abs()
    # An eigenvalue lies within the residual; that it is the right one of a cluster holds to the tolerance.
    assert (error <= tolerance * size).all()
    # The residuals are those of the vectors handed out, in float64, to the rounding of a product.
    assert found.vectors is not None
    x = found.vectors.double()
    torch.testing.assert_close(x.norm(dim=1), torch.ones_like(x[:, 0]), rtol=0, atol=1e-6)
    true = (x @ matrix.double() - found.values.to(device)[:, None] * x).norm(dim=1).cpu()
    assert ((true - found.residuals).abs() <= 30 * torch.finfo(dtype).eps * size).all()
    overlap = x[:k] @ x[:k].T - torch.eye(k, device=device, dtype=torch.float64)
    assert overlap.abs().max() < 1e-5  # copies come with vectors of their own


@pytest.mark.parametrize("end", ["lowest", "highest"])
def test_one_end_alone(end: str, device: torch.device) -> None:
    spectrum = SPECTRA["indefinite"]
    found = lg.extreme_eigenvalues(
        times(turned(spectrum, device).float()), len(spectrum), k=2, which=end, device=device
    )
    want = spectrum.sort().values[:2] if end == "lowest" else spectrum.sort().values[-2:]
    torch.testing.assert_close(found.values, want, rtol=0, atol=12e-4)
    assert found.converged.all()
    assert found.vectors is None


@pytest.mark.parametrize("k", [1, 4])
def test_a_model_of_5000_parameters(dense_model: DenseModel, k: int, device: torch.device) -> None:
    want = both_ends(dense_model.eigenvalues, k)
    size = len(dense_model.params)
    assert want[0] < 0 < want[-1]
    exact = lg.extreme_eigenvalues(
        dense_model.matvec(), size, k=k, steps=250, tolerance=1e-9, dtype=torch.float64, device=device
    )
    assert exact.converged.all()
    torch.testing.assert_close(exact.values, want, rtol=0, atol=1e-12 * exact.scale)
    single = lg.extreme_eigenvalues(dense_model.matvec(dtype=torch.float32), size, k=k, steps=250, device=device)
    assert single.converged.all()
    torch.testing.assert_close(single.values, want, rtol=0, atol=3e-6 * single.scale)  # float32's Hessian is another


@pytest.mark.parametrize("layer", ["embedding.weight", "hidden.weight", "head.bias"])
def test_one_layer(dense_model: DenseModel, layer: str, device: torch.device) -> None:
    some = dense_model.layers[layer]
    want = torch.linalg.eigvalsh(dense_model.hessian[some, some]).cpu()
    found = lg.extreme_eigenvalues(
        dense_model.matvec(some), len(want), k=2, steps=200, tolerance=1e-8, dtype=torch.float64, device=device
    )
    assert found.converged.all()
    torch.testing.assert_close(found.values, both_ends(want, 2), rtol=0, atol=1e-8 * found.scale)


def test_what_cannot_converge_is_said(device: torch.device) -> None:
    """Eigenvalues that crowd together at the lower end, and one far away: 20 products do not separate them."""
    spectrum = torch.cat([spread(2000).square(), torch.tensor([1.01]).double()])
    matrix = turned(spectrum, device)
    with pytest.warns(UserWarning, match=r"did not converge in 20 steps: .*residual .*Raise steps"):
        found = lg.extreme_eigenvalues(
            times(matrix), len(spectrum), k=3, steps=20, tolerance=1e-6, dtype=torch.float64, device=device
        )
    assert not found.converged[:3].any()
    assert (found.residuals[:3] > 1e-6 * found.scale).all()
    # Nevertheless an eigenvalue lies within each residual.
    gaps = (found.values[:, None] - spectrum).abs().min(1).values
    assert (gaps <= found.residuals + 1e-14).all()


def test_a_crowd_does_not_pass_for_its_outermost_member(device: torch.device) -> None:
    """Almost all eigenvalues lie within 1e-5 of 0: a vector at random has a residual of that size, far from the end."""
    size = 20_000
    diagonal = 1e-5 * torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    diagonal[:31] = torch.cat([torch.tensor([-1e-3]).double(), torch.logspace(-3, 0, 30, dtype=torch.float64)])
    diagonal = diagonal.to(device)
    for seed in range(5):
        found = lg.extreme_eigenvalues(
            lambda x: diagonal * x, size, which="lowest", tolerance=1e-4, seed=seed, dtype=torch.float64, device=device
        )
        assert found.converged.all()
        assert float(found.values) == pytest.approx(-1e-3, abs=1e-4)
        assert float(found.values) - found.unseen[0] <= -1e-3


@pytest.mark.parametrize("steps", [3, 6, 12])
def test_what_may_lie_unseen_beyond_the_ends(steps: int, device: torch.device) -> None:
    """The stated bound breaks in about 1 of 100 cases at each end, and it is not the range of the spectrum."""
    spectrum = torch.cat([0.1 * spread(300), torch.tensor([-0.3, 0.5]).double()]).to(device)
    gaps, bounds = [], []
    for seed in range(300):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = lg.extreme_eigenvalues(
                lambda x: spectrum * x, len(spectrum), steps=steps, seed=seed, dtype=torch.float64, device=device
            )
        gaps.append([float(found.values[0]) + 0.3, 0.5 - float(found.values[1])])
        bounds.append(found.unseen)
    gap, bound = torch.tensor(gaps), torch.tensor(bounds)
    broken = (gap > bound + 1e-13).double().mean()
    assert broken < 0.022  # 6 of 600 are expected at most
    if steps == 6:
        assert bound.median() < 0.5


def test_copies_that_were_not_looked_for_are_said(device: torch.device) -> None:
    """The steps end when every value has its residual, before another chain could look for copies."""
    spectrum = torch.cat([torch.tensor([9.0, 9.0, 5.0]).double(), torch.zeros(200).double()])
    matrix = turned(spectrum, device)
    with pytest.warns(UserWarning, match="copies of a repeated one, could not be ruled out"):
        found = lg.extreme_eigenvalues(
            times(matrix), len(spectrum), k=2, which="highest", steps=3, dtype=torch.float64, device=device
        )
    assert found.converged.tolist() == [False, True]
    assert found.residuals.max() < 1e-10


def test_rounding_beyond_the_tolerance_is_said(device: torch.device) -> None:
    matrix = turned(SPECTRA["indefinite"], device).float()
    with pytest.warns(UserWarning, match="rounded more coarsely than that: compute in float64"):
        found = lg.extreme_eigenvalues(times(matrix), len(matrix), tolerance=1e-9, device=device)
    assert (found.residuals > 1e-9 * found.scale).any()
    assert not found.converged.all()


def test_the_same_seed_gives_the_same_bits(device: torch.device) -> None:
    matvec, size = times(turned(SPECTRA["indefinite"], device).float()), len(SPECTRA["indefinite"])
    before = torch.get_rng_state()
    first, again, other = (lg.extreme_eigenvalues(matvec, size, device=device, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.residuals, again.residuals)
    assert not torch.equal(first.residuals, other.residuals)
    assert torch.equal(before, torch.get_rng_state())


def skewed(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(100, 100, generator=rng, dtype=torch.float64).to(device)
    symmetric = turned(spread(100), device)
    steps = torch.Generator().manual_seed(2)
    return {
        "general": times(noise),
        "antisymmetric": times(noise - noise.T),
        "triangular": times(noise.triu()),
        "rows scaled": times(torch.linspace(1, 3, 100, device=device, dtype=torch.float64)[:, None] * symmetric),
        "dropout": lambda x: symmetric @ (x * torch.bernoulli(torch.full((100,), 0.8), generator=steps).to(x)),
    }


@pytest.mark.parametrize("name", ["general", "antisymmetric", "triangular", "rows scaled", "dropout"])
def test_an_operator_that_is_not_symmetric_is_refused(name: str, device: torch.device) -> None:
    for compute in (lg.extreme_eigenvalues, lg.spectral_density):
        with pytest.raises(ValueError, match=r"matvec: not symmetric.*dropout"):
            compute(skewed(device)[name], 100, dtype=torch.float64, device=device)


def test_slight_asymmetry_passes_or_is_reported_but_never_accepted(device: torch.device) -> None:
    """Below the threshold of the check the residuals tell."""
    rng = torch.Generator().manual_seed(1)
    matrix = turned(spread(100), device)
    matrix = matrix + 1e-4 * torch.randn(100, 100, generator=rng, dtype=torch.float64).to(device)
    with pytest.warns(UserWarning, match="did not converge"):
        found = lg.extreme_eigenvalues(times(matrix), 100, tolerance=1e-6, dtype=torch.float64, device=device)
    assert not found.converged.any()


def test_the_matvec_may_do_as_it_likes_with_its_argument(device: torch.device) -> None:
    matrix = turned(SPECTRA["indefinite"], device)
    plain = lg.extreme_eigenvalues(times(matrix), len(matrix), dtype=torch.float64, device=device)

    def spoils(x: Tensor) -> Tensor:
        result = (matrix @ x).requires_grad_()
        x.zero_()
        return result

    assert torch.equal(
        lg.extreme_eigenvalues(spoils, len(matrix), dtype=torch.float64, device=device).values, plain.values
    )
    same = lg.extreme_eigenvalues(lambda x: x, 50, k=2, device=device)  # hands its own argument back
    assert same.values.tolist() == pytest.approx([1.0] * 4, abs=1e-6)


def test_bad_input(device: torch.device) -> None:
    good = times(turned(spread(30), device).float())
    products = []

    def breaks(x: Tensor) -> Tensor:
        products.append(x)
        return good(x) if len(products) < 4 else good(x) * torch.nan

    for compute in (lg.extreme_eigenvalues, lg.spectral_density):
        products.clear()
        with pytest.raises(ValueError, match=r"matvec: a product holds a NaN .*30 of 30 entries, product 4"):
            compute(breaks, 30, device=device)
        with pytest.raises(ValueError, match=r"matvec: returned shape \(29,\)"):
            compute(lambda x: x[1:], 30, device=device)
        with pytest.raises(TypeError, match="matvec: returned a list"):
            compute(lambda x: x.tolist(), 30, device=device)
        with pytest.raises(ValueError, match=r"dtype: torch\.float16"):
            compute(good, 30, dtype=torch.float16, device=device)
        with pytest.raises(ValueError, match="size: 0"):
            compute(good, 0, device=device)
        with pytest.raises(ValueError, match="steps: 0"):
            compute(good, 30, steps=0, device=device)
        with pytest.raises(ValueError, match="pass device='meta'"):
            compute(lambda x: x.to("meta"), 30, device=device)
    for wrong, words in (
        ({"k": 0}, "k: 0"),
        ({"k": 31}, "k: 31; must be between 1 and the operator's size, 30"),
        ({"which": "top"}, "which: 'top'"),
        ({"k": 4, "steps": 7}, "steps: 7 cannot give 8 values"),
        ({"tolerance": 0.0}, "tolerance: 0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            lg.extreme_eigenvalues(good, 30, device=device, **wrong)


def test_every_eigenvalue(device: torch.device) -> None:
    spectrum = torch.tensor([1.0, 1.0, 1.0, -2.0, 4.0]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lg.extreme_eigenvalues(
            times(turned(spectrum, device)), 5, k=5, which="highest", steps=5, dtype=torch.float64, device=device
        )
    torch.testing.assert_close(found.values, spectrum.sort().values)
    assert found.converged.all()
