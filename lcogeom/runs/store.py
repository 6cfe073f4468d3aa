"""Writing a run folder so that a kill at any moment leaves it readable.

run.json                    schema version, kind, labels, whatever the writer wants kept
tokens/part-000000.parquet  one part per flush, complete or absent: written aside, synced, renamed
norms/part-000000.parquet
sketches/part-000000.parquet
updates/part-000000.parquet last in each flush, so that an update's row vouches for its tokens
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lcogeom.runs.columns import TABLES, schema

SCHEMA_VERSION = 1
RUN, COLLECTION = "run", "collection"


def create_folder(path: str | Path, meta: Mapping[str, object], *, kind: str = RUN) -> Path:
    """Make a new run folder (or a collection, which holds run folders), complete from its first moment.

    Raises:
        FileExistsError: the path is taken. Nothing in it is touched.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"run: {str(path)!r} exists already. Give another folder, or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    record = {"schema": SCHEMA_VERSION, "kind": kind, "lcogeom": version("lcogeom"), **meta}
    (unfinished / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.chmod(0o755)
    try:
        unfinished.rename(path)
    except OSError as error:
        shutil.rmtree(unfinished)
        raise FileExistsError(f"run: {str(path)!r} was made by someone else just now. Give another folder.") from error
    return path


class RunWriter:
    """Collects rows and writes them as parts."""

    def __init__(self, path: str | Path, meta: Mapping[str, object]) -> None:
        self.path = create_folder(path, meta)
        self._pending: dict[str, list[pa.Table]] = {table: [] for table in TABLES}
        self._parts = 0
        for table in TABLES:
            (self.path / table).mkdir()

    def add(self, table: str, rows: Mapping[str, Sequence[object] | np.ndarray]) -> None:
        """Keep rows for the next flush.

        rows: column -> values of equal length, a sequence or a float array; absent columns, None and NaN become null.
        """
        columns = schema(table)
        unknown = sorted(set(rows) - set(columns.names))
        if unknown:
            raise ValueError(f"{table}: no column {unknown[0]!r}; lcogeom.runs.columns lists them.")
        length = len(next(iter(rows.values())))
        arrays = [_array(rows.get(field.name), length, field.type) for field in columns]
        self._pending[table].append(pa.Table.from_arrays(arrays, schema=columns))

    def flush(self) -> None:
        """Write what is pending as one part per table."""
        if not any(self._pending.values()):
            return
        for table in TABLES:
            if self._pending[table]:
                part = self.path / table / f"part-{self._parts:06d}.parquet"
                _write_atomically(pa.concat_tables(self._pending[table]), part)
                self._pending[table] = []
        self._parts += 1


def _array(values: Sequence[object] | np.ndarray | None, length: int, kind: pa.DataType) -> pa.Array:
    if values is None:
        return pa.nulls(length, kind)
    found = pa.array(values, from_pandas=True)  # NaN means "not known"
    return found if found.type == kind else found.cast(kind)


def _write_atomically(rows: pa.Table, path: Path) -> None:
    unfinished = path.with_name("." + path.name)
    with unfinished.open("wb") as file:
        pq.write_table(rows, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
