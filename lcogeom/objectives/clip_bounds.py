"""Interventions that choose clip bounds on the ratio r = pi / pi_old: BAPO and ACPO.

Dropped: A > 0 and r above the upper bound, A < 0 and r below the lower. Put them on a surrogate without bounds of its
own, `lg.objective("ppo", clip_low=None, clip_high=None)`: its inner clip would act as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lcogeom.objectives.base import Objective, TokenBatch
from lcogeom.objectives.interventions import Intervention, Verdict, log_ratios, register
from lcogeom.objectives.last_layer import LastLayer

LOG_RATIO_LIMIT = 20.0  # the authors clamp the log-ratio before the exponential
EPS = 1e-8


def _within(log_ratio: Tensor, advantages: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whether the one-sided clip leaves the token alone, (N,) bool. Compares logarithms: no ratio overflows."""
    too_high = (advantages > 0) & (log_ratio > high.log())
    too_low = (advantages < 0) & (log_ratio < low.log())
    return ~(too_high | too_low)


@register("bapo")
def bapo(
    *,
    target: float = 0.5,
    low: tuple[float, float] = (0.6, 0.9),
    high: tuple[float, float] = (1.2, 3.0),
    step_low: float = 0.05,
    step_high: float = 0.05,
    dual_clip: float | None = 3.0,
) -> Intervention:
    """BAPO: clip bounds that keep the positive part of the batch's surrogate above a share of the negative.

        pos = sum_{A >= 0} min(r, c_high) A,  neg = sum_{A < 0} max(r, c_low) |A|,  R = pos / neg, inf where neg = 0

    While R < target, c_low rises by its step up to its maximum; then, while R is still below, c_high does. The bounds
    are on the ratio itself, not 1 -+ epsilon. Dual clip: A < 0 and r > dual_clip is dropped as well (None: not).
    Scores: `ratio`, and `balance`, the R reached.

    By these definitions a higher c_low can only raise neg: where the search starts at all, c_low goes to its maximum
    before c_high moves. The sums are over this batch; across devices, the published code sums them over all ranks.

    [arXiv 2510.18927; systems.md 5: confirmed in the code. Unconfirmed: the paper may compare pos / (pos + neg) with
    the target, and may raise c_high first. Defaults are the README's; its yaml has target 1, low .6-.8, high 1.2-2.0]

    Args:
        target: rho_0, the least R.
        low, high: (start, maximum) of c_low and of c_high.
    Raises:
        ValueError: a range that is not 0 < start <= maximum, low above high, a step below 0, a target below 0.
    """
    for option, (start, most) in (("low", low), ("high", high)):
        if not 0 < start <= most < math.inf:
            raise ValueError(f"{option}: ({start}, {most}); must be (start, maximum), 0 < start <= maximum.")
    if low[1] > high[0]:
        raise ValueError(f"low: may rise to {low[1]}, above where high starts, {high[0]}. Lower its maximum.")
    for option, value in (("target", target), ("step_low", step_low), ("step_high", step_high)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{option}: {value}; must be a finite number >= 0.")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: {dual_clip}; must be > 1, or None for none.")
    lows, highs = _ladder(*low, step_low), _ladder(*high, step_high)
    path = [(c, highs[0]) for c in lows] + [(lows[-1], c) for c in highs[1:]]

    def decide(logits: Tensor, batch: TokenBatch, _: Objective | None, __: LastLayer | None) -> Verdict:
        log_ratio, advantages = log_ratios("bapo", logits, batch)
        log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio, gain = log_ratio.exp(), batch.kept(advantages)
        bounds = torch.tensor(path, dtype=torch.float64, device=logits.device)  # (P, 2)
        # Every rung of the search at once, so that nothing waits for a device: P is 43 by default.
        pos = (torch.minimum(ratio, bounds[:, 1:]) * gain.clamp(min=0)).sum(1)
        neg = (torch.maximum(ratio, bounds[:, :1]) * -gain.clamp(max=0)).sum(1)
        balance = torch.where(neg > 0, pos / (neg + EPS), math.inf)
        reached = balance >= target
        reached[-1] = True
        rung = reached.long().argmax()  # the first
        c_low, c_high = bounds[rung].expand(len(batch), 2).unbind(1)
        accepted = _within(log_ratio, advantages, c_low, c_high)
        if dual_clip is not None:
            accepted &= ~((advantages < 0) & (log_ratio > math.log(dual_clip)))
        return Verdict(accepted, {"ratio": ratio, "balance": balance[rung].expand(len(batch))}, (c_low, c_high))

    options = dict(target=target, low=low, high=high, step_low=step_low, step_high=step_high, dual_clip=dual_clip)
    return Intervention("bapo", decide, options)


def _ladder(start: float, most: float, step: float) -> list[float]:
    """start, start + step, ... up to and with `most`; start alone where the step is 0."""
    rungs = [start]
    while rungs[-1] < most and step > 0:
        rungs.append(min(rungs[-1] + step, most))
    return rungs


@register("acpo")
def acpo(*, clip_low: float = 0.2, clip_high: float = 0.2, delta: float = 0.08) -> Intervention:
    """ACPO: an upper clip bound that grows with the advantage.

        r <= 1 + clip_high + delta Phi(A)  where A > 0,    r >= 1 - clip_low  where A < 0

    with Phi the standard normal distribution function and A the normalised advantage: `TokenBatch.advantages` as they
    stand, so normalise them over their group first. Scores: `ratio`.

    [arXiv 2510.00690; systems.md 9: the form confirmed, from a note on the paper; delta's default is reconstructed:
    .08 keeps the bound below DAPO's .28. The paper's vision part and curriculum are not here]

    Raises:
        ValueError: an option below 0.
    """
    for option, value in (("clip_low", clip_low), ("clip_high", clip_high), ("delta", delta)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{option}: {value}; must be a finite number >= 0.")

    def decide(logits: Tensor, batch: TokenBatch, _: Objective | None, __: LastLayer | None) -> Verdict:
        log_ratio, advantages = log_ratios("acpo", logits, batch)
        high = 1 + clip_high + delta * torch.special.ndtr(advantages)
        low = torch.full_like(high, max(0.0, 1 - clip_low))
        return Verdict(_within(log_ratio, advantages, low, high), {"ratio": log_ratio.exp()}, (low, high))

    return Intervention("acpo", decide, dict(clip_low=clip_low, clip_high=clip_high, delta=delta))
