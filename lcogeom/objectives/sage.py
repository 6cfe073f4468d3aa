"""SAGE: which preference pairs deserve a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lcogeom.geometry.softmax import action_logprobs
from lcogeom.objectives.base import Objective, TokenBatch
from lcogeom.objectives.interventions import Intervention, Verdict, register, require_fields
from lcogeom.objectives.last_layer import LastLayer


@register("sage")
def sage(*, keep: float = 0.5, beta: float = 0.1, damping: float = 1e-2) -> Intervention:
    """SAGE: keep the pairs with the largest signal for their curvature, a scalar Newton decrement of DPO's loss.

        m = beta [sum over chosen tokens (l - l_ref) - sum over rejected tokens (l - l_ref)]
        score = g^2 / (c + damping),    g = sigmoid(-m),    c = sigmoid(m) sigmoid(-m)

    g is the slope of -log sigmoid(m) and c its curvature, so confident errors score highest. All tokens of a pair are
    kept or dropped. Scores: `margin` and `score`, of the pair, at each of its tokens.

    This score falls as m rises, whatever `damping`: it keeps the pairs with the lowest margins.

    [arXiv 2602.01207; systems.md 8: the idea confirmed, from a note on the paper; the score, `damping` (1e-3 to 1e-1)
    and `keep` are reconstructed. The paper's difficulty pools, refreshed in training, are not here]

    Needs `ref_logprobs`, `pairs`, `chosen`.

    Args:
        keep: share of the pairs, rounded up; of equal scores the pair with the lower id is kept.
    Raises:
        ValueError: an option out of range, or a pair without chosen or without rejected tokens.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: {keep}; must be in (0, 1], the share of the pairs that is kept.")
    for option, value in (("beta", beta), ("damping", damping)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{option}: {value}; must be a finite number > 0.")

    def decide(logits: Tensor, batch: TokenBatch, _: Objective | None, __: LastLayer | None) -> Verdict:
        require_fields("sage", batch, "ref_logprobs", "pairs", "chosen")
        assert batch.ref_logprobs is not None
        assert batch.pairs is not None
        assert batch.chosen is not None
        names, pair = batch.pairs.unique(return_inverse=True)  # ascending ids; (N,)
        side = torch.where(batch.chosen.bool(), 1.0, -1.0).double()
        _require_both_sides(names, pair, side)
        gain = action_logprobs(logits, batch.actions) - batch.ref_logprobs.double()
        zero = gain.new_zeros(len(names))
        margin = beta * zero.index_add(0, pair, batch.kept(side * gain))
        slope, other = torch.sigmoid(-margin), torch.sigmoid(margin)
        score = slope.square() / (slope * other + damping)
        # A pair whose tokens are all masked takes nobody's place.
        live = zero.index_add(0, pair, batch.kept(torch.ones_like(gain))) > 0
        order = torch.where(live, score, -1.0).argsort(descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        kept = rank < torch.ceil(keep * live.sum().double() - 1e-9)  # .07 * 100 is a rounding above 7
        return Verdict(kept[pair], {"margin": margin[pair], "score": score[pair]})

    return Intervention("sage", decide, dict(keep=keep, beta=beta, damping=damping))


def _require_both_sides(names: Tensor, pair: Tensor, side: Tensor) -> None:
    sides = side.new_zeros(len(names), 2).index_put_((pair, (side > 0).long()), side.new_ones(()), accumulate=True)
    lacking = (sides == 0).any(1)
    if lacking.any():
        first = int(lacking.nonzero()[0])
        what = "chosen" if sides[first, 1] == 0 else "rejected"
        raise ValueError(f"chosen: pair {int(names[first])} has no {what} token; each pair needs both answers.")
