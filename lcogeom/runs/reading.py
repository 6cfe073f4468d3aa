"""Reading a run folder, finished or still being written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lcogeom.runs.black_box import BlackBoxEntry, read_entries
from lcogeom.runs.columns import glossary, schema
from lcogeom.runs.sketches import Sketches, read_sketches
from lcogeom.runs.store import COLLECTION, SCHEMA_VERSION

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
    """Part files that could not be read and were left out."""

    def sketches(self, layer: str | None = None, **labels: object) -> Sketches:
        """The sketches of every gradient and step, read from the folder now; 128 KiB an update by default.

        Args:
            layer: of one layer's part (recorded with `attach(..., sketch_layers=True)`), such as "model.layers.3".
            labels: of a collection's run: run.sketches(variant="ppo", seed=0).

        Raises:
            ValueError: no run, or several, with these labels; nothing sketched; no such layer.
        """
        found = [folder for folder, given in _members(self.path, self.meta) if labels.items() <= given.items()]
        if len(found) != 1:
            known = ", ".join(f"{name}={value!r}" for name, value in labels.items()) or "no labels"
            raise ValueError(
                f"labels: {len(found)} runs of {str(self.path)!r} have {known}; name exactly one, for example "
                'run.sketches(variant="ppo", seed=0).'
            )
        steps = _read_parts(found[0], "updates", [])["step"]
        return read_sketches(found[0], steps.to_numpy(int), layer)

    def black_box(self) -> list[BlackBoxEntry]:
        """What was written down when something went wrong, by run and update; damaged dumps are left out, and said."""
        return [entry for folder, _ in _members(self.path, self.meta) for entry in read_entries(folder)]


def load_run(path: str | Path) -> Run:
    """Read a run folder, or a collection of run folders (as `lcogeom replay` writes it).

    Works while the run goes on, and after it was killed: whole parts are read, rows of an update whose own row was
    not written yet are left out. A damaged part is left out with a warning and named in `Run.damaged`.

    Raises:
        FileNotFoundError: not a run folder.
        ValueError: written by a newer schema than this version reads, or run.json is damaged.
    """
    path = Path(path)
    meta = _read_meta(path)
    damaged: list[str] = []
    if meta["kind"] != COLLECTION:
        frames = _read_tables(path, damaged)
    else:
        parts: dict[str, list[pd.DataFrame]] = {table: [] for table in FRAMES}
        for folder, labels in _members(path, meta):
            for table, frame in _read_tables(folder, damaged).items():
                for place, (label, value) in enumerate(labels.items()):
                    frame.insert(place, label, value)
                parts[table].append(frame)
        frames = {
            table: pd.concat(some, ignore_index=True) if some else schema(table).empty_table().to_pandas()
            for table, some in parts.items()
        }
    for name in damaged:
        warnings.warn(f"run {str(path)!r}: part {name} is damaged and was left out", stacklevel=2)
    return Run(path, meta, frames["updates"], frames["tokens"], frames["norms"], glossary(), tuple(damaged))


def _members(path: Path, meta: Mapping[str, object]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The run folders of a collection with their labels; a run is its own only member."""
    folders = [path]
    if meta["kind"] == COLLECTION:
        folders = sorted(found.parent for found in path.rglob("run.json") if found.parent != path)
    for folder in folders:
        if folder != path and folder.relative_to(path).parts[0].startswith("."):
            continue
        labels = _read_meta(folder).get("labels") or {}
        assert isinstance(labels, dict)
        yield folder, labels


def _read_meta(path: Path) -> dict[str, object]:
    file = path / "run.json"
    if not file.is_file():
        raise FileNotFoundError(f"run: {str(path)!r} is not a run folder (it holds no run.json).")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        version = int(meta["schema"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"run: {str(file)!r} is damaged ({error}).") from error
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"run: {str(path)!r} has schema {version}; this version reads up to {SCHEMA_VERSION}. Upgrade."
        )
    return meta


def _read_tables(path: Path, damaged: list[str]) -> dict[str, pd.DataFrame]:
    # Updates first: parts written between two reads can then only add tokens of updates not listed, which are dropped.
    updates = _read_parts(path, "updates", damaged)
    frames = {"updates": updates}
    for table in ("tokens", "norms"):
        frame = _read_parts(path, table, damaged)
        frames[table] = frame[frame["step"].isin(updates["step"])].reset_index(drop=True)
    return frames


def _read_parts(path: Path, table: str, damaged: list[str]) -> pd.DataFrame:
    parts = [schema(table).empty_table()]
    for file in sorted((path / table).glob("part-*.parquet")):
        try:
            parts.append(pq.read_table(file))
        except (pa.ArrowInvalid, OSError) as error:
            damaged.append(f"{file.relative_to(path.parent)}: {str(error).splitlines()[0]}")
    rows = pa.concat_tables(parts, promote_options="permissive")
    return rows.to_pandas(types_mapper={pa.bool_(): pd.BooleanDtype(), pa.int64(): pd.Int64Dtype()}.get)
