"""The rule about the loss's scale: its normaliser, or a factor of its gradient on the way to the optimiser."""

from __future__ import annotations

import math

import numpy as np

from lcogeom.diagnosis.baseline import SURE, ahead, first, usual
from lcogeom.diagnosis.finding import Finding
from lcogeom.diagnosis.making import make, number
from lcogeom.diagnosis.rule_policy import pushed_alike
from lcogeom.diagnosis.rule_weights import dominant_sequence
from lcogeom.diagnosis.signals import Signals

EXACT = 0.05
"""Scatter in log units assumed of the loss's normaliser: without a fault it only follows the number of tokens."""
FEW = 0.3
"""Of the tokens with an advantage: so many weights must be known."""
SCALE = math.log(1.5)
"""A smaller change of the normaliser is what a few tokens more or less bring."""
WHOLE = math.log(4.0)
"""Of every layer's gradient against the logits': batches whose tokens cancel less bring a factor of three or four."""
ALIKE = 0.02
"""Scatter in log units of one factor over the layers: a multiplication leaves rounding, bf16's at most."""


def loss_scale_jump(s: Signals) -> list[Finding]:
    """The weight of the tokens changed by one factor that their number does not explain."""
    exact = s.loss_weights
    found = _scale_of_log(s) if exact is None or s.tokens is None else _scale_of_weights(s, exact)
    for rule in (_scale_of_backward, _within_backward, _after_backward):
        found += rule(s)
    return sorted(found, key=lambda finding: finding.update)[:1]


def _scale_of_backward(s: Signals) -> list[Finding]:
    """What the loss is multiplied by on its way to the backward pass changed, and the gradient went along."""
    factor, gradient, logits = s.get("loss_factor"), s.gradient, s.logit_gradient
    if factor is None or gradient is None or logits is None:
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        per_logit = usual(gradient / logits, least=1)
        doublings = np.log2(factor / np.r_[np.nan, factor[:-1]])
    # A dynamic fp16 scale is halved until nothing overflows, and doubled once in a while.
    dynamic = (np.abs(doublings - np.round(doublings)) < 1e-6) & (doublings < 1.5) & (np.fmax(factor, 1) > 1)
    known = usual(factor, least=1, prior=EXACT)
    jumped = (np.abs(known.excess) > SCALE) & (np.abs(doublings) > SCALE / math.log(2)) & ~dynamic
    went = np.abs(per_logit.excess - known.excess) < np.fmax(np.abs(known.excess) / 2, 2 * per_logit.scatter)
    at = first(jumped & went)
    if at is None:
        return []
    proof = [
        s.evidence("loss_factor", at, factor[at], known.level[at], "what the loss was multiplied by"),
        s.evidence("grad_norm", at, gradient[at] / logits[at], per_logit.level[at], "gradient, per gradient of logits"),
    ]
    sentence = (
        f"At update {s.steps[at]} the loss is multiplied by {number(factor[at])} before the backward pass, and by "
        f"{number(known.level[at])} before: gradients come in another unit (an fp16 scale that is not taken off, "
        "accumulation steps that are not divided by)."
    )
    return [make(s, "loss-scale-jump", at, 0.95, sentence, proof, share=1.0)]


def _within_backward(s: Signals) -> list[Finding]:
    """Every layer's gradient grew or fell by one factor against the logits', from one update to the next, and stays."""
    layers, logits = s.layers, s.logit_gradient
    if layers is None or logits is None or len(layers.names) < 2:
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        per_logit = layers.grad_norm / np.where(logits > 0, logits, np.nan)[:, None]
    known = [usual(column) for column in per_logit.T if np.isfinite(column).any()]
    if not known:
        return []
    excess, score = np.array([one.excess for one in known]), np.array([one.score for one in known])
    for sign in (1, -1):
        least, sure = (sign * excess).min(0), (sign * score).min(0)
        there = ((least > WHOLE) & (sure > SURE / 2)).astype(
            float
        )  # of each of three; one alone would have to be surer
        sudden = ~(np.r_[np.nan, least[:-1]] > WHOLE / 2)
        at = first(sudden & (ahead(there, 3) == 1) & (np.arange(s.size) <= s.size - 3))
        if at is not None:
            break
    else:
        return []
    times = math.exp(float(np.median(excess[:, at])))
    before = usual(per_logit[:, 0]).level[at]
    proof = [
        s.evidence("grad_norm", at, per_logit[at, 0], before, f"of {layers.names[0]}, per gradient of logits", "norms"),
        s.evidence("grad_norm", at, math.exp(excess[:, at].min()), math.exp(excess[:, at].max()), "times, all layers"),
    ]
    sentence = (
        f"From update {s.steps[at]} on every layer's gradient is about {times:.3g} times its usual size against "
        "the logits': it is multiplied within the backward pass (summed over processes where their mean was meant, a "
        "scale that is not taken off)."
    )
    return [make(s, "loss-scale-jump", at, 0.8, sentence, proof, share=1.0)]


def _after_backward(s: Signals) -> list[Finding]:
    """Between the backward pass and the step all gradients grow by one factor: clipping only makes them smaller."""
    before, after = s.get("grad_norm"), s.get("grad_norm_clipped")
    if before is None or after is None:
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = after / np.where(before > 0, before, np.nan)
    highest = np.r_[np.nan, np.fmax.accumulate(np.nan_to_num(factor, nan=0.0))[:-1]]
    at = first((factor > math.exp(SCALE) * np.fmax(np.nan_to_num(highest, nan=0.0), 1.0)) & _one_factor(s))
    if at is None:
        return []
    proof = [
        s.evidence("grad_norm", at, before[at], None, "norm of the gradient after the backward pass"),
        s.evidence("grad_norm_clipped", at, after[at], highest[at] * before[at], "as the optimiser received it"),
    ]
    sentence = (
        f"At update {s.steps[at]} all gradients are multiplied by {number(factor[at])} between the backward pass and "
        "the optimiser: a scale is put on, or taken off, once too often."
    )
    return [make(s, "loss-scale-jump", at, 0.9, sentence, proof, share=1.0)]


def _one_factor(s: Signals) -> np.ndarray:
    """(U,) bool: whether all layers' gradients are multiplied alike after the backward pass, as far as is known."""
    if s.layers is None:
        return np.ones(s.size, dtype=bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.log(s.layers.received / s.layers.grad_norm)
    factor[~np.isfinite(factor)] = np.nan
    spread = np.fmax.reduce(factor, axis=1) - np.fmin.reduce(factor, axis=1)
    return ~(spread > ALIKE)


def _scale_of_log(s: Signals) -> list[Finding]:
    """A positive loss (SFT's) and its gradient jump by the same factor, which no batch does."""
    loss, gradient = s.get("loss"), s.gradient
    if loss is None or gradient is None or not (loss[np.isfinite(loss)] > 0).all():
        return []
    high, steep = usual(loss), usual(gradient)
    same = np.abs(high.excess - steep.excess) < 3 * np.hypot(high.scatter, steep.scatter)
    entropy = s.get("entropy")
    if entropy is None:  # a policy that was thrown about has a larger loss and gradient as well, but another entropy
        return []
    same &= np.abs(usual(entropy).excess) < math.log(1.2)
    at = first(same & (np.abs(high.excess) > math.log(3)) & (np.abs(high.score) > 6) & (np.abs(steep.score) > 3))
    if at is None:
        return []
    factor = math.exp(high.excess[at])
    proof = [
        s.evidence("loss", at, loss[at], high.level[at], "loss"),
        s.evidence("grad_norm", at, gradient[at], steep.level[at], "norm of the gradient"),
    ]
    s.lacks("loss-scale-jump", "d1", "whether it is the factor alone; record with lcogeom.attach", "tokens")
    sentence = (
        f"At update {s.steps[at]} the loss is {factor:.3g} times its usual value and its gradient "
        f"{math.exp(steep.excess[at]):.3g} times: both were multiplied by one factor."
    )
    return [make(s, "loss-scale-jump", at, 0.6, sentence, proof)]


def _scale_of_weights(s: Signals, weights: np.ndarray) -> list[Finding]:
    tokens = s.tokens
    assert tokens is not None
    typical = tokens.median(weights)
    count = s.get("tokens")
    plain = usual(typical, least=1, prior=EXACT)
    per_token = usual(typical * np.ones(s.size) if count is None else typical * count, least=1, prior=EXACT)
    nearer = np.abs(plain.excess) < np.abs(per_token.excess)
    excess = np.where(nearer, plain.excess, per_token.excess)
    score = np.where(nearer, plain.score, per_token.score)
    # Some forms are known where the policy has not moved yet, and at few tokens else.
    advantage = s.token("advantage")
    asked = np.ones(len(weights), dtype=bool) if advantage is None else np.abs(advantage) > 1e-8
    enough = np.nan_to_num(tokens.mean(np.isfinite(weights).astype(float), asked)) > FEW
    at = first((np.abs(excess) > SCALE) & (np.abs(score) > 6) & enough & _of_both_signs(s, weights, excess))
    if at is None:
        return []
    # Not where one sequence has another factor than the others, nor where a part of the gradient moves all logits.
    others = [*dominant_sequence(s), *pushed_alike(s)]
    if any(one.update == s.steps[at] for one in others):
        return []
    factor = math.exp(excess[at])
    proof = [
        s.evidence("d1", at, typical[at], plain.level[at], f"|f'| / (|A| r), {factor:.3g} times as before", "tokens")
    ]
    gradient = s.logit_gradient
    if gradient is not None:
        level = usual(gradient).level[at]
        proof.append(s.evidence("logit_grad_norm", at, gradient[at], level, "norm of the logit gradient"))
    sentence = (
        f"At update {s.steps[at]} the loss of every token is multiplied by {factor:.3g} compared with before, "
        "whatever its advantage, ratio or sequence: its normaliser changed, nothing else."
    )
    return [make(s, "loss-scale-jump", at, 0.95, sentence, proof, share=1.0)]


def _of_both_signs(s: Signals, weights: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """(U,) bool: whether tokens with A > 0 and those with A < 0 changed alike, where both are known."""
    tokens, advantage = s.tokens, s.token("advantage")
    assert tokens is not None
    alike = np.ones(s.size, dtype=bool)
    if advantage is None:
        return alike
    for chosen in (advantage > 0, advantage < 0):
        own = usual(tokens.median(weights, chosen), least=1, prior=EXACT).excess
        alike &= ~(own * np.sign(excess) < SCALE / 2)
    return alike
