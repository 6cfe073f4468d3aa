"""Reading a run folder, finished or still being written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa

from lcogeom.runs.black_box import BlackBoxEntry, read_entries, read_triggers
from lcogeom.runs.columns import glossary, schema
from lcogeom.runs.folder import COLLECTION, members, read_meta
from lcogeom.runs.parts import DamagedPart, flushes
from lcogeom.runs.sketches import Sketches, read_sketches

FRAMES = ("updates", "tokens", "norms")
"""The tables read by load_run. Sketches are large and read when asked for."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds. A collection's tables are those of its runs, with each run's labels as columns."""

    path: Path
    meta: Mapping[str, object]
    """The content of run.json."""
    updates: pd.DataFrame
    """One row per optimiser step."""
    tokens: pd.DataFrame
    """One row per recorded token."""
    norms: pd.DataFrame
    """One row per layer and per parameter group of each optimiser step."""
    columns: pd.DataFrame
    """The glossary: table, name, type, unit, meaning."""
    damaged: tuple[str, ...]
    """A line for each file that is not what was written, with what is missing because of it."""

    def sketches(self, layer: str | None = None, **labels: object) -> Sketches:
        """The sketches of every gradient and step, read from the folder now; 128 KiB an update by default.

        Args:
            layer: of one layer's part (recorded with `attach(..., sketch_layers=True)`), such as "model.layers.3".
            labels: of a collection's run: run.sketches(variant="ppo", seed=0).

        Raises:
            ValueError: no run, or several, with these labels; nothing sketched; no such layer.
        """
        runs = members(self.path, self.meta, [])
        found = [folder for folder, given in runs if labels.items() <= given.items()]
        if len(found) != 1:
            known = ", ".join(f"{name}={value!r}" for name, value in labels.items()) or "no labels"
            raise ValueError(
                f"labels: {len(found)} runs of {str(self.path)!r} have {known}; name exactly one, for example "
                'run.sketches(variant="ppo", seed=0).'
            )
        return read_sketches(found[0], layer)

    def events(self) -> list[dict[str, object]]:
        """What the black box was called for, oldest first: `step`, `reason`, `dumped` (False: no dump was written)."""
        return [event for folder, _ in members(self.path, self.meta, []) for event in read_triggers(folder)]

    def black_box(self) -> list[BlackBoxEntry]:
        """What was written down when something went wrong, by run and update; damaged dumps are left out, and said."""
        return [entry for folder, _ in members(self.path, self.meta, []) for entry in read_entries(folder)]


def load_run(path: str | Path) -> Run:
    """Read a run folder, or a collection of run folders (as `lcogeom replay` writes it).

    Works while the run goes on, and after it was killed: an update is there with all its rows, or not at all. Every
    file is checked against what was written. What is damaged is left out, with a warning, and named in `Run.damaged`
    with what is missing because of it; a damaged part of `tokens` or `norms` takes no update with it, and a damaged
    run.json is read from the copy that the parts keep. Columns that others added to the parts are kept.

    Raises:
        FileNotFoundError: not a run folder.
        ValueError: written by a newer schema than this version reads, or run.json is damaged before the first flush.
    """
    path = Path(path)
    damaged: list[str] = []
    meta = read_meta(path, damaged)
    if meta["kind"] != COLLECTION:
        frames = _read_tables(path, damaged)
    else:
        parts: dict[str, list[pd.DataFrame]] = {table: [] for table in FRAMES}
        for folder, labels in members(path, meta, damaged):
            for table, frame in _read_tables(folder, damaged).items():
                for place, (label, value) in enumerate(labels.items()):
                    frame.insert(place, label, value)
                parts[table].append(frame)
        frames = {
            table: pd.concat(some, ignore_index=True) if some else schema(table).empty_table().to_pandas()
            for table, some in parts.items()
        }
    for line in damaged:
        warnings.warn(f"run {str(path)!r}: {line}", stacklevel=2)
    return Run(path, meta, frames["updates"], frames["tokens"], frames["norms"], glossary(), tuple(damaged))


def _read_tables(path: Path, damaged: list[str]) -> dict[str, pd.DataFrame]:
    found: dict[str, list[pa.Table]] = {table: [] for table in FRAMES}
    for flush in flushes(path, damaged):
        found["updates"].append(flush.updates)
        for table in FRAMES[1:]:
            try:
                rows = flush.rows(table)
            except DamagedPart as error:
                damaged.append(str(error))
            else:
                found[table] += [] if rows is None else [rows]
    frames = {table: _frame(table, parts) for table, parts in found.items()}
    for table in FRAMES[1:]:
        finished = frames[table]["step"].isin(frames["updates"]["step"])
        if not finished.all():  # rows without the row of their update
            frames[table] = frames[table][finished].reset_index(drop=True)
    return frames


def _frame(table: str, parts: Sequence[pa.Table]) -> pd.DataFrame:
    """Parts of one table, whatever columns of their own or of other types others gave them."""
    expected = schema(table)
    alike = [expected.empty_table(), *(part.replace_schema_metadata(None) for part in parts)]
    try:
        rows = pa.concat_tables(alike, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):  # a stranger's column that is text here and numbers there
        alike = [_strangers_as_text(part, expected) for part in alike]
        rows = pa.concat_tables(alike, promote_options="permissive")
    return rows.to_pandas(types_mapper={pa.bool_(): pd.BooleanDtype(), pa.int64(): pd.Int64Dtype()}.get)


def _strangers_as_text(rows: pa.Table, expected: pa.Schema) -> pa.Table:
    for place, field in enumerate(rows.schema):
        if field.name not in expected.names:
            text = [None if value is None else str(value) for value in rows.column(place).to_pylist()]
            rows = rows.set_column(place, field.name, pa.array(text, pa.string()))
    return rows
