"""Writing a run folder so that a kill at any moment, or a full disk, leaves it readable.

run.json                                  schema version, kind, labels, whatever the writer wants kept, and its check
writer.lock                               held by the one process that writes
tokens/part-000000.0-10.8c3e01f5.parquet  one part per flush (lcogeom.runs.parts)
norms/...
sketches/...
updates/part-000000.0-10.2b6d9a40.parquet last in each flush, so that an update's row vouches for its tokens
"""

from __future__ import annotations

import contextlib
import operator
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lcogeom.runs.columns import TABLES, schema
from lcogeom.runs.folder import SCHEMA_VERSION, complete_meta, create_folder, read_meta
from lcogeom.runs.lock import FolderLock
from lcogeom.runs.parts import DamagedPart, Part, before, list_parts, read_part, write_part

PENDING_BYTES = 64 * 2**20
"""Rows kept in memory while the disk does not take them."""


class RunWriter:
    """Collects rows and writes them as parts. The only writer of its folder, until `close`."""

    def __init__(
        self,
        path: str | Path,
        meta: Mapping[str, object],
        *,
        resume: bool | int = False,
        same: Sequence[str] = (),
    ) -> None:
        """Make the folder, or go on in one that is there.

        Args:
            path: of the folder.
            meta: for run.json; a folder that is gone on with keeps the one it has.
            resume: False: the folder is new. True: go on after its last update, if it is there. A number: the next
                update has this number; what was recorded of it and of later ones is superseded, and stays on the disk.
            same: keys of `meta` in which a folder that is gone on with must agree, where it has them.

        Raises:
            FileExistsError: the folder is there and `resume` is False.
            BlockingIOError: another writer has it.
            ValueError: `resume` is negative; the folder is not one of these rows.
        """
        first = 0 if isinstance(resume, bool) else operator.index(resume)
        if first < 0:
            raise ValueError(f"resume: {resume}; must be True, False, or the number of the next update, at least 0.")
        self.path = Path(path)
        self._made = resume is False or not self.path.exists()
        if self._made:
            create_folder(self.path, meta)
            self._meta = complete_meta(meta)
        else:
            self._meta = _check_that_it_goes_on(self.path, complete_meta(meta), same)
        self._lock = FolderLock(self.path)
        self._pending: dict[str, list[pa.Table]] = {table: [] for table in TABLES}
        self._failure: OSError | None = None
        self._lost: list[int] = []
        self._marker: Part | None = None
        self.next_update = first
        """Number of the next update."""
        self.seconds = 0.0
        """Time recorded before, in s."""
        self._number = -1
        try:
            for table in TABLES:
                (self.path / table).mkdir(exist_ok=True)
            if not self._made:
                self._go_on(None if resume is True else first)
        except BaseException:
            self.discard()
            raise

    def add(self, table: str, rows: Mapping[str, Sequence[object] | np.ndarray]) -> None:
        """Keep rows for the next flush. Updates come in order; an update's own row comes with or after its others.

        rows: column -> values of equal length, a sequence or a float array; absent columns, None and NaN become null.
        """
        columns = schema(table)
        unknown = sorted(set(rows) - set(columns.names))
        if unknown:
            raise ValueError(f"{table}: no column {unknown[0]!r}; lcogeom.runs.columns lists them.")
        length = len(next(iter(rows.values())))
        if not length:
            return
        arrays = [_array(rows.get(field.name), length, field.type) for field in columns]
        self._pending[table].append(pa.Table.from_arrays(arrays, schema=columns))

    def flush(self) -> None:
        """Write what is pending as one part per table.

        Where the disk does not take it, this warns once and keeps the rows for the next flush, up to PENDING_BYTES;
        then the oldest updates are dropped, and counted.
        """
        if not self._pending["updates"]:  # rows without the row of their update would not be read
            return
        try:
            self._write()
        except OSError as error:
            first, self._failure = self._failure is None, error
            self._drop_oldest()
            if first:
                warnings.warn(
                    f"run {str(self.path)!r} cannot be written ({error.strerror or error}). Training goes on, and what "
                    f"was written stays readable. Up to {PENDING_BYTES >> 20} MiB are kept in memory and written once "
                    "that works again: make room, or bring the folder back.",
                    stacklevel=3,
                )
        else:
            self._pending = {table: [] for table in TABLES}

    def close(self) -> None:
        """Flush, say what was lost, and let the next writer in. May be called again."""
        try:
            self.flush()
            if self._pending["updates"]:
                self._lost += [step for rows in self._pending["updates"] for step in rows["step"].to_pylist()]
                self._pending = {table: [] for table in TABLES}
            lost, self._lost = self._lost, []
            if lost:
                warnings.warn(
                    f"run {str(self.path)!r}: {len(lost)} updates, of {lost[0]} to {lost[-1]}, are lost, because the "
                    f"folder could not be written ({self._failure}).",
                    stacklevel=3,
                )
        finally:
            self._lock.release()

    def discard(self) -> None:
        """Leave the disk as it was before this writer, which has written nothing."""
        if self._made:
            shutil.rmtree(self.path)
        elif self._marker is not None:
            self._marker.path.unlink()
        self._lock.release()

    def _go_on(self, first: int | None) -> None:
        """Find the place to go on from; supersede what was recorded from `first` on, None for nothing."""
        for table in TABLES:
            for left in (self.path / table).glob(".part-*"):  # half a part, of a writer that was killed
                left.unlink()
            self._number = max([self._number, *(part.number for part in list_parts(self.path / table))])
        done = list_parts(self.path / "updates")
        end = (done[-1].stop or 0) if done else 0  # the last part supersedes: it tells the end, even if it is shorter
        self.next_update = end if first is None else first
        self.seconds = _seconds_before(done, self.next_update)
        if self.next_update < end:
            self._number += 1
            updates = range(self.next_update, self.next_update)
            note = {"run": self._meta, "parts": {}}
            self._marker = write_part(
                self.path / "updates", self._number, updates, schema("updates").empty_table(), note
            )
        elif self.next_update > end:
            warnings.warn(
                f"resume: the last update in {str(self.path)!r} is {end - 1}; those from there to {first} were not "
                "written and will be missing. Call probe.flush() whenever a checkpoint is saved.",
                stacklevel=4,
            )

    def _write(self) -> None:
        self._lock.confirm()
        self._number += 1  # a new one for each attempt: what a failed one may leave behind is never taken for a part
        rows = {table: pa.concat_tables(pending) for table, pending in self._pending.items() if pending}
        ends = pc.min_max(rows["updates"]["step"]).as_py()
        updates = range(ends["min"], ends["max"] + 1)
        written: dict[str, Part] = {}
        try:
            for table in TABLES:
                note = None
                if table == "updates":
                    names = {other: part.path.name for other, part in written.items()}
                    note = {"run": self._meta, "parts": names}
                if table in rows:
                    written[table] = write_part(self.path / table, self._number, updates, rows[table], note)
        except OSError:
            for part in written.values():
                with contextlib.suppress(OSError):
                    part.path.unlink()
            raise

    def _drop_oldest(self) -> None:
        size = sum(rows.nbytes for pending in self._pending.values() for rows in pending)
        while size > PENDING_BYTES:
            oldest = pc.min(self._pending["updates"][0]["step"]).as_py()
            self._lost.append(oldest)
            for pending in self._pending.values():
                while pending and pc.min(pending[0]["step"]).as_py() <= oldest:
                    rows = pending.pop(0)
                    kept = rows.filter(pc.greater(rows["step"], oldest))
                    size -= rows.nbytes - kept.nbytes
                    if len(kept):
                        pending.insert(0, kept)
                        break


def _check_that_it_goes_on(path: Path, meta: Mapping[str, object], same: Sequence[str]) -> dict[str, object]:
    """The folder's own run.json."""
    damaged: list[str] = []
    there = read_meta(path, damaged)
    for line in damaged:
        warnings.warn(line, stacklevel=4)
    if there["schema"] < SCHEMA_VERSION or there["kind"] != meta["kind"]:
        raise ValueError(
            f"run: {str(path)!r} is {'a ' + str(there['kind'])} of schema {there['schema']}; this version goes on only "
            f"with a run of schema {SCHEMA_VERSION}. Give another folder."
        )
    for key in same:
        if key in there and there[key] != meta.get(key):
            raise ValueError(
                f"run: {str(path)!r} was recorded with {key}={there[key]!r}, not {meta.get(key)!r}. Attach with the "
                "same, or give another folder."
            )
    return there


def _seconds_before(parts: Sequence[Part], update: int) -> float:
    """The recorded time of the last update before this one, as far as it can be read."""
    for part in reversed(parts):
        with contextlib.suppress(DamagedPart):
            known = before(read_part(part), update)["seconds"].drop_null()
            if len(known):
                return float(known[-1].as_py())
        update = min(update, part.first or 0)
    return 0.0


def _array(values: Sequence[object] | np.ndarray | None, length: int, kind: pa.DataType) -> pa.Array:
    if values is None:
        return pa.nulls(length, kind)
    found = pa.array(values, from_pandas=True)  # NaN means "not known"
    return found if found.type == kind else found.cast(kind)
