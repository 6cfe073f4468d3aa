"""The logit gradient's norm where that of single tokens is not known."""

from __future__ import annotations

import numpy as np
import pytest

from lcogeom.recording.summary import summarise


def row(d1: float, misfit: float, prob: float = 0.5) -> dict[str, object]:
    """Norms 3 and 4, and a third token whose own is not known; V = 2, so that its |e_a - p| is sqrt(2) (1 - pi)."""
    nothing = np.full(3, np.nan)
    return summarise(
        {
            "weight": np.ones(3),
            "advantage": nothing,
            "logit_grad_norm": np.array([3.0, 4.0, np.nan]),
            "d1": np.array([1.0, 1.0, d1]),
            "misfit": np.array([0.0, 0.0, misfit]),
            "prob": np.array([0.5, 0.5, prob]),
            "sum_sq_prob": np.array([0.5, 0.5, prob**2 + (1 - prob) ** 2]),
            "logprob": nothing,
            "entropy": nothing,
            "convex": nothing,
            "logsumexp": nothing,
            "ratio": nothing,
        }
    )


@pytest.mark.parametrize("misfit", [0.1, 0.6])
def test_a_token_too_small_to_matter(misfit: float) -> None:
    own = 0.1**2 * 0.5 / (1 - misfit**2)  # (d1 |u|)^2 and what lies beside it
    assert row(0.1, misfit)["logit_grad_norm"] == pytest.approx((25 + own) ** 0.5, rel=1e-12)


@pytest.mark.parametrize(("d1", "misfit"), [(1.0, 0.1), (0.1, 0.999), (0.1, 1.0), (np.nan, 0.1), (0.0, 1.0)])
def test_a_token_that_may_matter(d1: float, misfit: float) -> None:
    assert "logit_grad_norm" not in row(d1, misfit)


def test_a_saturated_token_does_not_empty_the_norm() -> None:
    assert row(1.0, 0.9, prob=1 - 1e-6)["logit_grad_norm"] == pytest.approx(5.0, rel=1e-9)
