"""From gradients at tokens to the recorded quantities of each token (method.md, 2.1 and 2.2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lcogeom.geometry.convexity import negative_count
from lcogeom.geometry.softmax import TokenDistribution, token_distribution
from lcogeom.objectives import ActionObjective, Objective, TokenBatch
from lcogeom.recording.head import OutputHead

BLOCK_ELEMENTS = 2**19  # logits looked at together: 4 MiB in float64, which the cache holds
TRUSTED_MISFIT = 0.05  # beyond it the gradient is not a multiple of the expected direction


@dataclass(frozen=True, eq=False)
class Candidates:
    """Completion tokens of one backward pass, still as the tap saw them."""

    values: Tensor
    """Hidden states (M, d) or logits (M, V)."""
    gradients: Tensor
    """Gradient of the loss with respect to `values`."""
    sequence: Tensor
    position: Tensor
    actions: Tensor
    """(M,) int64 each."""
    weight: Tensor
    """(M,) float64: how many tokens each stands for."""
    batch: TokenBatch | None
    """What batch() said of the same tokens."""

    def __getitem__(self, rows: Tensor) -> Candidates:
        present = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **{name: value[rows] for name, value in present.items()})


Columns = dict[str, Tensor]
"""Columns of the tokens table (runs/columns.py), (M,) each, NaN where a value is not known, and `contradicts`: whether
the gradient has the opposite sign of the declared objective's."""


def choose(sizes: list[Tensor], budget: int, rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """At most `budget` tokens of several groups: half those of the largest size, half a uniform sample of the rest.

    The sampled ones stand for those left out as well, so weighted sums over the result are unbiased.

    Args:
        sizes: of the gradient at each token, (M_i,) for each group.

    Returns:
        For each group: (the rows kept, by what their weight grows).
    """
    counts = [len(size) for size in sizes]
    joined = torch.cat(sizes)
    growth = torch.ones(len(joined), dtype=torch.float64, device=joined.device)
    if len(joined) > budget:
        top = budget // 2
        order = joined.nan_to_num(nan=math.inf).argsort(descending=True)
        drawn = top + torch.randperm(len(joined) - top, generator=rng)[: budget - top]
        growth[order[top:]] = 0.0
        growth[order[drawn.to(order.device)]] = (len(joined) - top) / (budget - top)
    return [((part > 0).nonzero().squeeze(1), part[part > 0]) for part in growth.split(counts)]


def measure(candidates: Candidates, objective: Objective | None, head: OutputHead | None) -> Columns:
    """Everything recorded of each token, float64, in blocks.

    Args:
        candidates: with logits, or with hidden states when `head` is given.
        objective: what the user says is minimised; None if unknown.
        head: of the model, for the hidden-state tap.
    """
    width = candidates.values.shape[1] if head is None else int(head.module.weight.shape[0])  # type: ignore[index]
    step = max(1, BLOCK_ELEMENTS // width)
    blocks = []
    with torch.no_grad():
        for start in range(0, len(candidates.actions), step):
            rows = torch.arange(start, min(start + step, len(candidates.actions)), device=candidates.actions.device)
            blocks.append(_measure_block(candidates[rows], objective, head))
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _measure_block(some: Candidates, objective: Objective | None, head: OutputHead | None) -> Columns:
    logits = some.values if head is None else head.logits(some.values)
    distribution = token_distribution(logits, some.actions)
    expected = _expected_direction(distribution, logits, some.batch, objective)
    seen = some.gradients.double()
    unknown = torch.full_like(distribution.logprobs, math.nan)

    coefficient = misfit = norm = unknown
    if expected is not None:
        length = expected.norm(dim=1)
        unit = expected / length.clamp(min=1e-300)[:, None]  # before any rounding to float32: saturated rows are tiny
        image = unit if head is None else head.pull_back(unit, logits)
        coefficient = (seen * image).sum(1) / image.square().sum(1)
        residual = (seen - coefficient[:, None] * image).norm(dim=1)
        misfit = torch.where(residual == 0, 0.0, residual / seen.norm(dim=1))
        norm = torch.where(misfit < TRUSTED_MISFIT, coefficient.abs(), math.nan)
        coefficient = coefficient / length
    if head is None:
        norm = seen.norm(dim=1)

    is_action = objective is None or isinstance(objective, ActionObjective)
    d1 = coefficient if is_action else unknown
    d2, negatives, contradicts = _curvature(some.batch, objective, distribution, logits, (d1, misfit))
    old = some.batch.old_logprobs if some.batch is not None else None
    old = unknown if old is None else old.double()
    return {
        "sequence": some.sequence,
        "position": some.position,
        "token_id": some.actions,
        "weight": some.weight,
        "advantage": _sampled_advantage(some.batch, unknown),
        "logprob": distribution.logprobs,
        "old_logprob": old,
        "ratio": (distribution.logprobs - old).exp(),
        "prob": distribution.logprobs.exp(),
        "entropy": distribution.entropy(),
        "sum_sq_prob": distribution.sum_sq_prob(),
        "logit_grad_norm": norm,
        "d1": d1,
        "d2": d2,
        "misfit": misfit,
        "convex": torch.where(negatives.isnan(), negatives, (negatives == 0).double()),
        "negative_count": negatives,
        "contradicts": contradicts,
    }


def _sampled_advantage(batch: TokenBatch | None, unknown: Tensor) -> Tensor:
    """A of the sampled action; NaN where dense advantages do not cover it."""
    if batch is None or batch.advantages is None:
        return unknown
    if batch.advantage_ids is None:
        return batch.advantages.double()
    hit = batch.advantage_ids == batch.actions[:, None]
    found = torch.where(hit, batch.advantages.double(), 0.0).sum(1)
    return torch.where(hit.any(1), found, unknown)


def _expected_direction(
    distribution: TokenDistribution, logits: Tensor, batch: TokenBatch | None, objective: Objective | None
) -> Tensor | None:
    """The logit gradient up to a factor, (M, V): u for every action objective, else the objective's own."""
    if objective is None or isinstance(objective, ActionObjective):
        return distribution.direction()
    return _where_finite(logits, batch, objective.gradient)


def _curvature(
    batch: TokenBatch | None,
    objective: Objective | None,
    distribution: TokenDistribution,
    logits: Tensor,
    recovered: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """(f'' of the loss seen, its number of negative eigenvalues, where the gradient contradicts the objective).

    The inertia is the declared objective's, whose f' and f'' differ from those of the loss seen by one positive factor
    (its averaging). It is not taken from the recovered f': on saturated tokens float32 leaves no digit of that one.
    """
    d1, misfit = recovered
    unknown = torch.full_like(d1, math.nan)
    no = torch.zeros_like(d1, dtype=torch.bool)
    if objective is None:
        return unknown, unknown, no
    if not isinstance(objective, ActionObjective):
        counts = _where_finite(logits, batch, lambda z, b: objective.hessian(z, b).negative_count()[:, None].double())
        return unknown, unknown if counts is None else counts[:, 0], no
    batch = TokenBatch(distribution.actions) if batch is None else batch
    if any(getattr(batch, field) is None for field in objective.needs):
        return unknown, unknown, no
    try:
        _, slope, bend = objective.derivatives(distribution.logprobs, batch)
    except (TypeError, AttributeError) as error:  # a user's own function read a field that batch() was not given
        warnings.warn(
            f"d2 and convex stay empty: objective {objective.name!r} failed on the batch: {error}", stacklevel=2
        )
        return unknown, unknown, no
    d2 = torch.where(slope != 0, d1 * bend / slope, torch.where(bend == 0, 0.0, math.nan))
    counts = negative_count(slope, bend, distribution.odds_against(), logits.shape[1]).double()
    contradicts = (misfit < TRUSTED_MISFIT) & (d1 * slope < 0)
    known = torch.isfinite(slope) & torch.isfinite(bend) & torch.isfinite(distribution.logprobs) & ~contradicts
    return d2, torch.where(known, counts, math.nan), contradicts


def _where_finite(
    logits: Tensor, batch: TokenBatch | None, function: Callable[[Tensor, TokenBatch], Tensor]
) -> Tensor | None:
    """function(logits, batch) on the rows without NaN, NaN elsewhere; None where batch() lacks what it needs."""
    if batch is None:
        return None
    finite = torch.isfinite(logits).all(1)
    if not finite.any():
        return None
    try:
        found = function(logits[finite], batch[finite])
    except ValueError:
        return None
    result = found.new_full((len(logits), found.shape[1]), math.nan)
    result[finite] = found
    return result
