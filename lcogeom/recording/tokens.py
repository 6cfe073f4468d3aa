"""From gradients at tokens to the recorded quantities of each token (method.md, 2.1 and 2.2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lcogeom.geometry.convexity import negative_count
from lcogeom.objectives import ActionObjective, Objective, TokenBatch
from lcogeom.recording.candidates import Candidates
from lcogeom.recording.head import OutputHead
from lcogeom.recording.softmax_sums import SoftmaxSums, softmax_sums

BLOCK_ELEMENTS = 2**19  # logits looked at together: 4 MiB in float64, which the cache holds
HEAD_ELEMENTS = 2**22  # logits made of hidden states at once: 16 MiB, of which a matrix product takes its time
TRUSTED_MISFIT = 0.05  # beyond it the gradient is not a multiple of the expected direction


Columns = dict[str, Tensor]
"""Columns of the tokens table (runs/columns.py), (M,) each, NaN where a value is not known, and `contradicts`: whether
the gradient has the opposite sign of the declared objective's."""


def measure(
    candidates: Candidates, objective: Objective | None, head: OutputHead | None, temperature: float = 1.0
) -> Columns:
    """Everything recorded of each token, float64, in blocks.

    Args:
        candidates: with logits, or with hidden states when `head` is given.
        objective: what the user says is minimised; None if unknown.
        head: of the model, for the hidden-state tap.
        temperature: the policy is softmax(logits / temperature).
    """
    along_action = objective is None or isinstance(objective, ActionObjective)
    width = candidates.values.shape[-1] if head is None else int(head.module.weight.shape[0])  # type: ignore[index]
    blocks = []
    with torch.no_grad():
        if head is None and along_action:  # goes through the rows one after the other as it is
            return _measure_action(candidates, objective, None, temperature)
        step = max(1, (HEAD_ELEMENTS if along_action else BLOCK_ELEMENTS) // width)
        for start in range(0, len(candidates.actions), step):
            rows = torch.arange(start, min(start + step, len(candidates.actions)), device=candidates.actions.device)
            some = candidates[rows].gathered()
            if along_action:
                blocks.append(_measure_action(some, objective, head, temperature))
            else:
                assert objective is not None
                blocks.append(_measure_any(some, objective, head, temperature))
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _measure_action(
    some: Candidates, objective: Objective | None, head: OutputHead | None, temperature: float
) -> Columns:
    """Along s, the logit gradient of every action objective up to the factor f' (1 - pi) / temperature."""
    if head is None:
        width = some.values.shape[1]
        sums = softmax_sums(some.values, some.actions, some.gradients, temperature=temperature)
        along, rest = sums.seen_along, sums.seen_rest
        assert along is not None
        assert rest is not None
        coefficient = along / sums.direction_norm().square()
        seen_squares, residual = rest + along * coefficient, rest.sqrt()
        norm = seen_squares.sqrt()
    else:
        values, seen = some.values, some.gradients
        assert isinstance(values, Tensor)
        assert isinstance(seen, Tensor)
        logits = head.logits(values)
        width = logits.shape[1]
        others = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        sums = softmax_sums(logits, some.actions, None, others, temperature)
        direction = others.neg_().scatter_(1, some.actions[:, None], 1.0)
        image, g = head.pull_back(direction, logits), seen.double()
        coefficient = (g * image).sum(1) / image.square().sum(1)
        residual = (g - coefficient[:, None] * image).norm(dim=1)
        norm = coefficient.abs() * sums.direction_norm()
        seen_squares = g.square().sum(1)
    misfit = torch.where(residual == 0, 0.0, residual / seen_squares.sqrt())
    if head is not None:
        norm = torch.where(misfit < TRUSTED_MISFIT, norm, math.nan)
    d1 = coefficient / sums.complement() * temperature / some.factor
    d2, negatives, contradicts = _action_curvature(some, objective, sums, (d1, misfit), width)
    return _columns(some, sums.logprobs(), sums.entropy(), sums.sum_sq_prob(), sums.log_total) | {
        "logit_grad_norm": norm / some.factor,
        "logit_grad_sum": torch.full_like(d1, math.nan) if sums.seen_sum is None else sums.seen_sum / some.factor,
        "d1": d1,
        "d2": d2,
        "misfit": misfit,
        "convex": torch.where(negatives.isnan(), negatives, (negatives == 0).double()),
        "negative_count": negatives,
        "contradicts": contradicts,
    }


def _measure_any(some: Candidates, objective: Objective, head: OutputHead | None, temperature: float) -> Columns:
    """Along the objective's own gradient, over the whole vocabulary."""
    assert isinstance(some.values, Tensor)
    assert isinstance(some.gradients, Tensor)
    logits = some.values if head is None else head.logits(some.values)
    cooled = _cooled(logits, temperature)
    sums = softmax_sums(cooled, some.actions)
    expected = _where_finite(cooled, some.batch, objective.gradient)
    seen = some.gradients.double()
    unknown = torch.full_like(sums.log_odds, math.nan)
    misfit, norm = unknown, unknown
    if expected is not None:
        length = expected.norm(dim=1)
        unit = expected / length.clamp(min=1e-300)[:, None]  # before any rounding to float32: saturated rows are tiny
        image = unit if head is None else head.pull_back(unit, logits)
        coefficient = (seen * image).sum(1) / image.square().sum(1)
        residual = (seen - coefficient[:, None] * image).norm(dim=1)
        misfit = torch.where(residual == 0, 0.0, residual / seen.norm(dim=1))
        norm = torch.where(misfit < TRUSTED_MISFIT, coefficient.abs(), math.nan)
    if head is None:
        norm = seen.norm(dim=1)
    counts = _where_finite(cooled, some.batch, lambda z, b: objective.hessian(z, b).negative_count()[:, None].double())
    negatives = unknown if counts is None else counts[:, 0]
    return _columns(some, sums.logprobs(), sums.entropy(), sums.sum_sq_prob(), sums.log_total) | {
        "logit_grad_norm": norm / some.factor,
        "logit_grad_sum": seen.sum(1) / some.factor if head is None else unknown,
        "d1": unknown,
        "d2": unknown,
        "misfit": misfit,
        "convex": torch.where(negatives.isnan(), negatives, (negatives == 0).double()),
        "negative_count": negatives,
        "contradicts": torch.zeros_like(unknown, dtype=torch.bool),
    }


def measure_logprobs(
    some: Candidates,
    objective: Objective | None,
    *,
    vocabulary: int,
    entropy: Tensor | None,
    sum_sq_prob: Tensor | None,
    temperature: float,
) -> Columns:
    """The same from log-probabilities l (M,) and d loss / d l: f' is seen itself, for the price of nothing.

    entropy, sum_sq_prob: (M,), where the model computed them; the logit gradient's norm needs the second.
    """
    values, seen = some.values, some.gradients
    assert isinstance(values, Tensor)
    assert isinstance(seen, Tensor)
    logprobs, d1 = values.double(), seen.double() / some.factor
    unknown = torch.full_like(logprobs, math.nan)
    squares = unknown if sum_sq_prob is None else sum_sq_prob.double()
    none = torch.zeros_like(unknown)
    odds = SoftmaxSums(torch.expm1(-logprobs).log(), none, none, None, None)
    misfit = torch.zeros_like(unknown)  # a loss of these log-probabilities is one by construction
    d2, negatives, contradicts = _action_curvature(some, objective, odds, (d1, misfit), vocabulary)
    return _columns(some, logprobs, unknown if entropy is None else entropy.double(), squares, None) | {
        "logit_grad_norm": d1.abs() / temperature * (1 - 2 * logprobs.exp() + squares).clamp(min=0).sqrt(),
        "logit_grad_sum": unknown,
        "d1": d1,
        "d2": d2,
        "misfit": unknown,
        "convex": torch.where(negatives.isnan(), negatives, (negatives == 0).double()),
        "negative_count": negatives,
        "contradicts": contradicts,
    }


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def _columns(
    some: Candidates, logprobs: Tensor, entropy: Tensor, sum_sq_prob: Tensor, log_total: Tensor | None
) -> Columns:
    """What does not depend on the loss."""
    unknown = torch.full_like(logprobs, math.nan)
    old = some.batch.old_logprobs if some.batch is not None else None
    old = unknown if old is None else old.double()
    return {
        "sequence": some.sequence,
        "position": some.position,
        "token_id": some.actions,
        "weight": some.weight,
        "advantage": _sampled_advantage(some.batch, unknown),
        "logprob": logprobs,
        "old_logprob": old,
        "ratio": (logprobs - old).exp(),
        "prob": logprobs.exp(),
        "entropy": entropy,
        "sum_sq_prob": sum_sq_prob,
        "logsumexp": unknown if log_total is None else log_total,
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


def _action_curvature(
    some: Candidates,
    objective: Objective | None,
    sums: SoftmaxSums,
    recovered: tuple[Tensor, Tensor],
    vocabulary: int,
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
    assert isinstance(objective, ActionObjective)
    batch = TokenBatch(some.actions) if some.batch is None else some.batch
    if any(getattr(batch, field) is None for field in objective.needs):
        return unknown, unknown, no
    logprobs = sums.logprobs()
    try:
        _, slope, bend = objective.derivatives(logprobs, batch)
    except (TypeError, AttributeError) as error:  # a user's own function read a field that batch() was not given
        warnings.warn(
            f"d2 and convex stay empty: objective {objective.name!r} failed on the batch: {error}", stacklevel=2
        )
        return unknown, unknown, no
    d2 = torch.where(slope != 0, d1 * bend / slope, torch.where(bend == 0, 0.0, math.nan))
    counts = negative_count(slope, bend, sums.log_odds.exp(), vocabulary).double()
    contradicts = (misfit < TRUSTED_MISFIT) & (d1 * slope < 0)
    known = torch.isfinite(slope) & torch.isfinite(bend) & torch.isfinite(logprobs) & ~contradicts
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
