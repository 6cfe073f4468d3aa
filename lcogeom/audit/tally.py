"""Sums, quantiles and the worst tokens of a stream, in memory that does not grow with it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

GROWTH = 1.01
"""Upper over lower edge of a bin of `Quantiles`."""
QUANTILE_ERROR = math.sqrt(GROWTH) - 1
"""Largest relative error of a quantile: a value's distance from the geometric middle of its bin. 0.5 %."""
_SMALLEST = math.floor(math.log(5e-324) / math.log(GROWTH))
_LARGEST = math.ceil(math.log(sys.float_info.max) / math.log(GROWTH))


@dataclass(eq=False)
class Quantiles:
    """Quantiles of numbers >= 0 (infinity included) from log-spaced bins over the whole range of float64: 1.2 MB."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(_LARGEST - _SMALLEST + 4, dtype=np.int64))
    """[zeros, bins..., infinities]."""
    largest: float = 0.0
    smallest: float = math.inf
    """Of the positive ones."""

    def add(self, values: np.ndarray) -> None:
        """values: (n,), none of them NaN or negative."""
        if len(values) == 0:
            return
        positive = values[values > 0]
        finite = positive[np.isfinite(positive)]
        bins = np.floor(np.log(finite) / math.log(GROWTH)).astype(np.int64) - _SMALLEST + 1
        self.counts += np.bincount(bins, minlength=len(self.counts))
        self.counts[0] += len(values) - len(positive)
        self.counts[-1] += len(positive) - len(finite)
        if len(positive):
            self.largest = max(self.largest, float(positive.max()))
            self.smallest = min(self.smallest, float(positive.min()))

    def quantile(self, q: float) -> float:
        """The smallest value that at least a share q of the values do not exceed, to within QUANTILE_ERROR.

        The rank is exact; so are 0 and infinity. NaN where nothing was added.
        """
        total = int(self.counts.sum())
        if total == 0:
            return math.nan
        place = int(np.searchsorted(np.cumsum(self.counts), max(1, math.ceil(q * total))))
        if place == 0:
            return 0.0
        if place == len(self.counts) - 1:
            return math.inf
        middle = (place - 1 + _SMALLEST + 0.5) * math.log(GROWTH)
        return min(max(math.exp(min(middle, math.log(sys.float_info.max))), self.smallest), self.largest)


@dataclass(eq=False)
class Tally:
    """Running sums over one group of tokens."""

    tokens: int = 0
    convex: int = 0
    overflowed: int = 0
    infinite: int = 0
    kl: float = 0.0
    margin: float = 0.0
    own_negative: float = 0.0
    own: float = 0.0
    quantiles: Quantiles = field(default_factory=Quantiles)

    def add(self, kl_needed: np.ndarray, margin: np.ndarray, own: np.ndarray) -> None:
        """Per token, (n,): k*, the lowest margin, and the curvature along the action's own logit; NaN: overflowed."""
        self.tokens += len(kl_needed)
        known = ~np.isnan(kl_needed)
        kl_needed, margin, own = kl_needed[known], margin[known], own[known]
        self.overflowed += int((~known).sum())
        self.convex += int((kl_needed == 0).sum())
        self.quantiles.add(kl_needed)
        finite = np.isfinite(margin)
        self.infinite += int((~finite).sum())
        self.kl += float(kl_needed[finite].sum())
        self.margin += float(np.abs(margin[finite]).sum())
        self.own_negative += float(np.maximum(-own, 0).sum())
        self.own += float(np.abs(own).sum())


@dataclass(eq=False)
class Worst:
    """The tokens with the largest k* > 0; of equal ones, those that come first."""

    limit: int
    kept: list[tuple[float, Any]] = field(default_factory=list)

    def add(self, kl_needed: np.ndarray, describe: Callable[[int], Any]) -> None:
        """kl_needed: (n,), NaN is passed over. describe: index -> what to keep of that token."""
        if self.limit <= 0:
            return
        floor = self.kept[-1][0] if len(self.kept) == self.limit else 0.0
        above = np.flatnonzero(kl_needed > floor)
        best = above[np.argsort(-kl_needed[above], kind="stable")[: self.limit]]
        found = [(float(kl_needed[token]), describe(int(token))) for token in best]
        self.kept = sorted([*self.kept, *found], key=lambda one: -one[0])[: self.limit]
