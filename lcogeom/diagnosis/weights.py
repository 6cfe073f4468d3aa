"""What the loss multiplies a token by, beyond its advantage and ratio: |f'| / (|A| r), from the exact slopes recorded.

For every loss that is an average of -A r, of -A log pi or of -log pi (method.md, 2.1), this is the averaging itself:
1 / tokens, 1 / (sequences x length), or whatever the trainer divides by. No batch, policy or advantage moves it.
"""

from __future__ import annotations

import numpy as np

from lcogeom.diagnosis.signals import Signals

SMALL = 1e-12
TIGHT = 0.02
"""Scatter of its logarithm within a sequence (median absolute deviation) below which a form is believed: true ones leave
the rounding of the slopes, 1e-6 in float32 and 1e-2 in bf16."""
ROWS = 200_000
"""Rows that the form is chosen on."""


def loss_weights(s: Signals) -> np.ndarray | None:
    """(M,): the weight of each token, NaN where it is clipped or has none; None where no form fits this loss."""
    tokens, slope = s.tokens, s.token("d1")
    if tokens is None or slope is None:
        return None
    size = np.abs(slope)
    one = np.where(size > SMALL, size, np.nan)
    forms = []
    advantage, ratio = s.token("advantage"), s.token("ratio")
    if advantage is not None:
        per_advantage = one / np.where(np.abs(advantage) > 1e-8, np.abs(advantage), np.nan)
        forms.append(per_advantage)
        if ratio is not None:
            forms.append(per_advantage / np.where(ratio > 0, ratio, np.nan))
    forms.append(one)
    found, best = None, TIGHT
    for form in forms:
        scatter = _scatter(s, form)
        if scatter < best * 0.99:
            found, best = form, scatter
    return found


def _scatter(s: Signals, form: np.ndarray) -> float:
    """Median over tokens of |log form - its sequence's median|."""
    tokens = s.tokens
    assert tokens is not None
    logs = np.log(form[:ROWS])
    known = np.isfinite(logs)
    if known.sum() < 2:
        return np.inf
    sequence, logs = tokens.sequence[:ROWS][known], logs[known]
    order = np.lexsort((logs, sequence))
    sequence, logs = sequence[order], logs[order]
    starts = np.flatnonzero(np.r_[True, sequence[1:] != sequence[:-1]])
    sizes = np.diff(np.r_[starts, len(sequence)])
    middle = logs[starts + (sizes - 1) // 2]
    shared = np.repeat(sizes, sizes) > 1
    return float(np.median(np.abs(logs - np.repeat(middle, sizes))[shared])) if shared.any() else np.inf
