"""Rules about the way from the logits' gradient to the weights' step: layers, the optimiser, the learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from lcogeom.diagnosis.baseline import Usual, first, usual
from lcogeom.diagnosis.finding import Finding
from lcogeom.diagnosis.making import make, number
from lcogeom.diagnosis.signals import Signals

JUMP = math.log(4.0)
"""Of a norm against its baseline: batches differ by a factor of two or three, and healthy runs were seen to do so."""
SURE = 5.0
"""In units of the baseline's scatter: of 10,000 updates of a normal number, 0.006 lie beyond."""
GROWN = math.log(10.0)
"""Of a layer's gradient against the logits': it varies by a factor of three from batch to batch where terms cancel."""
REPLACED = 0.05
"""Of a layer's weights, between two steps."""
RELATIVE = 0.05
"""Step over weights: a twentieth of all weights rewritten at once. Usual steps are 1e-5 to 1e-2 of them."""
CALM = 3.0
"""Times its usual norm: what a gradient as the optimiser receives it stays below, clipped or not, but for events."""
KEPT = 0.35
"""Of what momentum should keep of the last step: a new gradient that opposes it takes away 0.1 / 0.23 (Adam's weight of
it over Adam's usual step) times their cosine, which is seldom below -0.5, and the sketch errs by 0.01."""
UNDONE = 0.3
"""Of a step, on average over three: the noise of rounding lies across the step, and takes nothing of it back."""
HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Relative rounding of a weight's sum with its step, at most (half a spacing)."""


def layer_amplification(s: Signals) -> list[Finding]:
    """One layer's weights or gradient were multiplied, or the gradient grows on its way back from some layer on."""
    found = [one for rule in (_weights_changed, _gradient_changed, _grows_backwards) for one in rule(s)]
    return sorted(found, key=lambda finding: finding.update)[:1]


def _weights_changed(s: Signals) -> list[Finding]:
    """A layer's weights moved between two steps: no optimiser did that."""
    layers = s.layers
    if layers is None:
        return []
    moved = layers.moved_between / layers.weight_norm
    # Without that column: by the triangle inequality a norm changes by no more than the step, apart from sketching.
    change = np.abs(np.diff(layers.weight_norm, axis=0, prepend=np.nan))
    step = np.r_[np.full((1, len(layers.names)), np.nan), layers.update_norm[:-1]]
    beyond = np.where(change > 2 * step, change, 0.0) / layers.weight_norm
    moved = np.where(np.isnan(moved), beyond, moved)
    moved = np.nan_to_num(moved, nan=0.0)
    # What changes again and again is no replaced weight: a drift, or rounding.
    again = pd.DataFrame(moved > 0).rolling(3).sum().to_numpy()[2:] == 3
    once = np.r_[~again, np.ones((min(2, len(moved)), len(layers.names)), dtype=bool)]
    at = first(np.where(once, moved, 0.0).max(1, initial=0.0) > REPLACED)
    if at is None:
        return []
    place = int(moved[at].argmax())
    name, before, after = layers.names[place], layers.weight_norm[max(at - 1, 0), place], layers.weight_norm[at, place]
    proof = [
        s.evidence("moved_between", at, moved[at, place], 0.0, f"of {name}, relative to its weights", "norms"),
        s.evidence("weight_norm", at, after, before, f"norm of the weights of {name}", "norms"),
    ]
    sentence = (
        f"Before update {s.steps[at]} the weights of {name} were changed by {moved[at, place]:.0%} of their norm (from "
        f"{number(before)} to {number(after)}), and not by the optimiser: what passes through that layer is multiplied."
    )
    return [make(s, "layer-amplification", at, 0.95, sentence, proof, where=name)]


def _gradient_changed(s: Signals) -> list[Finding]:
    """Clipping multiplies all layers' gradients by one factor: a layer that gets another was changed on its own."""
    layers = s.layers
    if layers is None or len(layers.names) < 2:
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.log(layers.received / layers.grad_norm)
    factor[~np.isfinite(factor)] = np.nan
    with np.errstate(invalid="ignore"):
        own = factor - _middle(factor)[:, None]
    before = pd.DataFrame(own).shift(1).expanding().median().to_numpy()  # a loop may clip layer by layer, always
    off = np.abs(np.nan_to_num(own - before, nan=0.0))
    at = first(off.max(1, initial=0.0) > math.log(2))
    if at is None:
        # From the first update on; clipping layer by layer never makes a gradient larger.
        at = first(np.nanmax(np.where(np.isfinite(factor), factor, -1.0), axis=1, initial=-1.0) > math.log(2))
        if at is None or np.nanmin(factor[at]) > math.log(2) / 2:
            return []
        off = np.where(np.isfinite(factor), factor, 0.0)
    place = int(off[at].argmax())
    name, times = layers.names[place], math.exp(off[at, place])
    proof = [
        s.evidence("grad_norm", at, layers.grad_norm[at, place], None, f"of {name}, after the backward pass", "norms"),
        s.evidence("grad_norm_clipped", at, layers.received[at, place], None, f"of {name}, at the optimiser", "norms"),
    ]
    sentence = (
        f"At update {s.steps[at]} the gradient of {name} is multiplied by {times:.3g} against the other layers' "
        "between the backward pass and the optimiser, which clipping does not do."
    )
    return [make(s, "layer-amplification", at, 0.95, sentence, proof, where=name)]


def _middle(values: np.ndarray) -> np.ndarray:
    """(U,): medians over the layers that are known."""
    known = np.isfinite(values).any(1)
    found = np.full(len(values), np.nan)
    found[known] = np.nanmedian(values[known], axis=1)
    return found


def _grows_backwards(s: Signals) -> list[Finding]:
    """Some layers' gradients grew against the logits' gradient, others' did not: where the growth begins."""
    layers, gradient = s.layers, s.logit_gradient
    if layers is None or len(layers.names) < 3:
        return []
    if gradient is None:
        s.lacks("layer-amplification", "logit_grad_norm", "whether the gradient grew on its way back from the logits")
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        per_logit = layers.grad_norm / np.where(gradient > 0, gradient, np.nan)[:, None]
    excess, score = np.full(per_logit.shape, np.nan), np.full(per_logit.shape, np.nan)
    for column in range(per_logit.shape[1]):
        known = usual(per_logit[:, column])
        excess[:, column], score[:, column] = known.excess, known.score
    most, least, sure = _extreme(excess, np.nanmax), _extreme(excess, np.nanmin), _extreme(score, np.nanmax)
    # Where terms cancel, a single batch brings it too; what a layer does, it does in the next updates as well.
    clear = ((most > GROWN) & (most - least > GROWN) & (sure > SURE)).astype(float)
    at = first((_ahead(clear, 3) == 1) & (np.arange(s.size) <= s.size - 3))
    if at is None:
        return []
    row = excess[at]
    # On the way back the last layer comes first: the growth begins at the one nearest to the output.
    place = int(np.flatnonzero(row > (most[at] + least[at]) / 2)[-1])
    name, own = layers.names[place], layers.grad_norm[at, place]
    proof = [
        s.evidence("grad_norm", at, own, own / math.exp(row[place]), f"gradient of {name}", "norms"),
        s.evidence("logit_grad_norm", at, gradient[at], usual(gradient).level[at], "gradient at the logits"),
        s.evidence("grad_norm", at, math.exp(most[at]), math.exp(least[at]), "growth, most and least", "norms"),
    ]
    sentence = (
        f"At update {s.steps[at]} the gradient grows {math.exp(most[at]):.3g} times as much as usual on its way back "
        f"from the logits, beginning at {name}; the layer that changed least sees {math.exp(least[at]):.3g} times its "
        "usual one."
    )
    return [make(s, "layer-amplification", at, 0.8, sentence, proof, where=name)]


def _extreme(values: np.ndarray, function: Callable[..., np.ndarray]) -> np.ndarray:
    """(U,): over the layers; 0 where none is known."""
    return function(np.where(np.isnan(values).all(1, keepdims=True), 0.0, values), axis=1)


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
    # Against the last update: a warm-up leads far from the median of all before, but slowly.
    last = np.r_[np.nan, rate[:-1]]
    with np.errstate(divide="ignore", invalid="ignore"):
        sudden = np.log(rate / last) > JUMP / 2
    moved = usual(step)
    at = first(sudden & (moved.excess > JUMP) & (moved.score > SURE) & (known.excess > moved.excess / 2))
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
    found = _momentum_kept(s) + _out_of_proportion(s)
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
    at = first(calm & ((share < KEPT) | (share > 1 / KEPT)))
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
    up = (lag.excess > JUMP) & (lag.score > SURE) & (lag.excess > np.maximum(grew, 0) + JUMP / 2)
    there = np.ones(s.size, dtype=bool) if gradient is None else gradient > 0
    quiet = pd.Series(~there).rolling(20, min_periods=1).max().to_numpy() > 0  # momentum dies out without gradients
    down = (lag.excess < -JUMP) & (lag.score < -SURE) & (lag.excess < np.minimum(grew, 0) - JUMP / 2) & ~quiet
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
    at = first(relative > RELATIVE)
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
    small = (between > 0) & (between < REPLACED * weights)
    lost = np.where(np.isfinite(undone), np.clip(undone, 0.0, 1.0), 0.0)
    at = first(small & (_ahead(lost, 3) > UNDONE) & (_ahead(small.astype(float), 3) == 1))
    if at is None:
        return []
    share = float(_ahead(lost, 3)[at])
    proof = [
        s.evidence("moved_between", at, between[at], 0.0, "norm of what changed the weights after the last step"),
        s.evidence("step_undone", at, share, 0.0, "of the last step is taken back, here and in the next updates"),
    ]
    sentence = (
        f"From update {s.steps[at]} on the weights are changed after each step, which takes {share:.0%} of it back: "
        "they are rounded to a format that does not hold steps of this size."
    )
    return [make(s, "precision-loss", at, 0.9, sentence, proof)]


def _ahead(values: np.ndarray, length: int) -> np.ndarray:
    """(U,): means over an update and those after it, `length` together, fewer at the end."""
    return pd.Series(values[::-1]).rolling(length, min_periods=1).mean().to_numpy()[::-1]


def _below_spacing(s: Signals) -> list[Finding]:
    """Steps of half-precision weights below half their spacing, on average; or no step at all."""
    step, weights, rate = s.get("update_norm"), s.get("weight_norm"), s.get("learning_rate")
    gradient = s.get("grad_norm_clipped")
    if step is None or gradient is None:
        return []
    moving = (gradient > 0) & (np.ones(s.size, dtype=bool) if rate is None else rate > 0)
    still = (step == 0) & moving
    stored = s.meta.get("weights")
    formats = {str(name): float(count) for name, count in stored.items()} if isinstance(stored, Mapping) else {}
    half = [name for name in HALF if formats.get(name, 0.0) > 0.5 * sum(formats.values())]
    limit = HALF[half[0]] if half else 2.0**-24
    relative = np.zeros(s.size) if weights is None else step / np.where(weights > 0, weights, np.nan)
    if half:
        still |= moving & (relative < limit)
    at = first(still)
    if at is None:
        return []
    proof = [s.evidence("update_norm", at, relative[at], limit, "step over weights, beside half their spacing")]
    named = half[0] if half else "their format"
    if half:
        proof.append(s.evidence("weights", None, named, "float32", "the weights' format", "run.json"))
    sentence = (
        f"From update {s.steps[at]} on the step is {number(relative[at])} of the weights, below what {named} can add "
        f"to a number ({number(limit)}): most weights do not change."
    )
    return [make(s, "precision-loss", at, 0.85, sentence, proof)]
