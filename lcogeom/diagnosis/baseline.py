"""What was usual before an update: running medians and deviations, on a logarithmic scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

WINDOW = 100
"""Updates looked back on: long enough for a median, short enough that a warm-up or a slow trend is followed."""
SURE = 5.0
"""In units of the scatter: of 10,000 updates of a normal number, 0.006 lie beyond."""
PRIOR, PRIOR_UPDATES = 0.3, 4
"""Where few updates are known, their scatter is taken for that of a norm from batch to batch (30 %, as if seen in
4 updates more); otherwise three norms that happen to be alike would make the fourth an event."""


@dataclass(frozen=True, eq=False)
class Usual:
    """Of each update, from those before it."""

    level: np.ndarray
    """(U,): median of the positive values among the last WINDOW; NaN where fewer than `least` are known."""
    scatter: np.ndarray
    """(U,): their deviation in log units (1.4826 times the median absolute one, shrunk towards PRIOR)."""
    excess: np.ndarray
    """(U,): log(value / level)."""

    @property
    def score(self) -> np.ndarray:
        """(U,): excess in units of scatter."""
        return self.excess / self.scatter


def usual(values: np.ndarray, least: int = 3, prior: float = PRIOR) -> Usual:
    """The running baseline of positive numbers; zeros and what is not finite say nothing of what is usual.

    Args:
        values: (U,).
        least: values that must be known before.
        prior: scatter in log units that is assumed where few are known.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where((values > 0) & np.isfinite(values), np.log(values), np.nan)
    before = pd.Series(logs).shift(1)
    rolling = before.rolling(WINDOW, min_periods=least)
    level = rolling.median()
    count = rolling.count().fillna(0.0)
    # Deviations from the median that was known then: the first values have none, and count as none.
    off = (before - level.shift(1).fillna(before.expanding().median())).abs()
    spread = 1.4826 * off.rolling(WINDOW, min_periods=1).median().fillna(0.0)
    scatter = np.sqrt((count * spread**2 + PRIOR_UPDATES * prior**2) / (count + PRIOR_UPDATES))
    middle = level.to_numpy()
    return Usual(np.exp(middle), np.asarray(scatter), logs - middle)


def first(found: np.ndarray) -> int | None:
    """The first true entry."""
    places = np.flatnonzero(found)
    return int(places[0]) if len(places) else None


def longest_from(found: np.ndarray, length: int) -> int | None:
    """The first of `length` true entries in a row."""
    if len(found) < length:
        return None
    runs = np.convolve(found.astype(int), np.ones(length, int), "valid")
    return first(runs == length)


def ahead(values: np.ndarray, length: int) -> np.ndarray:
    """(U,): means over an update and those after it, `length` together, fewer at the end."""
    return pd.Series(values[::-1]).rolling(length, min_periods=1).mean().to_numpy()[::-1]
