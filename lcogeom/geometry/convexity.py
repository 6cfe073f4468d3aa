"""When an action objective f(l) is convex in the logits, exactly, from pi alone (method.md, 2.2).

Its Hessian is f'' u u^T - f' S, and on the complement of the all-ones vector u^T S^+ u = (1 - pi) / pi, the odds
against the action. So two numbers decide everything:

    m1 = -f'                          the curvature that S contributes
    m2 = -f' + f'' (1 - pi) / pi      the same along S^+ u, the one direction that u u^T touches

Both are in units of "amount of forward KL": adding k * KL(q || p) for any fixed q adds k to both.
"""

from __future__ import annotations

import torch
from torch import Tensor


def odds_against(logprobs: Tensor) -> Tensor:
    """(1 - pi) / pi from stored log-probabilities, (N,) float64: accurate where pi rounds to 0 or to 1."""
    return torch.expm1(-logprobs.double())


def convexity_margins(d1: Tensor, d2: Tensor, odds: Tensor) -> tuple[Tensor, Tensor]:
    """(m1, m2), each (N,). A token with V >= 3 is convex where both are >= 0.

    Args:
        d1, d2: f'(l) and f''(l), (N,).
        odds: (1 - pi) / pi, (N,), from `odds_against` or `TokenDistribution.odds_against`.
    """
    bend = torch.where(d2 == 0, 0.0, d2.double() * odds)  # 0 * inf is 0 here: there is no rank-one term at all
    return -d1.double(), -d1.double() + bend


def negative_count(d1: Tensor, d2: Tensor, odds: Tensor, vocab: int) -> Tensor:
    """Number of negative eigenvalues of f'' u u^T - f' S, (N,) int64, exact for every V >= 2."""
    m1, m2 = convexity_margins(d1, d2, odds)
    return torch.where(m1 < 0, vocab - 2, 0) + (m2 < 0).long()


def forward_kl_needed(d1: Tensor, d2: Tensor, odds: Tensor) -> Tensor:
    """k*, (N,): the smallest weight of a full-vocabulary forward KL that makes the token convex (V >= 3)."""
    m1, m2 = convexity_margins(d1, d2, odds)
    return torch.minimum(m1, m2).neg().clamp(min=0.0)
