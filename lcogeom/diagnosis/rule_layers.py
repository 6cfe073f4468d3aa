"""Rules about layers: whose weights or gradient were multiplied, and where the gradient grows on its way back."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from lcogeom.diagnosis.baseline import SURE, ahead, first, longest_from, usual
from lcogeom.diagnosis.finding import Finding
from lcogeom.diagnosis.making import make, number
from lcogeom.diagnosis.rule_policy import is_output
from lcogeom.diagnosis.signals import Signals

GROWN = math.log(10.0)
"""Of a layer's gradient against the logits': it varies by a factor of three from batch to batch where terms cancel."""
OWN = math.log(1.3)
"""Of a layer's gradient against the others' between the backward pass and the step, where clipping leaves rounding."""
REPLACED = 0.02
"""Of a layer's weights, between two steps."""


def layer_amplification(s: Signals) -> list[Finding]:
    """One layer's weights or gradient were multiplied, or the gradient grows on its way back from some layer on."""
    found = [
        one
        for rule in (_weights_changed, _keeps_changing, _gradient_changed, _vanishes, _grows_backwards)
        for one in rule(s)
    ]
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
    return [make(s, "layer-amplification", at, 0.95, sentence, proof, where=name, between=True)]


def _keeps_changing(s: Signals) -> list[Finding]:
    """One layer's weights, and no other's, change between steps again and again; the last ones make logits drift."""
    layers = s.layers
    if layers is None or len(layers.names) < 2:
        return []
    moved = np.nan_to_num(layers.moved_between, nan=0.0)
    alone = (moved > 0).sum(1) == 1
    place = moved.argmax(1)
    same = alone & np.r_[False, alone[:-1] & (place[1:] == place[:-1])]
    at = longest_from(alone & np.r_[same[1:], False], 2)
    if at is None or is_output(layers.names[place[at]]):
        return []
    name, size = layers.names[place[at]], moved[at, place[at]] / layers.weight_norm[at, place[at]]
    proof = [s.evidence("moved_between", at, size, 0.0, f"of {name}, relative to its weights; others: 0", "norms")]
    sentence = (
        f"From update {s.steps[at]} on something other than the optimiser changes the weights of {name} after every "
        f"step, by {size:.2%} of their norm here, and no other layer's."
    )
    return [make(s, "layer-amplification", at, 0.85, sentence, proof, where=name, between=True)]


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
    at = first(off.max(1, initial=0.0) > OWN)
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


def _vanishes(s: Signals) -> list[Finding]:
    """Some layers' gradients are exactly zero from some update on, and others' are not."""
    layers = s.layers
    if layers is None:
        return []
    there = layers.received > 0
    gone = (layers.received == 0) & there.any(1, keepdims=True) & (np.cumsum(there, axis=0) >= 3)
    begins = [longest_from(column, 3) for column in gone.T]
    at = min((one for one in begins if one is not None), default=None)
    if at is None:
        return []
    places = [place for place, begin in enumerate(begins) if begin == at]
    name = layers.names[places[-1]]
    proof = [
        s.evidence("grad_norm_clipped", at, 0.0, layers.received[at - 1, places[-1]], f"gradient of {name}", "norms")
    ]
    sentence = (
        f"From update {s.steps[at]} on the gradient of {name} is exactly zero, and those of other layers are not: "
        "something multiplies it by zero, or cuts it off, on its way from the logits to the optimiser"
        + (f"; {len(places) - 1} more layers are cut off with it." if len(places) > 1 else ".")
    )
    return [make(s, "layer-amplification", at, 0.8, sentence, proof, where=name)]


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
    at = first((ahead(clear, 3) == 1) & (np.arange(s.size) <= s.size - 3))
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
