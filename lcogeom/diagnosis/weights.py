"""What the loss multiplies a token by, beyond its advantage and ratio: |f'| / (|A| r), from the exact slopes recorded.

For every loss that is an average of -A r, of -A log pi or of -log pi (method.md, 2.1), this is the averaging itself:
1 / tokens, 1 / (sequences x length), or whatever the trainer divides by. No batch, policy or advantage moves it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lcogeom.diagnosis.signals import Signals

SMALL = 1e-12
TIGHT = 0.02
"""Scatter of its logarithm within a sequence (median absolute deviation) below which a form is believed: true ones
leave the rounding of the slopes, 1e-6 in float32 and 1e-2 in bf16."""
MISFIT = 0.05
"""From here on the recorder does not trust the slope, either."""
ROWS = 200_000
"""Rows that the form is chosen on."""


def loss_weights(s: Signals) -> np.ndarray | None:
    """(M,): the weight of each token, NaN where it is clipped or has none; None where no form fits this loss."""
    tokens, slope = s.tokens, s.token("d1")
    if tokens is None:
        return None
    size = np.full(len(tokens.update), np.nan) if slope is None else np.abs(slope)
    misfit = s.token("misfit")
    if misfit is not None:
        size = np.where(misfit > MISFIT, np.nan, size)  # f' of a loss that is no f(log pi) means nothing
    one = np.where(size > SMALL, size, np.nan)
    forms = []
    advantage, ratio = s.token("advantage"), s.token("ratio")
    if advantage is not None:
        per_advantage = one / np.where(np.abs(advantage) > 1e-8, np.abs(advantage), np.nan)
        forms.append(per_advantage)
        if ratio is not None:
            forms.append(per_advantage / np.where(ratio > 0, ratio, np.nan))
    if advantage is None and _without_advantages(s):
        forms.append(one)
    forms += _of_targets(s)
    found, best = None, np.inf
    for form in forms:
        typical, wide = _scatter(s, form)
        if typical < TIGHT and wide < best:
            found, best = form, wide
    return found


def _without_advantages(s: Signals) -> bool:
    """Whether the loss is one of log pi alone: advantages that were not recorded would pass for its weights."""
    named = s.meta.get("objective")
    return isinstance(named, Mapping) and named.get("name") == "sft"


def _of_targets(s: Signals) -> list[np.ndarray]:
    """The same of LCO's losses where the policy is still the one that sampled (method.md, 2.3, sparse advantages)."""
    norm, prob, squares = s.token("logit_grad_norm"), s.token("prob"), s.token("sum_sq_prob")
    advantage, ratio, beta = s.token("advantage"), s.token("ratio"), s.options.get("beta")
    if norm is None or prob is None or squares is None or advantage is None or ratio is None:
        return []
    if not isinstance(beta, (int, float)) or not beta > 0:
        return []
    scale = s.options.get("negative_beta_scale", 1.0)
    scaled = advantage / np.where(advantage < 0, beta * (scale if isinstance(scale, (int, float)) else 1.0), beta)
    odds = prob * np.expm1(np.clip(scaled, -50, 50))
    towards = np.abs(odds / (1 + odds)) * np.sqrt(np.clip(1 - 2 * prob + squares, 0, None))
    there = (np.abs(ratio - 1) < 1e-3) & (norm > SMALL)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = [norm / towards, norm / np.abs(scaled), norm / np.abs(np.tanh(scaled))]
    return [np.where(there & np.isfinite(form), form, np.nan) for form in found]


def _scatter(s: Signals, form: np.ndarray) -> tuple[float, float]:
    """Median and 90 % quantile over tokens of |log form - its sequence's median|.

    The median says whether a form holds, apart from saturated tokens; the quantile tells forms apart that differ where
    ratios are not 1, which may be in few updates.
    """
    tokens = s.tokens
    assert tokens is not None
    logs = np.log(form[:ROWS])
    known = np.isfinite(logs)
    if known.sum() < 2:
        return np.inf, np.inf
    sequence, logs = tokens.sequence[:ROWS][known], logs[known]
    order = np.lexsort((logs, sequence))
    sequence, logs = sequence[order], logs[order]
    starts = np.flatnonzero(np.r_[True, sequence[1:] != sequence[:-1]])
    sizes = np.diff(np.r_[starts, len(sequence)])
    middle = logs[starts + (sizes - 1) // 2]
    shared = np.repeat(sizes, sizes) > 1
    if not shared.any():
        return np.inf, np.inf
    off = np.abs(logs - np.repeat(middle, sizes))[shared]
    return float(np.median(off)), float(np.quantile(off, 0.9))
