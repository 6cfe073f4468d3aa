"""Stochastic Lanczos quadrature, against dense eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lcogeom as lg
from tests.geometry.conftest import DenseModel
from tests.geometry.test_lanczos import SPECTRA, spread, times, turned

SIGMAS = 4.5  # with some hundred comparisons


def share_below(spectrum: Tensor, x: Tensor) -> Tensor:
    return (spectrum.double()[:, None] <= x).double().mean(0)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_a_model_of_5000_parameters(dense_model: DenseModel, kind: str, device: torch.device) -> None:
    true, size = dense_model.eigenvalues, len(dense_model.params)
    found = lg.spectral_density(
        dense_model.matvec(dtype=torch.float32), size, probes=12, steps=50, kind=kind, device=device
    )
    for function in (lambda y: y, torch.square, lambda y: y**3, lambda y: y.exp()):
        value, error = found.mean(function)
        assert error > 0
        assert abs(value - float(function(true).mean())) < SIGMAS * error
        assert error < 0.2 * value  # and it says something
    # The distribution: within what sampling and quadrature leave open, everywhere.
    x = torch.linspace(float(true[0]) - 0.01, float(true[-1]) + 0.01, 401, dtype=torch.float64)
    share, error, lowest, highest = found.cumulative(x)
    wanted = share_below(true, x)
    noise = SIGMAS * error + 1e-3  # a single eigenvalue between the nodes counts 2e-4
    assert (wanted >= lowest - noise).all()
    assert (wanted <= highest + noise).all()
    assert (lowest <= share + 1e-12).all()
    assert (share <= highest + 1e-12).all()
    assert (share.diff() >= -1e-12).all()
    tails = (wanted < 0.02) | (wanted > 0.95)
    assert (highest - lowest)[tails].max() < 0.06
    # The density, at a width that 50 nodes resolve.
    wide = found.on(x, 0.03)
    density, error = wide.density
    exact = torch.distributions.Normal(true, 0.03).log_prob(x[:, None]).exp().mean(1)
    assert ((density - exact).abs() < SIGMAS * error + 2e-3 * exact.max()).all()
    assert (error > 0).any()
    assert float(torch.trapezoid(found.density[0], found.grid)) == pytest.approx(1.0, abs=1e-3)


def test_error_bars_are_as_long_as_the_errors(device: torch.device) -> None:
    """Over 60 seeds the trace's error, in standard errors, has about unit spread, and no bias."""
    spectrum = spread(90) - 0.3
    matrix = turned(spectrum, device)
    for kind in ("rademacher", "gaussian"):
        scores = []
        for seed in range(60):
            found = lg.spectral_density(
                times(matrix),
                len(spectrum),
                probes=10,
                steps=3,
                kind=kind,
                seed=seed,
                dtype=torch.float64,
                device=device,
            )
            value, error = found.mean(lambda y: y)
            scores.append((value - float(spectrum.mean())) / error)
        z = torch.tensor(scores)
        # Student's t with 9 degrees of freedom has a standard deviation of 1.13.
        assert 0.8 < float(z.std()) < 1.5
        assert abs(float(z.mean())) < 3.5 * 1.13 / math.sqrt(len(z))


@pytest.mark.parametrize("name", SPECTRA)
def test_few_different_eigenvalues_are_found_exactly(name: str, device: torch.device) -> None:
    spectrum = SPECTRA[name]
    found = lg.spectral_density(
        times(turned(spectrum, device)), len(spectrum), probes=3, steps=320, dtype=torch.float64, device=device
    )
    size = max(float(spectrum.abs().max()), 1e-300)
    assert found.exact.all()
    seen = found.nodes[found.weights > 1e-10]
    assert (seen[:, None] - spectrum).abs().min(1).values.max() <= 1e-12 * size
    assert (found.weights >= 0).all()
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3, dtype=torch.float64))
    share, _, lowest, highest = found.cumulative(spectrum)
    assert torch.equal(lowest, share)
    assert torch.equal(highest, share)
    # No copies by rounding: no eigenvalue has more nodes than its multiplicity.
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        near = (nodes[weights > 0][:, None] - spectrum).abs() < 1e-9 * size
        multiplicity = ((spectrum[:, None] - spectrum).abs() < 1e-9 * size).sum(0)
        assert (near.sum(0) <= multiplicity).all()


def test_a_diagonal_matrix_has_no_error_in_its_trace(device: torch.device) -> None:
    diagonal = spread(300).to(device) - 0.2
    x = torch.tensor([-0.1, 0.0, 0.31, 0.7]).double()
    signs = lg.spectral_density(lambda v: diagonal * v, 300, steps=300, dtype=torch.float64, device=device)
    value, error = signs.mean(lambda y: y)
    assert value == pytest.approx(0.3, abs=1e-13)
    assert error < 1e-13
    torch.testing.assert_close(signs.cumulative(x)[0], share_below(diagonal.cpu(), x), atol=1e-10, rtol=0)
    sphere = lg.spectral_density(lambda v: diagonal * v, 300, kind="gaussian", dtype=torch.float64, device=device)
    assert sphere.mean(lambda y: y)[1] > 1e-4


def test_the_bounds_of_the_distribution_hold_for_every_probe(device: torch.device) -> None:
    """Of one probe the true measure is known: its components along the eigenvectors."""
    size = 200
    matrix = turned(torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64), device)
    probes = []

    def product(x: Tensor) -> Tensor:
        probes.append(x.clone())
        return matrix @ x

    for steps in (1, 2, 5, 20):
        probes.clear()
        found = lg.spectral_density(product, size, probes=1, steps=steps, dtype=torch.float64, device=device)
        values, vectors = torch.linalg.eigh(matrix)
        mass = (vectors.T @ probes[0]).square()
        x = torch.cat([torch.linspace(-4, 4, 301, dtype=torch.float64), found.nodes[0]])
        wanted = ((values[:, None] <= x.to(device)) * mass[:, None]).sum(0).cpu()
        _, error, lowest, highest = found.cumulative(x)
        assert (lowest <= wanted + 1e-10).all()
        assert (wanted <= highest + 1e-10).all()
        assert error.isnan().all()  # one probe says nothing about the others
        assert found.mean(torch.square)[1] != found.mean(torch.square)[1]
        for power in range(2 * steps):
            assert found.mean(lambda y, n=power: y**n)[0] == pytest.approx(
                float((values**power * mass).sum()), rel=1e-9, abs=1e-9
            )


def test_grid_width_and_seed(device: torch.device) -> None:
    matvec, size = times(turned(SPECTRA["indefinite"], device).float()), len(SPECTRA["indefinite"])
    found = lg.spectral_density(matvec, size, device=device)
    assert found.width == pytest.approx(0.01 * float(found.nodes.max() - found.nodes.min()))
    assert found.grid[0] < -7
    assert found.grid[-1] > 12
    grid = torch.linspace(-1, 1, 11)
    again = lg.spectral_density(matvec, size, grid=grid, width=0.5, device=device)
    assert torch.equal(again.nodes, found.nodes)
    assert torch.equal(again.density[0], found.on(grid, 0.5).density[0])
    assert not torch.equal(lg.spectral_density(matvec, size, seed=1, device=device).nodes, found.nodes)
    zero = lg.spectral_density(torch.zeros_like, 20, device=device)
    assert float(torch.trapezoid(zero.density[0], zero.grid)) == pytest.approx(1.0, abs=1e-3)


def test_bad_input(device: torch.device) -> None:
    for wrong, words in (
        ({"probes": 0}, "probes: 0"),
        ({"kind": "signs"}, "kind: 'signs'"),
        ({"width": 0.0}, "width: 0.0"),
        ({"width": math.nan}, "width: nan"),
    ):
        with pytest.raises(ValueError, match=words):
            lg.spectral_density(lambda x: x, 20, device=device, **wrong)
