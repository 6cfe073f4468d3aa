"""The losses of log pi(a) that the field trains with: SFT, REINFORCE, PPO and its descendants, one function each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lcogeom.objectives.action import ActionObjective, ScalarLoss
from lcogeom.objectives.base import Objective, TokenBatch, register


@register("sft")
def sft() -> Objective:
    """Negative log-likelihood, f = -l. Convex everywhere. [systems.md 3.1, confirmed]"""
    return ActionObjective("sft", lambda logp, _: -logp)


@register("reinforce")
def reinforce() -> Objective:
    """Policy gradient, f = -A l. Convex where A >= 0. [systems.md 3.1, confirmed]"""
    return ActionObjective("reinforce", lambda logp, b: -_advantages(b, logp) * logp, ("advantages",))


@register("rloo")
def rloo() -> Objective:
    """REINFORCE with leave-one-out advantages, f = -A l; A = r - mean of the group's other rewards, by the caller.

    [systems.md 3.7, confirmed]
    """
    return ActionObjective("rloo", lambda logp, b: -_advantages(b, logp) * logp, ("advantages",))


@register("ppo")
def ppo(*, clip_low: float | None = 0.2, clip_high: float | None = 0.2, dual_clip: float | None = None) -> Objective:
    """PPO's surrogate, f = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(l - l_old).

    The clip is one-sided: with A > 0 only the upper bound acts, with A < 0 only the lower. `None` removes a bound.
    `dual_clip` c makes f constant where A < 0 and r > c (3 in the literature). Unclipped: convex where A = 0, or A > 0
    and pi >= 1/2. [systems.md 3.2, confirmed]

    Raises:
        ValueError: a bound below 0, or a dual clip not above 1.
    """
    surrogate = _surrogate(clip_low, clip_high, dual_clip)
    options = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    return ActionObjective("ppo", surrogate, ("advantages", "old_logprobs"), options)


@register("grpo")
def grpo(*, clip_low: float | None = 0.2, clip_high: float | None = 0.2, beta: float = 0.04) -> Objective:
    """PPO's surrogate plus beta times the k3 penalty; A = (r - mean) / (std + 1e-4) over the group, by the caller.

    The published loss averages over each sequence first; that normaliser is the caller's. [systems.md 3.3, confirmed]

    Raises:
        ValueError: a bound or beta below 0.
    """
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta: {beta}; must be a finite number >= 0.")
    surrogate = _surrogate(clip_low, clip_high, None)
    needs = ("advantages", "old_logprobs", "ref_logprobs") if beta else ("advantages", "old_logprobs")

    def loss(logp: Tensor, batch: TokenBatch) -> Tensor:
        return surrogate(logp, batch) + (beta * _k3(logp, batch) if beta else 0.0)

    return ActionObjective("grpo", loss, needs, {"clip_low": clip_low, "clip_high": clip_high, "beta": beta})


@register("dr-grpo")
def dr_grpo(*, clip_low: float | None = 0.2, clip_high: float | None = 0.2) -> Objective:
    """PPO's surrogate with A = r - mean over the group, undivided, and no length normaliser (both by the caller).

    [systems.md 3.7, confirmed]
    """
    options = {"clip_low": clip_low, "clip_high": clip_high}
    needs = ("advantages", "old_logprobs")
    return ActionObjective("dr-grpo", _surrogate(clip_low, clip_high, None), needs, options)


@register("dapo")
def dapo(*, clip_low: float | None = 0.2, clip_high: float | None = 0.28) -> Objective:
    """PPO's surrogate with the higher upper bound; summed over tokens and divided by all of them, by the caller.

    [systems.md 3.4, confirmed]
    """
    options = {"clip_low": clip_low, "clip_high": clip_high}
    needs = ("advantages", "old_logprobs")
    return ActionObjective("dapo", _surrogate(clip_low, clip_high, None), needs, options)


@register("cispo")
def cispo(*, clip_high: float = 0.28) -> Objective:
    """REINFORCE with a clipped, detached importance weight, f = -sg(min(r, 1 + clip_high)) A l.

    Convex where A >= 0: detaching the ratio takes PPO's bend away. [systems.md 3.5, confirmed]

    Raises:
        ValueError: a bound below 0.
    """
    _require_bound("clip_high", clip_high)

    def loss(logp: Tensor, batch: TokenBatch) -> Tensor:
        weight = _log_ratio(batch, logp).detach().clamp(max=math.log1p(clip_high)).exp()
        return -weight * _advantages(batch, logp) * logp

    return ActionObjective("cispo", loss, ("advantages", "old_logprobs"), {"clip_high": clip_high})


@register("k3")
def k3() -> Objective:
    """The k3 estimate of KL(pi || ref), f = u - log u - 1 with u = exp(l_ref - l).

    Convex where pi <= ref; concave where the policy has moved far above the reference. [systems.md 3.3, confirmed]
    """
    return ActionObjective("k3", _k3, ("ref_logprobs",))


@register("minpro")
def minpro(*, clip_low: float | None = 0.2, clip_high: float | None = 0.28) -> Objective:
    """REINFORCE weighted by sg(clip(rho_min r, 1 - clip_low, 1 + clip_high)), rho_min the least ratio of the prefix.

    rho_min_t = min over the earlier tokens of the completion of their ratios, 1 at its first token [reconstructed];
    f = -w A l. Reads `TokenBatch.sequences`; masked tokens count for nothing in the prefix. [systems.md 6, from a note;
    the bounds are reconstructed: DAPO's]

    Raises:
        ValueError: a bound below 0.
    """
    for option, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        _require_bound(option, bound)
    floor = -math.inf if clip_low is None or clip_low >= 1 else math.log1p(-clip_low)
    ceiling = math.inf if clip_high is None else math.log1p(clip_high)

    def loss(logp: Tensor, batch: TokenBatch) -> Tensor:
        log_ratio = _log_ratio(batch, logp).detach()
        weight = (_least_before(log_ratio, batch) + log_ratio).clamp(min=floor, max=ceiling).exp()
        return -weight * _advantages(batch, logp) * logp

    options = {"clip_low": clip_low, "clip_high": clip_high}
    return ActionObjective("minpro", loss, ("advantages", "old_logprobs", "sequences"), options)


def _least_before(values: Tensor, batch: TokenBatch) -> Tensor:
    """The least value among the earlier kept tokens of the same completion, (N,); 0 where there is none."""
    assert batch.sequences is not None
    counted = values if batch.mask is None else torch.where(batch.mask.bool(), values, math.inf)
    result = torch.zeros_like(values)
    for sequence in batch.sequences.unique():
        rows = (batch.sequences == sequence).nonzero().squeeze(1)
        least = counted[rows].cummin(0).values[:-1]
        result[rows[1:]] = torch.where(least.isinf(), 0.0, least)
    return result


def _surrogate(clip_low: float | None, clip_high: float | None, dual_clip: float | None) -> ScalarLoss:
    for option, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        _require_bound(option, bound)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: {dual_clip}; must be > 1, or None for none.")
    floor = -math.inf if clip_low is None or clip_low >= 1 else math.log1p(-clip_low)
    ceiling = math.inf if clip_high is None else math.log1p(clip_high)
    dual = math.inf if dual_clip is None else math.log(dual_clip)

    def loss(logp: Tensor, batch: TokenBatch) -> Tensor:
        advantages, log_ratio = _advantages(batch, logp), _log_ratio(batch, logp)
        # Clipping the exponent instead of the ratio: a clipped ratio then never overflows, nor does its gradient.
        clipped = torch.where(advantages > 0, log_ratio.clamp(max=ceiling), log_ratio.clamp(min=floor, max=dual))
        return -advantages * clipped.exp()

    return loss


def _k3(logp: Tensor, batch: TokenBatch) -> Tensor:
    assert batch.ref_logprobs is not None
    log_u = batch.ref_logprobs.to(logp) - logp
    return torch.expm1(log_u) - log_u


def _advantages(batch: TokenBatch, like: Tensor) -> Tensor:
    assert batch.advantages is not None
    return batch.advantages.to(like)


def _log_ratio(batch: TokenBatch, logp: Tensor) -> Tensor:
    assert batch.old_logprobs is not None
    return logp - batch.old_logprobs.to(logp)


def _require_bound(option: str, bound: float | None) -> None:
    if bound is not None and not bound >= 0:
        raise ValueError(f"{option}: {bound}; must be >= 0, or None for no bound.")
