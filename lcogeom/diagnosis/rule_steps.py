"""Rules about the way from the logits' gradient to the weights' step: layers, the optimiser, the learning rate."""

from __future__ import annotations

import math

import numpy as np

from lcogeom.diagnosis.baseline import Usual, first, usual
from lcogeom.diagnosis.finding import Finding
from lcogeom.diagnosis.making import make, number
from lcogeom.diagnosis.signals import Signals

JUMP = math.log(4.0)
"""Of a norm against its baseline: batches differ by a factor of two or three, and healthy runs were seen to do so."""
SURE = 5.0
"""In units of the baseline's scatter: of 10,000 updates of a normal number, 0.006 lie beyond."""
RELATIVE = 0.05
"""Step over weights: a twentieth of all weights rewritten at once. Usual steps are 1e-5 to 1e-2 of them."""
HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Relative rounding of a weight's sum with its step, at most (half a spacing)."""


def layer_amplification(s: Signals) -> list[Finding]:
    """Some layers' gradients grew against the logits' gradient, others' did not: where the growth begins."""
    layers, gradient = s.layers, s.logit_gradient
    if layers is None or len(layers.names) < 3:
        return []
    base = gradient
    if base is None:
        s.lacks("layer-amplification", "logit_grad_norm", "where on the way back the gradient grew", "updates")
        base = np.nanmedian(layers.grad_norm, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        per_logit = layers.grad_norm / np.where(base > 0, base, np.nan)[:, None]
    excess, score = np.full(per_logit.shape, np.nan), np.full(per_logit.shape, np.nan)
    for column in range(per_logit.shape[1]):
        known = usual(per_logit[:, column])
        excess[:, column], score[:, column] = known.excess, known.score
    with np.errstate(invalid="ignore"):
        most, least = _extreme(excess, np.nanmax), _extreme(excess, np.nanmin)
        at = first((most > JUMP) & (most - least > JUMP) & (_extreme(score, np.nanmax) > SURE))
    if at is None:
        return []
    row = excess[at]
    grown = row > most[at] - (most[at] - least[at]) / 2
    # On the way back, the last layer comes first: the growth begins at the one nearest to the output.
    place = int(np.flatnonzero(grown)[-1])
    weights = np.array([usual(layers.weight_norm[:, c], least=1, prior=0.02).excess[at] for c in range(len(row))])
    swollen = np.nan_to_num(weights, nan=0.0)
    if np.abs(swollen).max() > math.log(1.2):  # its weights were changed: that is the layer
        place = int(np.abs(swollen).argmax())
    name = layers.names[place]
    own = layers.grad_norm[at, int(np.nanargmax(row))]
    proof = [
        s.evidence(
            "grad_norm", at, own, own / math.exp(most[at]), f"of {layers.names[int(np.nanargmax(row))]}", "norms"
        ),
        s.evidence(
            "grad_norm", at, math.exp(most[at] - least[at]), 1.0, "growth, most against least grown layer", "norms"
        ),
    ]
    if gradient is not None:
        proof.append(s.evidence("logit_grad_norm", at, gradient[at], usual(gradient).level[at], "at the logits"))
    sentence = (
        f"At update {s.steps[at]} the gradient grows {math.exp(most[at]):.3g} times on its way back from the logits, "
        f"beginning at {name}; the least changed layer sees {math.exp(least[at]):.3g} times its usual gradient."
    )
    return [make(s, "layer-amplification", at, 0.9, sentence, proof, where=name)]


def _extreme(values: np.ndarray, function: object) -> np.ndarray:
    filled = np.where(np.isnan(values).all(1, keepdims=True), -np.inf, values)
    return function(filled, axis=1)  # type: ignore[operator, no-any-return]


def step_rules(s: Signals) -> list[Finding]:
    """step-too-large and optimizer-lag: steps out of proportion, told apart by learning rate and gradient."""
    return _jumped_step(s) + _absolute_step(s)


def _rates(s: Signals) -> tuple[np.ndarray, Usual] | None:
    rate = s.get("learning_rate")
    return None if rate is None else (rate, usual(rate, least=1, prior=0.1))


def _jumped_step(s: Signals) -> list[Finding]:
    step, gradient = s.get("update_norm"), s.get("grad_norm_clipped")
    if step is None:
        if s.table == "updates":
            s.lacks("optimizer-lag", "update_norm", "how far the weights moved; record with attach(sketch=16384)")
        return _rate_only(s)
    gradient = s.gradient if gradient is None else gradient
    grew = usual(gradient).excess if gradient is not None else np.zeros(s.size)
    grew = np.nan_to_num(grew, nan=0.0)
    rates = _rates(s)
    found: list[Finding] = []
    rate_excess = np.zeros(s.size)
    if rates is not None:
        rate_excess = np.nan_to_num(rates[1].excess, nan=0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            per_rate = np.where(rates[0] > 0, step / rates[0], np.nan)
    else:
        s.lacks("step-too-large", "learning_rate", "whether the learning rate or the optimiser's state made the step")
        per_rate = step
    moved = usual(step)
    by_rate = (moved.excess > JUMP) & (moved.score > SURE) & (rate_excess > moved.excess / 2)
    at = first(by_rate)
    if at is not None and rates is not None:
        rate = rates[0]
        proof = [
            s.evidence("learning_rate", at, rate[at], rates[1].level[at], "learning rate"),
            s.evidence("update_norm", at, step[at], moved.level[at], "norm of the step"),
        ]
        sentence = (
            f"At update {s.steps[at]} the learning rate is {number(rate[at])}, {math.exp(rate_excess[at]):.3g} times its "
            f"usual value, and the step {math.exp(moved.excess[at]):.3g} times as long as before."
        )
        found.append(make(s, "step-too-large", at, 0.95, sentence, proof))
    lag = usual(per_rate)
    # A gradient that jumped makes Adam step further too, up to (1 - b1) / sqrt(1 - b2) times: that is not the optimiser's
    # doing. So the step must grow by more than the gradient did.
    up = (lag.excess > JUMP) & (lag.score > SURE) & (lag.excess > grew + JUMP / 2)
    there = gradient > 0 if gradient is not None else np.ones(s.size, dtype=bool)
    down = (lag.excess < -JUMP) & (lag.score < -SURE) & (lag.excess < grew - JUMP / 2) & there
    at = first(up | down)
    if at is not None:
        factor = math.exp(lag.excess[at])
        proof = [
            s.evidence("update_norm", at, step[at], moved.level[at], "norm of the step"),
            s.evidence("grad_norm_clipped", at, math.exp(grew[at]), 1.0, "times its usual norm, the gradient"),
        ]
        sentence = (
            f"At update {s.steps[at]} the step is {factor:.3g} times as long as before for its learning rate, though "
            f"the gradient is {math.exp(grew[at]):.3g} times its usual size: the optimiser's state does not fit it."
        )
        found.append(make(s, "optimizer-lag", at, 0.85 if rates is not None else 0.6, sentence, proof))
    return found


def _rate_only(s: Signals) -> list[Finding]:
    rates = _rates(s)
    if rates is None:
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
        f"At update {s.steps[at]} one step moves the weights by {relative[at]:.0%} of their norm: what the gradient said "
        "does not hold so far away."
    )
    return [make(s, "step-too-large", at, 0.9, sentence, proof)]


def precision_loss(s: Signals) -> list[Finding]:
    """Steps smaller than the rounding of half-precision weights, or no step at all from a gradient."""
    step, weights, gradient = s.get("update_norm"), s.get("weight_norm"), s.get("grad_norm_clipped")
    rate = s.get("learning_rate")
    if step is None:
        return []
    stored = s.meta.get("weights")
    formats = {str(k): float(v) for k, v in stored.items()} if isinstance(stored, dict) else {}
    worst = max((name for name in formats if name in HALF), key=lambda name: formats[name], default=None)
    still = np.zeros(s.size, dtype=bool)
    if gradient is not None and rate is not None:
        still = (step == 0) & (gradient > 0) & (rate > 0)
    if worst is not None and weights is not None and formats[worst] > 0.5 * sum(formats.values()):
        still |= (
            (step > 0)
            & (step / np.where(weights > 0, weights, np.nan) < HALF[worst])
            & (True if rate is None else rate > 0)
        )
    at = first(still)
    if at is None:
        return []
    relative = step[at] / weights[at] if weights is not None else 0.0
    limit = HALF.get(worst or "", 2.0**-24)
    proof = [s.evidence("update_norm", at, relative, limit, "step over weights, beside half their spacing")]
    if worst is not None:
        proof.append(s.evidence("weights", None, worst, "float32", "the weights' format", "run.json"))
    sentence = (
        f"From update {s.steps[at]} on the step is {number(relative)} of the weights, below what {worst or 'their format'} "
        f"can add to a number ({number(limit)}): most weights do not change."
    )
    return [make(s, "precision-loss", at, 0.85, sentence, proof)]
