"""Rules about the step: the learning rate, the optimiser's state, the weights' format."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import pandas as pd

from lcogeom.diagnosis.baseline import SURE, Usual, ahead, first, usual
from lcogeom.diagnosis.finding import Finding
from lcogeom.diagnosis.making import make, number
from lcogeom.diagnosis.signals import Signals

RATE = math.log(3.0)
"""Of the learning rate against its median: a linear warm-up comes to twice that."""
JUMP = math.log(4.0)
"""Of a norm against its baseline: batches differ by a factor of two or three, and healthy runs were seen to do so."""
LAGS = math.log(2.5)
"""Of a step per learning rate, beyond what its gradient did: healthy runs come to 1.6 above and 2.2 below."""
ROUNDING = 0.05
"""Of the weights: what changes them by more than this after a step is no rounding."""
RELATIVE = 0.02
"""Step over weights: a fiftieth of all weights rewritten at once. Fine-tuning usually moves 1e-5 to 5e-3 of them."""
ADAPTED = 0.2
"""The same of adapters (LoRA), whose weights are few and begin at zero: rates of 1e-4 to 1e-3 move them by 1 to 7 %."""
CALM = 3.0
"""Times its usual norm: what a gradient as the optimiser receives it stays below, clipped or not, but for events."""
KEPT = 0.3, 2.2
"""Of what momentum should keep of the last step, at least and at most: a new gradient that opposes it takes away 0.1 /
0.23 (Adam's weight of it over Adam's usual step) times their cosine, more where the last ones cancelled, and one along
it adds as much (0.29 to 1.6 was seen in healthy runs); the sketch errs by 0.01."""
WHOLE = 0.6, 0.85
"""Of Adam's first step: below the one in the last update, above the other in this, which momentum does not allow."""
OFTEN = 16
"""Updates: rollouts are trained on for fewer, mostly."""
UNDONE = 0.3
"""Of a step, on average over three: the noise of rounding lies across the step, and takes nothing of it back."""
HALF_SPACING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Relative rounding of a weight's sum with its step, at most."""
LASTING = 5
"""Updates in a row; schedules that end at 0 come below any spacing for the last few."""


def step_too_large(s: Signals) -> list[Finding]:
    """The learning rate jumped and the step with it, or one step rewrote a good part of the weights."""
    found = [one for rule in (_rate_jumped, _rate_only, _absolute_step) for one in rule(s)]
    return sorted(found, key=lambda finding: finding.update)[:1]


def _rates(s: Signals) -> tuple[np.ndarray, Usual] | None:
    """The learning rate, and what was usual of it: schedules move by a few per cent from one update to the next."""
    rate = s.get("learning_rate")
    return None if rate is None else (rate, usual(rate, least=1, prior=0.1))


def _rate_jumped(s: Signals) -> list[Finding]:
    step, rates = s.get("update_norm"), _rates(s)
    if step is None:
        return []
    if rates is None:
        s.lacks("step-too-large", "learning_rate", "whether the learning rate or the optimiser's state made the step")
        return []
    rate, known = rates
    last = np.r_[np.nan, rate[:-1]]
    with np.errstate(divide="ignore", invalid="ignore"):
        sudden = (np.log(rate / last) > JUMP / 2) | (known.excess > math.log(6))
    moved = usual(step)
    went = (moved.excess > LAGS) & (moved.score > SURE / 2) & (known.excess > moved.excess / 2)
    at = first(sudden & went & (known.excess > RATE))
    if at is None:
        return []
    proof = [
        s.evidence("learning_rate", at, rate[at], known.level[at], "learning rate"),
        s.evidence("update_norm", at, step[at], moved.level[at], "norm of the step"),
    ]
    sentence = (
        f"At update {s.steps[at]} the learning rate is {number(rate[at])}, {math.exp(known.excess[at]):.3g} times its "
        f"usual value, and the step is {math.exp(moved.excess[at]):.3g} times as long as before."
    )
    return [make(s, "step-too-large", at, 0.95, sentence, proof)]


def optimizer_lag(s: Signals) -> list[Finding]:
    """The optimiser's state does not fit: its steps forgot the last ones, or left proportion with rate and gradient."""
    if s.get("update_norm") is None:
        if s.table == "updates":
            s.lacks("optimizer-lag", "update_norm", "how far the weights moved; record with attach(sketch=16384)")
        return []
    found = _begun_again(s) + _momentum_kept(s) + _out_of_proportion(s)
    return sorted(found, key=lambda finding: finding.update)[:1]


def _momentum_kept(s: Signals) -> list[Finding]:
    """How much of the last step is in this one: Adam's first moment decays by beta1 a step, and no faster."""
    cosine, step, rate = s.get("step_cos_prev"), s.get("update_norm"), s.get("learning_rate")
    kept = _adam_keeps(s)
    if cosine is None or step is None or rate is None or kept is None:
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        share = cosine * (step / rate) / np.r_[np.nan, (step / rate)[:-1]] / kept
    gradient = s.get("grad_norm_clipped")
    assert gradient is not None
    # A gradient far above the last ones outweighs momentum; and of a first step alone there is little to keep.
    calm = (gradient < CALM * usual(gradient, least=1).level) & (s.steps > 1)
    at = first(calm & ((share < KEPT[0]) | (share > KEPT[1])))
    if at is None:
        return []
    proof = [
        s.evidence("step_cos_prev", at, share[at], 1.0, "of the last step is kept, of what Adam's momentum keeps"),
        s.evidence("update_norm", at, step[at], usual(step).level[at], "norm of the step"),
    ]
    sentence = (
        f"At update {s.steps[at]} the step keeps {share[at]:.0%} of what Adam's momentum keeps of the last one: the "
        "optimiser's state was lost, replaced or scaled."
    )
    return [make(s, "optimizer-lag", at, 0.9, sentence, proof)]


def _begun_again(s: Signals) -> list[Finding]:
    """Adam's first step moves every weight by the learning rate, further than any later one: another so long."""
    step, rate, gradient = s.get("update_norm"), s.get("learning_rate"), s.get("grad_norm_clipped")
    if step is None or rate is None or gradient is None or _betas(s) is None or s.steps[0] != 0 or not rate[0] > 0:
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        share = step / rate / (step[0] / rate[0])
    calm = gradient < CALM * usual(gradient, least=1).level
    at = first(calm & (share > WHOLE[1]) & (np.r_[np.nan, share[:-1]] < WHOLE[0]))
    if at is None:
        return []
    proof = [
        s.evidence(
            "update_norm", at, share[at], share[at - 1], "step per learning rate, of the run's first; and before"
        ),
        s.evidence("learning_rate", at, rate[at], rate[at - 1], "learning rate"),
    ]
    sentence = (
        f"At update {s.steps[at]} the step per learning rate is {share[at]:.0%} of the run's first one, after "
        f"{share[at - 1]:.0%}, and the gradient is as usual: Adam began again, or its moments are not of these weights."
    )
    return [make(s, "optimizer-lag", at, 0.85, sentence, proof)]


def _adam_keeps(s: Signals) -> np.ndarray | None:
    """(U,): what is left of Adam's last step in the next, per unit of learning rate, apart from the new gradient.

    b1 (1 - b1^(t-1)) / (1 - b1^t) by the bias-corrected first moment, and sqrt(v_t-1 / v_t) by the second, which is
    followed with the gradient's norm.
    """
    betas = _betas(s)
    gradient = s.get("grad_norm_clipped")
    if betas is None or gradient is None or s.steps[0] != 0:
        return None
    first_beta, second_beta = betas
    made = s.steps + 1.0
    squares = np.square(np.nan_to_num(gradient, nan=0.0, posinf=0.0))
    second = np.empty(s.size)
    moment = 0.0
    for place, square in enumerate(squares):
        moment = second_beta * moment + (1 - second_beta) * square
        second[place] = moment / (1 - second_beta ** made[place])
    with np.errstate(divide="ignore", invalid="ignore"):
        slower = np.sqrt(np.r_[np.nan, second[:-1]] / second)
    return first_beta * (1 - first_beta ** (made - 1)) / (1 - first_beta**made) * slower


def _betas(s: Signals) -> tuple[float, float] | None:
    """Adam's decay rates, from run.json; None for another optimiser."""
    options = s.meta.get("optimizer_options")
    betas = str(options.get("betas")) if isinstance(options, Mapping) else ""
    found = [float(one) for one in re.findall(r"[0-9.]+(?:e-?[0-9]+)?", betas)]
    if "adam" not in str(s.meta.get("optimizer", "")).lower() or len(found) != 2:
        return None
    return (found[0], found[1]) if 0.5 < found[0] < 1 and 0.5 < found[1] < 1 else None


def _out_of_proportion(s: Signals) -> list[Finding]:
    step, gradient, rates = s.get("update_norm"), s.get("grad_norm_clipped"), _rates(s)
    assert step is not None
    gradient = s.gradient if gradient is None else gradient
    grew = np.zeros(s.size) if gradient is None else np.nan_to_num(usual(gradient).excess, nan=0.0)
    per_rate = step
    if rates is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            per_rate = np.where(rates[0] > 0, step / rates[0], np.nan)
    lag = usual(per_rate)
    # A gradient that jumped takes Adam further too, by less than it jumped itself.
    up = (lag.excess > LAGS) & (lag.score > SURE / 2) & (lag.excess > np.maximum(grew, 0) + LAGS)
    there = np.ones(s.size, dtype=bool) if gradient is None else gradient > 0
    quiet = pd.Series(~there).rolling(20, min_periods=1).max().to_numpy() > 0  # momentum dies out without gradients
    down = (lag.excess < -LAGS) & (lag.score < -SURE / 2) & (lag.excess < np.minimum(grew, 0) - LAGS) & ~quiet
    at = first(up | down)
    if at is None:
        return []
    if rates is None:
        s.lacks("optimizer-lag", "learning_rate", "whether the learning rate or the optimiser's state made the step")
    proof = [
        s.evidence("update_norm", at, step[at], usual(step).level[at], "norm of the step"),
        s.evidence("grad_norm_clipped", at, math.exp(grew[at]), 1.0, "times its usual norm, the gradient"),
    ]
    sentence = (
        f"At update {s.steps[at]} the step is {math.exp(lag.excess[at]):.3g} times as long as usual at its learning "
        f"rate, though the gradient is {math.exp(grew[at]):.3g} times its usual size: the optimiser's state does not "
        "fit it."
    )
    return [make(s, "optimizer-lag", at, 0.85 if rates is not None else 0.5, sentence, proof)]


def _rate_only(s: Signals) -> list[Finding]:
    rates = _rates(s)
    if rates is None or s.get("update_norm") is not None:
        return []
    rate, known = rates
    gradient = s.gradient
    grew = usual(gradient).excess if gradient is not None else np.zeros(s.size)
    after = np.r_[grew[1:], np.nan]
    at = first((known.excess > JUMP) & (known.score > SURE) & (np.fmax(grew, after) > math.log(2)))
    if at is None:
        return []
    proof = [s.evidence("learning_rate", at, rate[at], known.level[at], "learning rate")]
    sentence = (
        f"At update {s.steps[at]} the learning rate is {number(rate[at])}, {math.exp(known.excess[at]):.3g} times its "
        "usual value, and the gradient grows after it."
    )
    return [make(s, "step-too-large", at, 0.75, sentence, proof)]


def _absolute_step(s: Signals) -> list[Finding]:
    step, weights = s.get("update_norm"), s.get("weight_norm")
    if step is None or weights is None:
        return []
    relative = step / np.where(weights > 0, weights, np.nan)
    at = first(relative > (ADAPTED if "Peft" in str(s.meta.get("model")) else RELATIVE))
    if at is None:
        return []
    proof = [s.evidence("update_norm", at, step[at], weights[at], "norm of the step, beside that of the weights")]
    sentence = (
        f"At update {s.steps[at]} one step moves the weights by {relative[at]:.0%} of their norm: what the gradient "
        "said does not hold so far away."
    )
    return [make(s, "step-too-large", at, 0.9, sentence, proof)]


def precision_loss(s: Signals) -> list[Finding]:
    """Steps that the weights' format does not hold: taken back by rounding, or below its spacing."""
    found = [one for rule in (_taken_back, _below_spacing) for one in rule(s)]
    return sorted(found, key=lambda finding: finding.update)[:1]


def _taken_back(s: Signals) -> list[Finding]:
    """Something changes the weights after every step, by less than their rounding, and takes the step back."""
    between, undone, weights = s.get("moved_between"), s.get("step_undone"), s.get("weight_norm")
    if between is None or undone is None or weights is None:
        return []
    # After every step, or before every rollout of a few.
    moved = np.flatnonzero(between > 0)
    moved = moved[np.diff(moved, append=moved[-1:] + 1) <= OFTEN]
    small = between[moved] < ROUNDING * weights[moved]
    lost = np.clip(np.nan_to_num(undone[moved], nan=0.0), 0.0, 1.0)
    begin = first(small & (ahead(lost, 3) > UNDONE) & (ahead(small.astype(float), 3) == 1)) if len(moved) >= 3 else None
    if begin is None:
        return []
    at, share = int(moved[begin]), float(ahead(lost, 3)[begin])
    proof = [
        s.evidence("moved_between", at, between[at], 0.0, "norm of what changed the weights after the last step"),
        s.evidence("step_undone", at, share, 0.0, "of the last step is taken back, here and in the next updates"),
    ]
    sentence = (
        f"From update {s.steps[at]} on the weights are changed after each step, which takes {share:.0%} of it back: "
        "they are rounded to a format that does not hold steps of this size."
    )
    return [make(s, "precision-loss", at, 0.9, sentence, proof)]


def _below_spacing(s: Signals) -> list[Finding]:
    """Steps below half the spacing of the weights' format, on average; or no step at all.

    Not where a schedule has come there little by little: its last steps are meant to be nothing.
    """
    step, weights, rate = s.get("update_norm"), s.get("weight_norm"), s.get("learning_rate")
    gradient = s.get("grad_norm_clipped")
    if step is None or gradient is None:
        return []
    moving = (gradient > 0) & (np.ones(s.size, dtype=bool) if rate is None else rate > 0)
    still = (step == 0) & moving
    stored = s.meta.get("weights")
    formats = {str(name): float(count) for name, count in stored.items()} if isinstance(stored, Mapping) else {}
    known = [name for name in HALF_SPACING if formats.get(name, 0.0) > 0.5 * sum(formats.values())]
    named = known[0] if known else "float32"
    limit = HALF_SPACING[named]
    relative = np.zeros(s.size) if weights is None else step / np.where(weights > 0, weights, np.nan)
    if known and weights is not None:
        still |= moving & (relative < limit)
    at = _begins(still, rate)
    if at is None:
        return []
    proof = [s.evidence("update_norm", at, relative[at], limit, "step over weights, beside half their spacing")]
    if known:
        proof.append(s.evidence("weights", None, named, None, "the weights' format", "run.json"))
    sentence = (
        f"From update {s.steps[at]} on the step is {number(relative[at])} of the weights, below what {named} can add "
        f"to a number ({number(limit)}): most weights do not change."
    )
    return [make(s, "precision-loss", at, 0.85, sentence, proof)]


def _begins(still: np.ndarray, rate: np.ndarray | None) -> int | None:
    """Where a lasting stretch begins that no schedule has led to."""
    begins = np.flatnonzero(still & ~np.r_[False, still[:-1]])
    for at in begins:
        stop = at + int(np.argmin(np.r_[still[at:], False]))
        warmed_up = rate is not None and stop < len(still) and rate[stop] > 2 * rate[at]
        if warmed_up or (stop - at < LASTING and stop < len(still)):
            continue
        if rate is None or at == 0 or not rate[at] < rate[at - 1] or rate[at] < rate[at - 1] / 2:
            return int(at)
    return None
