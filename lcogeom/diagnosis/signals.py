"""What the rules read of a run, whatever columns it has: arrays over its updates, its tokens, its layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from lcogeom.diagnosis.finding import Evidence, Missing
from lcogeom.diagnosis.tokens import Tokens
from lcogeom.runs import BlackBoxEntry, Run


@dataclass(frozen=True, eq=False)
class Layers:
    """The norms table, a row for each update and a column for each layer, (U, L) each; NaN where not known."""

    names: tuple[str, ...]
    """In the order in which the model holds them, which is mostly that of the forward pass."""
    grad_norm: np.ndarray
    update_norm: np.ndarray
    weight_norm: np.ndarray
    received: np.ndarray
    """`grad_norm_clipped`."""
    moved_between: np.ndarray


@dataclass(eq=False)
class Signals:
    """Of one run."""

    source: str
    steps: np.ndarray
    """(U,): `step` of the updates, ascending."""
    updates: pd.DataFrame
    meta: Mapping[str, Any]
    tokens: Tokens | None
    layers: Layers | None
    black_box: tuple[BlackBoxEntry, ...] = ()
    events: tuple[Mapping[str, Any], ...] = ()
    """`step` and `reason`, of `run.events()`."""
    table: str = "updates"
    """'log' for a plain log."""
    missing: list[Missing] = field(default_factory=list)
    _known: dict[str, np.ndarray | None] = field(default_factory=dict)

    def get(self, name: str) -> np.ndarray | None:
        """A column of `updates` as float64 (U,), NaN where not known; None where it is absent or empty."""
        if name not in self._known:
            values = None
            if name in self.updates:
                values = pd.to_numeric(self.updates[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
                values = None if np.isnan(values).all() else values
            self._known[name] = values
        return self._known[name]

    def raw(self, name: str) -> np.ndarray | None:
        """The same where the column is empty, too: a NaN in it may be a number that was none."""
        if name not in self.updates:
            return None
        return pd.to_numeric(self.updates[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)

    def token(self, name: str) -> np.ndarray | None:
        """A column of `tokens` (M,), or None."""
        if self.tokens is None:
            return None
        found = self.tokens.get(name)
        if found is None and name == "ratio":
            now, old = self.tokens.get("logprob"), self.tokens.get("old_logprob")
            return None if now is None or old is None else np.exp(now - old)
        return found

    def lacks(self, cause: str, column: str, why: str, table: str | None = None) -> None:
        """A column that would have decided is not there."""
        place = table or self.table
        if not any(one.cause == cause and one.column == column for one in self.missing):
            self.missing.append(Missing(place, column, cause, why))

    def evidence(  # noqa: PLR0917
        self, column: str, index: int | None, value: object, reference: object, says: str, table: str | None = None
    ) -> Evidence:
        """One number, at an update given by its index."""
        update = None if index is None else int(self.steps[index])
        return Evidence(table or self.table, column, update, _plain(value), _plain(reference), says)

    @property
    def size(self) -> int:
        """Updates, U."""
        return len(self.steps)

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """Of the objective named at attach()."""
        named = self.meta.get("objective")
        found = named.get("options") if isinstance(named, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    @cached_property
    def loss_weights(self) -> np.ndarray | None:
        """(M,): what the loss multiplies each token by (weights.py)."""
        from lcogeom.diagnosis.weights import loss_weights

        return loss_weights(self)

    @cached_property
    def logit_gradient(self) -> np.ndarray | None:
        """(U,): norm of the logit gradient; from the recorded tokens where the column is empty."""
        found = self.get("logit_grad_norm")
        if self.tokens is not None and self.tokens.square is not None:
            summed = np.sqrt(self.tokens.sums(self.tokens.square))
            summed[np.diff(self.tokens.bounds) == 0] = np.nan
            found = summed if found is None else np.where(np.isnan(found), summed, found)
        return found

    @cached_property
    def gradient(self) -> np.ndarray | None:
        """(U,): norm of the parameters' gradient before clipping, else as the optimiser received it."""
        before, after = self.get("grad_norm"), self.get("grad_norm_clipped")
        if before is None or after is None:
            return after if before is None else before
        return np.where(np.isnan(before), after, before)


def signals_of(run: Run) -> tuple[Signals, list[str]]:
    """(what the rules read, notes on what was not as expected).

    Raises:
        ValueError: a collection of runs, or no update in it.
    """
    from lcogeom.runs import COLLECTION

    notes = list(run.damaged)
    if run.meta.get("kind") == COLLECTION:
        inside = sorted(str(found.parent.relative_to(run.path)) for found in run.path.rglob("run.json"))
        names = [name for name in inside if name != "."]
        shown = ", ".join(repr(str(run.path / name)) for name in names[:3])
        raise ValueError(f"run: {str(run.path)!r} holds {len(names)} runs; diagnose one of them, such as {shown}.")
    updates = run.updates[run.updates["step"].notna()]
    if not len(updates):
        raise ValueError(f"run: {str(run.path)!r} holds no finished update; was anything flushed? See attach().")
    updates = updates.drop_duplicates("step", keep="last").sort_values("step").reset_index(drop=True)
    steps = updates["step"].to_numpy(dtype=np.int64)
    gaps = np.flatnonzero(np.diff(steps) != 1)
    if steps[0] != 0:
        notes.append(f"the first update read is {steps[0]}: what happened before it is not known")
    for place in gaps[:3]:
        notes.append(f"updates {steps[place] + 1} to {steps[place + 1] - 1} are missing")
    known = {(row.table, row.name) for row in run.columns[["table", "name"]].itertuples(index=False)}
    for table, frame in (("updates", run.updates), ("tokens", run.tokens), ("norms", run.norms)):
        own = run.meta.get("labels")
        labels = set(own) if isinstance(own, Mapping) else set()
        strange = [str(name) for name in frame.columns if (table, name) not in known and name not in labels]
        if strange:
            notes.append(f"columns of {table} that are not the recorder's were not read: {', '.join(sorted(strange))}")
    tokens = Tokens(run.tokens, steps) if len(run.tokens) else None
    if tokens is None:
        notes.append("no tokens were recorded: causes are told apart by norms alone, and no token can be named")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entries = tuple(run.black_box())
    notes += [str(warning.message) for warning in caught]
    layers = layers_of(run.norms, steps)
    found = Signals(str(run.path), steps, updates, run.meta, tokens, layers, entries, tuple(run.events()))
    return found, notes


def layers_of(norms: pd.DataFrame, steps: np.ndarray) -> Layers | None:
    """The rows of layers of the norms table, spread out; None where there are none."""
    if not len(norms) or not {"step", "name", "grad_norm"} <= set(norms.columns):
        return None
    rows = norms[norms["scope"] == "layer"] if "scope" in norms else norms
    if not len(rows):
        return None
    names = list(dict.fromkeys(rows["name"].astype(str)))
    column = pd.Categorical(rows["name"].astype(str), categories=names).codes
    step = rows["step"].to_numpy(dtype=np.int64, na_value=-1)
    place = np.searchsorted(steps, step)
    there = (place < len(steps)) & (steps[np.minimum(place, len(steps) - 1)] == step)

    def table(name: str) -> np.ndarray:
        found = np.full((len(steps), len(names)), np.nan)
        if name in rows:
            values = pd.to_numeric(rows[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
            found[place[there], column[there]] = values[there]
        return found

    numbers = ("grad_norm", "update_norm", "weight_norm", "grad_norm_clipped", "moved_between")
    return Layers(tuple(names), *(table(name) for name in numbers))


def _plain(value: object) -> float | str | None:
    if value is None or isinstance(value, str):
        return value
    return float(value)  # type: ignore[arg-type]
