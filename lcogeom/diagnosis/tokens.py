"""The recorded tokens as flat arrays, grouped by update and by sequence, so that 2.5 million rows take seconds."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd

SHOWN = 20
"""Tokens that a finding names, at most."""


class Tokens:
    """The tokens table of one run. Arrays are (M,), in the order of the updates."""

    def __init__(self, frame: pd.DataFrame, steps: np.ndarray) -> None:
        """frame: `run.tokens`, with at least a column `step`; steps: (U,) of the updates, ascending."""
        step = frame["step"].to_numpy(dtype=np.int64, na_value=-1)
        place = np.searchsorted(steps, step)
        place[(place >= len(steps)) | (steps[np.minimum(place, len(steps) - 1)] != step)] = -1
        if (place < 0).any() or (np.diff(place) < 0).any():  # rows of no update, or out of order
            order = np.argsort(place, kind="stable")
            order = order[place[order] >= 0]
            frame, place = frame.iloc[order], place[order]
        self.frame = frame
        self.count = len(steps)
        self.update = place
        """Index of each row's update."""
        self.bounds = np.searchsorted(place, np.arange(len(steps) + 1))
        self._known: dict[str, np.ndarray | None] = {}

    def get(self, name: str) -> np.ndarray | None:
        """A column as float64, NaN where not known; None where it is absent or empty."""
        if name not in self._known:
            values = None
            if name in self.frame:
                column = self.frame[name]
                try:
                    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
                except (TypeError, ValueError):  # text where a number should be
                    values = pd.to_numeric(column.astype(str), errors="coerce").to_numpy(dtype=np.float64)
                values = None if np.isnan(values).all() else values
            self._known[name] = values
        return self._known[name]

    @cached_property
    def weight(self) -> np.ndarray:
        """How many tokens each row stands for; 1 where not known."""
        found = self.get("weight")
        return np.ones(len(self.update)) if found is None else np.where(found > 0, found, 1.0)

    @cached_property
    def square(self) -> np.ndarray | None:
        """(M,): weight times the squared norm of the logit gradient. From f' where the norm is not known."""
        norm = self.get("logit_grad_norm")
        d1, prob, squares = self.get("d1"), self.get("prob"), self.get("sum_sq_prob")
        if d1 is not None and prob is not None and squares is not None:
            by_slope = np.abs(d1) * np.sqrt(np.clip(1 - 2 * prob + squares, 0, None))  # method.md, 2.1
            norm = by_slope if norm is None else np.where(np.isnan(norm), by_slope, norm)
        return None if norm is None else self.weight * norm**2

    def sums(self, values: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """(U,): sums over the rows of each update, or over those chosen; NaN counts as 0."""
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        if chosen is not None:
            values = np.where(chosen, values, 0.0)
        return np.bincount(self.update, values, self.count)

    def share(self, chosen: np.ndarray) -> np.ndarray:
        """(U,): of the squared gradient of each update, what the chosen rows hold; NaN where there is no gradient."""
        if self.square is None:
            return np.full(self.count, np.nan)
        total = self.sums(self.square)
        return _ratio(self.sums(self.square, chosen), total)

    def mean(self, values: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """(U,): weighted means over the rows where the value is known."""
        known = np.isfinite(values) if chosen is None else np.isfinite(values) & chosen
        return _ratio(self.sums(self.weight * np.where(known, values, 0.0)), self.sums(self.weight, known))

    def largest(self, values: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """(U,): the largest known value of each update; NaN where there is none."""
        usable = np.isnan(values) if chosen is None else np.isnan(values) | ~chosen
        masked = np.where(usable, -np.inf, values)
        found = np.full(self.count, -np.inf)
        full = np.flatnonzero(np.diff(self.bounds))
        if len(full):
            found[full] = np.maximum.reduceat(masked, self.bounds[full])
        return np.where(np.isneginf(found), np.nan, found)

    def median(self, values: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """(U,): plain medians of the known values of each update; NaN where there is none."""
        known = ~np.isnan(values) if chosen is None else ~np.isnan(values) & chosen
        at, some = self.update[known], values[known]
        some = some[np.lexsort((some, at))]
        bounds = np.searchsorted(at, np.arange(self.count + 1))
        size = np.diff(bounds)
        found = np.full(self.count, np.nan)
        full = size > 0
        low, high = bounds[:-1] + (size - 1) // 2, bounds[:-1] + size // 2
        found[full] = (some[low[full]] + some[high[full]]) / 2
        return found

    @cached_property
    def sequence(self) -> np.ndarray:
        """(M,) int64: index of each row's (update, sequence) among all there are, ascending by update."""
        numbers = self.get("sequence")
        numbers = np.zeros(len(self.update)) if numbers is None else np.nan_to_num(numbers, nan=0.0)
        wide = int(numbers.max(initial=0)) + 1
        return np.unique(self.update * wide + numbers.astype(np.int64), return_inverse=True)[1].reshape(-1)

    @cached_property
    def update_of_sequence(self) -> np.ndarray:
        """(Q,): index of the update of each (update, sequence)."""
        found = np.zeros(self.sequence.max(initial=-1) + 1, dtype=np.int64)
        found[self.sequence] = self.update
        return found

    def by_sequence(self, values: np.ndarray) -> np.ndarray:
        """(Q,): sums over the rows of each (update, sequence); NaN counts as 0."""
        return np.bincount(self.sequence, np.nan_to_num(values, nan=0.0), len(self.update_of_sequence))

    @cached_property
    def again(self) -> np.ndarray | None:
        """(U,) bool: whether an earlier update was made on the same rollout; None without old log-probabilities."""
        if self.get("old_logprob") is None or self.get("token_id") is None:
            return None
        # Where a sample of the tokens is recorded, two of them share few. Where all are, short answers of a policy that
        # stands still may repeat to the last bit in a new rollout, but not most of them.
        return self.seen_before > (0.5 if (self.weight == 1).all() else 0.01)

    @cached_property
    def seen_before(self) -> np.ndarray:
        """(U,): share of the rows whose token and old log-probability were there in an earlier update.

        Near 0 on a new rollout, above 0 on one that an earlier update was made on; NaN without old log-probabilities.
        Those near 0 are left out: saturated tokens are alike in all rollouts.
        """
        old, ids = self.get("old_logprob"), self.get("token_id")
        if old is None or ids is None:
            return np.full(self.count, np.nan)
        usable = np.abs(old) > 1e-3
        bits = old[usable].view(np.int64) * 1_000_003 + np.nan_to_num(ids[usable]).astype(np.int64)
        at = self.update[usable]
        _, earliest, again = np.unique(bits, return_index=True, return_inverse=True)
        seen = at[earliest][again.reshape(-1)] < at
        rows = np.bincount(at, minlength=self.count)
        return _ratio(np.bincount(at, seen.astype(float), self.count), rows)

    def rows(self, update: int) -> slice:
        """Of one update, by its index."""
        return slice(int(self.bounds[update]), int(self.bounds[update + 1]))

    def named(self, update: int, chosen: np.ndarray) -> pd.DataFrame:
        """The chosen rows (M,) of one update, heaviest first, with `share` of its squared gradient."""
        rows = self.rows(update)
        frame = self.frame.iloc[rows].copy()
        share = np.full(len(frame), np.nan)
        if self.square is not None:
            squares = np.nan_to_num(self.square[rows], nan=0.0)
            share = squares / squares.sum() if squares.sum() > 0 else share
        frame["share"] = share
        frame = frame[chosen[rows]]
        return frame.sort_values("share", ascending=False, na_position="last").head(SHOWN).reset_index(drop=True)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b > 0, a / b, np.nan)
