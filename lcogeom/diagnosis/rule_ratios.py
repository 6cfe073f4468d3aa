"""Rules about ratios: those that left the trust region, and those that are clipped."""

from __future__ import annotations

import numpy as np

from lcogeom.diagnosis.baseline import ahead, first
from lcogeom.diagnosis.finding import Finding
from lcogeom.diagnosis.making import heaviest, make, number
from lcogeom.diagnosis.signals import Signals

DRIVES = 0.3
"""Share of the squared gradient from which on a kind of token is said to drive an update."""
BLOWN = 3.0
"""Of a ratio: far outside any clip bound in use (0.2 to 0.28; dual clip begins at 3)."""
CLIPPED = 0.5
"""Of the gradient called for, over a rollout: from here on clipping decides more than advantages do. PPO with four
inner epochs loses 0.1 to 0.4."""
LEFT = 0.02
"""Of the tokens: share with a ratio above BLOWN or below its inverse, where some stay above it. Up to six inner epochs
at rates that train leave none above for three updates."""
SATURATED = 0.999
"""Probability from which on a slope of 0 may be rounding."""
SEVERAL = 4
"""Updates on one rollout."""
WITHIN = 0.2
"""Of the gradient called for, lost at ratios that the declared bounds allow: then the bounds in use are others."""


def ratio_blow_up(s: Signals) -> list[Finding]:
    """Tokens whose ratio left the trust region, and that drive the update."""
    tokens, ratio = s.tokens, s.token("ratio")
    if tokens is None or ratio is None:
        return _blown_summary(s)
    blown = ratio > BLOWN
    share, largest = tokens.share(blown), tokens.largest(ratio)
    far = largest > 2 * BLOWN
    # Of a loss made of ratios, one that stays so far out is enough: clipped or not, the policy left what was sampled.
    again = np.zeros(s.size, dtype=bool) if tokens.again is None else tokens.again
    lasting = far & (ahead((far & again).astype(float), 2) == 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        outside = np.nan_to_num(tokens.mean((np.abs(np.log(ratio)) > np.log(BLOWN)).astype(float)))
    staying = (ahead(((largest > BLOWN) & again).astype(float), 3) == 1) & (np.arange(s.size) <= s.size - 3)
    lasting |= staying & (ahead(outside, 3) > LEFT)
    at = first((far & (share > DRIVES)) | (lasting & ("clip_low" in s.options)))
    if at is None:
        return []
    proof = [
        s.evidence("ratio", at, largest[at], 1.0, "largest ratio", "tokens"),
        s.evidence("ratio", at, share[at], None, f"of the squared gradient at ratios above {BLOWN:g}", "tokens"),
        s.evidence(
            "ratio", at, outside[at], None, f"of the tokens at ratios above {BLOWN:g} or below its inverse", "tokens"
        ),
    ]
    chosen = blown & (tokens.update == at)
    named = tokens.named(at, chosen)
    sentence = (
        f"At update {s.steps[at]} ratios reach {number(largest[at])}; tokens whose ratio is above {BLOWN:g} make "
        f"{np.nan_to_num(share[at]):.0%} of the squared gradient{heaviest(named)}."
    )
    return [make(s, "ratio-blow-up", at, 0.9, sentence, proof, chosen=chosen)]


def _blown_summary(s: Signals) -> list[Finding]:
    largest = s.get("ratio_max")
    if largest is None:
        return []
    at = first(largest > 10 * BLOWN)
    if at is None:
        return []
    s.lacks("ratio-blow-up", "ratio", "the share of the gradient at those ratios; record with lcogeom.attach", "tokens")
    proof = [s.evidence("ratio_max", at, largest[at], 1.0, "largest ratio")]
    return [make(s, "ratio-blow-up", at, 0.7, f"At update {s.steps[at]} ratios reach {number(largest[at])}.", proof)]


def clip_saturation(s: Signals) -> list[Finding]:
    """Most of the gradient that a rollout's advantages call for is clipped, over all updates on it but the first."""
    tokens, advantage, prob = s.tokens, s.token("advantage"), s.token("prob")
    slope, squares = s.token("d1"), s.token("sum_sq_prob")
    if tokens is None or advantage is None or prob is None or slope is None or s.token("ratio") is None:
        return _clipped_log(s)
    shape = 1.0 if squares is None else np.sqrt(np.clip(1 - 2 * prob + squares, 0, None))
    called = tokens.weight * np.abs(advantage) * shape  # what each token's gradient would be at a ratio of 1
    # f' is exactly 0 on the flat side of a clip. A saturated token's may round to 0, too.
    flat = (slope == 0) & (np.abs(advantage) > 1e-8) & (prob < SATURATED)
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = tokens.sums(called, flat) / tokens.sums(called)
    again = np.zeros(s.size, dtype=bool) if tokens.again is None else tokens.again
    rollout = np.cumsum(~again)
    usable = again & np.isfinite(lost)
    mean = np.bincount(rollout, np.where(usable, lost, 0.0)) / np.maximum(np.bincount(rollout, usable), 1)
    # One update that comes so far may be a lively one: several on a rollout, or rollout after rollout, make it a rule.
    many = np.bincount(rollout, usable & (lost > CLIPPED)) >= SEVERAL
    high = mean > CLIPPED
    lasting = high & (np.r_[high[1:], False] | np.r_[False, high[:-1]])
    inside = flat & _allowed(s)
    with np.errstate(divide="ignore", invalid="ignore"):
        tight = tokens.sums(called, inside) / tokens.sums(called)
    # Not where tokens are left out of the loss from the start, at a ratio of 1.
    at_once = (
        bool(np.nanmedian(np.where(again, np.nan, lost)) > WITHIN / 4) if (~again & np.isfinite(lost)).any() else True
    )
    begins = first((lasting | many)[rollout] & usable & (lost > 0.8 * CLIPPED))
    others = None if at_once else first(usable & (tight > WITHIN))
    at = min((one for one in (begins, others) if one is not None), default=None)
    if at is None:
        return []
    proof = [
        s.evidence("d1", at, lost[at], 0.0, "of the gradient that advantages call for is clipped", "tokens"),
        s.evidence("d1", at, mean[rollout[at]], None, "the same, over the updates on this rollout", "tokens"),
    ]
    hint = ""
    if tight[at] > WITHIN:
        hint = f" {tight[at] / lost[at]:.0%} of it at ratios within the declared bounds: those in use are tighter."
        proof.append(
            s.evidence("ratio", at, tight[at], 0.0, "is clipped at ratios within the declared bounds", "tokens")
        )
    sentence = (
        f"From update {s.steps[at]} on, {mean[rollout[at]]:.0%} of the gradient that the rollout's advantages call for "
        f"is clipped away: the updates are made of the rest.{hint}"
    )
    chosen = flat & (tokens.update == at)
    # What is within the bounds in use is a choice of them; a clip that takes other tokens is a mistake.
    sure = 0.9 if tight[at] > WITHIN else 0.6
    return [make(s, "clip-saturation", at, sure, sentence, proof, share=0.0, chosen=chosen)]


def _allowed(s: Signals) -> np.ndarray:
    """(M,) bool: whether the declared objective would not clip that ratio; nowhere where its bounds are not known."""
    ratio = s.token("ratio")
    low, high = s.options.get("clip_low"), s.options.get("clip_high")
    assert ratio is not None
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return np.zeros(len(ratio), dtype=bool)
    return (ratio > 1 - 0.9 * low) & (ratio < 1 + 0.9 * high)


def _clipped_log(s: Signals) -> list[Finding]:
    share = s.get("clip_share")
    if share is None:
        return []
    at = first(share > CLIPPED)
    if at is None:
        return []
    proof = [s.evidence("clip_share", at, share[at], 0.0, "of the tokens are clipped")]
    return [
        make(
            s, "clip-saturation", at, 0.8, f"At update {s.steps[at]}, {share[at]:.0%} of the tokens are clipped.", proof
        )
    ]
