"""Losses that only autograd knows, against the exact Hessians of the same losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lcogeom as lg
from tests.cases import Case
from tests.oracles import PAIRS, built, derivatives

NAMES = ["ppo-unclipped", "lco-kld", "lco-mse", "entropy", "reverse-kl", "sum-of-everything"]


@pytest.mark.filterwarnings("ignore:eigenvalue_range")
@pytest.mark.parametrize("vocab", [2, 3, 17, 400])
@pytest.mark.parametrize("logits", ["random", "tied", "peaked"])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_exact_hessian(name: str, logits: str, vocab: int, device: torch.device) -> None:
    exact = PAIRS[name][0]
    z, batch = built(name, Case(vocab, logits, 1.0, 0.1), device)
    mine = lg.autograd_objective(exact.loss, name=name)
    torch.testing.assert_close(mine.loss(z, batch), exact.loss(z, batch))
    torch.testing.assert_close(mine.gradient(z, batch), exact.gradient(z, batch))
    H, G = exact.hessian(z, batch), mine.hessian(z, batch)
    assert H.exact
    assert not G.exact
    x = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    torch.testing.assert_close(G @ x, H @ x)
    torch.testing.assert_close(G.quadratic(x), H.quadratic(x))
    torch.testing.assert_close(G.dense(), H.dense())
    torch.testing.assert_close(G.diagonal(), H.diagonal())
    torch.testing.assert_close(G.trace(), H.trace())
    size = torch.maximum(*(end.abs() for end in H.eigenvalue_range()))
    found = G.extreme_eigenvectors()
    noise = 1e-14 * (1 + size)
    ends = ((found.lowest, found.lowest_vectors), (found.highest, found.highest_vectors))
    for end, (value, vectors) in enumerate(ends):
        bound = 2 * found.residuals[:, end] * size + noise
        assert ((value - H.eigenvalue_range()[end]).abs() <= bound).all()
        assert ((H @ vectors - value[:, None] * vectors).norm(dim=1) <= bound).all()  # not only claimed
    # Where the spectrum piles up at 0 Lanczos does not get there in 200 steps; then it says so.
    if vocab < 400:
        assert (found.residuals <= 1e-8).all()
    decided = H.eigenvalue_range()[0].abs() > 1e-6 * size
    assert torch.equal(G.negative_count()[decided], H.negative_count()[decided])
    assert torch.equal(G.is_convex()[decided], H.is_convex()[decided])


def test_a_loss_that_no_other_family_holds(device: torch.device) -> None:
    """logsumexp(z)^2: a z-loss, which sees the level of the logits."""
    z, batch = Case(9, "random", 1.0, 0.0).build(device)
    objective = lg.autograd_objective(lambda x, b: torch.logsumexp(x, 1).square())
    _, gradient, hessian = derivatives(lambda x, b, n: torch.logsumexp(x, 0) ** 2, z, batch)
    torch.testing.assert_close(objective.gradient(z, batch), gradient)
    torch.testing.assert_close(objective.hessian(z, batch).dense(), hessian)
    values = torch.linalg.eigvalsh(hessian)
    low, high = objective.hessian(z, batch).eigenvalue_range()
    torch.testing.assert_close(low, values[:, 0])
    torch.testing.assert_close(high, values[:, -1])


def test_what_did_not_converge_is_said(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcogeom.geometry.autograd.STEPS", 4)
    z, batch = Case(400, "random", 1.0, 0.1).build(device)
    H = lg.autograd_objective(lg.objective("entropy").loss).hessian(z, batch)
    with pytest.warns(UserWarning, match=r"did not converge in 4 Lanczos steps; the largest relative residual is"):
        H.eigenvalue_range()
    assert H.extreme_eigenvectors().residuals.max() > 1e-8


def test_bad_input(device: torch.device) -> None:
    z, batch = Case(9, "random", 1.0, 0.0).build(device)
    with pytest.raises(ValueError, match="one loss per token"):
        lg.autograd_objective(lambda x, b: x.mean()).loss(z, batch)
    spoiled = z.clone()
    spoiled[3, 1] = torch.nan
    objective = lg.autograd_objective(lambda x, b: torch.logsumexp(x, 1))
    for method in (objective.gradient, objective.hessian):
        with pytest.raises(ValueError, match="token 3 holds"):
            method(spoiled, batch)
    with pytest.raises(ValueError, match="x: shape"):
        _ = objective.hessian(z, batch) @ z[:, 1:]
    mask = torch.tensor([True, False, True, True, True], device=device)
    masked = replace(batch, mask=mask)
    assert not objective.hessian(z, masked).dense()[1].any()
    assert not objective.gradient(z, masked)[1].any()
    linear = lg.autograd_objective(lambda x, b: x.sum(1))
    assert linear.hessian(z, batch).eigenvalue_range()[1].abs().max() == 0
