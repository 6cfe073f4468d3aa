"""Extreme eigenvectors: their residual, their direction, and what is said of a repeated eigenvalue."""

from __future__ import annotations

import pytest
import torch

import lcogeom as lg
from tests.cases import LOGITS, Case
from tests.oracles import PAIRS, built, usable


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("name", PAIRS)
def test_residuals(name: str, logits: str, device: torch.device) -> None:
    for vocab in (2, 3, 17, 400):
        case = Case(vocab, logits, 1.0, 0.1)
        if not usable(name, case):
            continue
        z, batch = built(name, case, device)
        H = PAIRS[name][0].hessian(z, batch)
        found = H.extreme_eigenvectors()
        size = torch.maximum(found.lowest.abs(), found.highest.abs())
        # f'' - f' cancels near pi = 1/2, and f' - k* wherever PPO was made convex: what is left is known to that only.
        noise = 4e-15 * (H.fisher.abs() + H.action.abs() + (H.cost is not None))
        near = 1e-10 if logits in ("flat", "tied") else 1e-12  # an eigenvalue that is also a pole leaves fewer digits
        assert (found.residuals * size[:, None] <= (near * size + noise)[:, None]).all()
        for value, vectors in ((found.lowest, found.lowest_vectors), (found.highest, found.highest_vectors)):
            live = size > 0
            torch.testing.assert_close(vectors.norm(dim=1)[live], torch.ones_like(size)[live])
            gap = (H @ vectors - value[:, None] * vectors).norm(dim=1)
            assert (gap <= near * size + noise).all()
            assert ((H.quadratic(vectors) - value).abs() <= near * size + noise).all()


@pytest.mark.parametrize("name", ["ppo-unclipped", "entropy", "reverse-kl", "sum-of-everything"])
def test_directions_equal_eigh(name: str, device: torch.device) -> None:
    z, batch = Case(17, "random", 1.0, 0.1).build(device)
    H = PAIRS[name][0].hessian(z, batch)
    values, vectors = torch.linalg.eigh(H.dense())
    found = H.extreme_eigenvectors()
    for mine, theirs, gap in (
        (found.lowest_vectors, vectors[:, :, 0], values[:, 1] - values[:, 0]),
        (found.highest_vectors, vectors[:, :, -1], values[:, -1] - values[:, -2]),
    ):
        clear = gap > 1e-3 * values.abs().amax(1)
        assert clear.sum() >= 3
        torch.testing.assert_close((mine * theirs).sum(1).abs()[clear], torch.ones_like(gap)[clear], rtol=1e-9, atol=0)


def test_the_end_at_zero_is_the_constant_vector(device: torch.device) -> None:
    z, batch = Case(17, "random", 1.0, 0.0).build(device)
    found = lg.objective("sft").hessian(z, batch).extreme_eigenvectors()
    assert not found.lowest.any()
    torch.testing.assert_close(found.lowest_vectors, torch.full_like(found.lowest_vectors, 17**-0.5))
