"""Extreme eigenvalues: eigvalsh where it can be trusted, a change of inertia at 140 digits where it cannot."""

from __future__ import annotations

import mpmath
import pytest
import torch

import lcogeom as lg
from lcogeom.geometry.hessian import action_hessian
from tests.cases import CASES, Case
from tests.geometry.test_inertia import MODERATE, rounding_scale
from tests.oracles import PAIRS, built, pairs_and_cases, usable

RHOS = [0.0, 1.0, -0.3, -0.999, -1.0, -1.001, -2.5, 30.0, 0.37]  # f'' / f'


@pytest.mark.parametrize(("name", "case"), pairs_and_cases(MODERATE), ids=str)
def test_equals_eigvalsh(name: str, case: Case, device: torch.device) -> None:
    objective, _ = PAIRS[name]
    logits, batch = built(name, case, device)
    H = objective.hessian(logits, batch)
    values = torch.linalg.eigvalsh(H.dense())
    low, high = H.eigenvalue_range()
    # eigvalsh is accurate relative to the matrix, and the matrix to what its entries were rounded at.
    scale = 1e-12 * values.abs().amax(1) + 1e-15 * rounding_scale(objective, logits, batch)
    assert ((low - values[:, 0]).abs() <= scale).all()
    assert ((high - values[:, -1]).abs() <= scale).all()


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_every_ratio_of_the_derivatives(rho: float, sign: float, device: torch.device) -> None:
    """Each case of the interlacing, both signs of f', f' = 0 included; V from 2; ties."""
    rng = torch.Generator().manual_seed(3)
    for vocab in (2, 3, 4, 9, 60):
        logits = 2 * torch.randn(80, vocab, generator=rng, dtype=torch.float64)
        logits[40:] = logits[40:].round()  # ties
        actions = torch.randint(vocab, (80,), generator=rng)
        d1 = sign * (0.2 + torch.rand(80, generator=rng, dtype=torch.float64))
        d1[::9] = 0.0
        d2 = torch.where(d1 == 0, rho, rho * d1)
        H = action_hessian(logits.to(device), actions.to(device), d1.to(device), d2.to(device))
        values = torch.linalg.eigvalsh(H.dense())
        low, high = H.eigenvalue_range()
        torch.testing.assert_close(low, values[:, 0], rtol=1e-12, atol=2e-14)
        torch.testing.assert_close(high, values[:, -1], rtol=1e-12, atol=2e-14)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_consistent_with_the_inertia(case: Case, device: torch.device) -> None:
    """The lowest eigenvalue is negative exactly where the criterion counts one, on every hard case."""
    for name, (objective, _) in PAIRS.items():
        if not usable(name, case):
            continue
        logits, batch = built(name, case, device)
        H = objective.hessian(logits, batch)
        low, high = H.eigenvalue_range()
        assert torch.equal(low < 0, H.negative_count() > 0), name
        assert (low <= high).all()
        inside = H.quadratic(torch.eye(case.vocab, dtype=torch.float64, device=device)[batch.actions])
        slack = 1e-12 * torch.maximum(low.abs(), high.abs())
        assert ((low - slack <= inside) & (inside <= high + slack)).all()


def count_below(matrix: list[list[mpmath.mpf]], x: mpmath.mpf) -> int:
    """Eigenvalues below x: the negative pivots of matrix - x (Sylvester), eliminated in high precision."""
    rows = [[entry - (x if i == j else 0) for j, entry in enumerate(row)] for i, row in enumerate(matrix)]
    size, negative = len(rows), 0
    for k in range(size):
        negative += rows[k][k] < 0
        for i in range(k + 1, size):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
    return negative


@pytest.mark.parametrize("rho", [0.0, 1.0, -0.5, -3.0, 0.8990764013921805, 1.2219735879807208, 7.0, 1e6, -1.5, -1e6])
@pytest.mark.parametrize("action", [0, 1, 4])
@pytest.mark.parametrize("kind", ["saturated", "far", "tied", "half"])
def test_certified_at_140_digits(kind: str, action: int, rho: float) -> None:
    """Between lambda (1 - 1e-12) and lambda (1 + 1e-12) the number of eigenvalues below changes: lambda lies there.

    At pi = 1/2 +- 1e-9 the width is 1e-12 of the larger end instead: there pi - 1/2, to which PPO's lowest eigenvalue
    is proportional, keeps 7 digits in float64.
    """
    z = torch.tensor([0.3, -0.7, 1.1, -0.2, 0.9], dtype=torch.float64)
    if kind in ("saturated", "far"):
        z[0] += 60.0 if kind == "saturated" else 300.0
    elif kind == "tied":
        z = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    else:
        others = [z[j] for j in range(5) if j != action]
        z[action] = torch.logsumexp(torch.stack(others), 0) + (4e-9 if action % 2 else -4e-9)
    for slope in (-0.8, 0.8):
        d1 = torch.tensor([slope], dtype=torch.float64)
        H = action_hessian(z[None], torch.tensor([action]), d1, rho * d1)
        low, high = (end.item() for end in H.eigenvalue_range())
        with mpmath.workdps(160 + 2 * int(z.max())):
            weights = [mpmath.exp(mpmath.mpf(v)) for v in z.tolist()]
            p = [w / mpmath.fsum(weights) for w in weights]
            u = [(j == action) - p[j] for j in range(5)]
            f1, f2 = mpmath.mpf(slope), mpmath.mpf((rho * d1).item())
            exact = [
                [f2 * u[i] * u[j] - f1 * ((p[i] if i == j else 0) - p[i] * p[j]) for j in range(5)] for i in range(5)
            ]
            size = max(abs(mpmath.mpf(low)), abs(mpmath.mpf(high)))
            for end, below in ((low, 0), (high, 4)):
                centre = mpmath.mpf(end)
                width = mpmath.mpf("1e-12") * (size if kind == "half" or end == 0 else abs(centre))
                assert count_below(exact, centre - width) <= below
                assert count_below(exact, centre + width) > below


def exact_matrix(H: lg.LogitHessian, n: int) -> list[list[mpmath.mpf]]:
    """Token n's matrix, term by term from its definition (method.md, 2.1 to 2.4), in the working precision."""
    z = [mpmath.mpf(v) for v in H.logits[n].tolist()]
    vocab, action, row = len(z), int(H.actions[n]), slice(n, n + 1)
    weights = [mpmath.exp(v - max(z)) for v in z]
    p = [w / mpmath.fsum(weights) for w in weights]
    u = [(j == action) - p[j] for j in range(vocab)]
    fisher, bend = mpmath.mpf(H.fisher[n].item()), mpmath.mpf(H.action[n].item())
    cost = [0.0] * vocab if H.cost is None else H.cost(H.logits[row].double(), row)[0].tolist()
    mean = mpmath.fsum(a * mpmath.mpf(b) for a, b in zip(p, cost, strict=True))
    g = [p[j] * (mpmath.mpf(cost[j]) - mean) for j in range(vocab)]
    matrix = [
        [
            fisher * ((p[i] if i == j else 0) - p[i] * p[j])
            + bend * u[i] * u[j]
            + (g[i] if i == j else 0)
            - g[i] * p[j]
            - p[i] * g[j]
            for j in range(vocab)
        ]
        for i in range(vocab)
    ]
    if H.ridge is not None:
        for i, value in zip(H.ridge[0][n].tolist(), H.ridge[1][n].tolist(), strict=True):
            matrix[i][i] += mpmath.mpf(value)
    return matrix


def certify(H: lg.LogitHessian, n: int) -> None:
    """Both ends of token n hold their eigenvalue to 1e-12 of the larger: the inertia changes across it.

    Where terms cancel (p = 1/2 and a huge ratio), it is a rounding of theirs that is left.
    """
    low, high = (end[n].item() for end in H.eigenvalue_range())
    matrix = exact_matrix(H, n)
    terms = abs(H.fisher[n].item()) + abs(H.action[n].item())
    width = mpmath.mpf("1e-12") * max(abs(low), abs(high)) + mpmath.mpf("1e-16") * terms + mpmath.mpf("1e-300")
    for end, below in ((low, 0), (high, len(matrix) - 1)):
        centre = mpmath.mpf(end)
        assert count_below(matrix, centre - width) <= below, (n, end)
        assert count_below(matrix, centre + width) > below, (n, end)


@pytest.mark.parametrize("logits", ["saturated", "tied", "half", "flat", "peaked"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_objective_certified(name: str, logits: str, device: torch.device) -> None:
    """200 digits: the smallest probability of a saturated token is 1e-28, and elimination squares it."""
    for advantage, log_ratio in ((1.0, 0.1), (-2.0, -0.1)):
        case = Case(4, logits, advantage, log_ratio)
        if not usable(name, case):
            continue
        tensors, batch = built(name, case, device)
        H = PAIRS[name][0].hessian(tensors, batch)
        with mpmath.workdps(200):
            for n in range(len(batch)):
                certify(H, n)


@pytest.mark.parametrize("rho", RHOS)
def test_power_sums_change_nothing(rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long-tailed tokens whose far poles enter through their power sums: the ends stay, to rounding.

    The oracle is the same equation with every pole by itself, which the tests above certify.
    """
    rng = torch.Generator().manual_seed(11)
    for vocab, slope in ((64, 30.0), (500, 12.0), (531, 1.0), (1000, 300.0)):
        logits = -slope * torch.rand(40, vocab, generator=rng, dtype=torch.float64).square()
        logits[20:, 0] += slope
        actions = torch.randint(vocab, (40,), generator=rng)
        actions[::4] = 0
        d1 = -0.2 - torch.rand(40, generator=rng, dtype=torch.float64)
        H = action_hessian(logits, actions, d1, rho * d1)
        plain = H.eigenvalue_range()
        with monkeypatch.context() as patch:
            patch.setattr("lcogeom.geometry.poles.WORTHWHILE", 3)
            sorted_out = H.eigenvalue_range()
        for one, other in zip(plain, sorted_out, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-14, atol=0)
