"""Part files: each complete or absent, each with a check of its every byte in its name, and which of them count.

    part-000003.30-40.9c1d22ab.parquet    the fourth flush: updates 30 to 39, CRC-32 of the whole file
    part-000003.30-40.parquet             not checked: someone changed it on purpose, and took the check out
    part-000003.parquet                   schema 1: neither range nor check

The `updates` part of a flush is written last. It names the flush's other parts, so they count with it or not at all.
A flush supersedes whatever earlier ones say of its first update and of all after it: that is how recording goes on
from an older checkpoint without deleting a row. A part of no updates (30-30) does just that.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lcogeom.runs.columns import schema

NAME = re.compile(r"part-([0-9]{6,})(?:\.([0-9]+)-([0-9]+))?(?:\.([0-9a-f]{8}))?\.parquet")
NOTE = b"lcogeom"
"""Key of the note that an `updates` part carries: {"run": content of run.json, "parts": {table: file name}}."""


class DamagedPart(Exception):
    """A part that cannot be read, or is not what was written."""


@dataclass(frozen=True)
class Part:
    """A part file, by its name alone."""

    path: Path
    number: int
    """Of its flush."""
    first: int | None
    stop: int | None
    """Its updates are first, ..., stop - 1; None in schema 1."""
    check: int | None
    """CRC-32 of the file; None: not checked."""

    def within(self, limit: float) -> bool:
        """Whether all of it counts, where updates from `limit` on are superseded."""
        return limit == float("inf") or (self.stop is not None and self.stop <= limit)

    def updates(self, limit: float) -> str:
        """Those before `limit`, in words."""
        if self.first is None or self.stop is None:
            return "its updates"
        last = int(min(self.stop, limit)) - 1
        return f"update {self.first}" if last == self.first else f"updates {self.first} to {last}"


@dataclass(frozen=True)
class Flush:
    """What one flush wrote, as far as it counts: of updates before `limit`."""

    part: Part
    updates: pa.Table
    parts: Mapping[str, Part]
    """table -> part, of the tables other than `updates`."""
    limit: float
    """The first update that a later flush supersedes, or infinity."""

    def rows(self, table: str) -> pa.Table | None:
        """The rows of one of its other tables; None where there are none.

        Raises:
            DamagedPart: says what is missing because of it.
        """
        if table not in self.parts:
            return None
        try:
            rows = read_part(self.parts[table])
        except DamagedPart as error:
            raise DamagedPart(f"{error}; {self.part.updates(self.limit)} lost their {table}") from None
        return rows if self.part.within(self.limit) else before(rows, self.limit)


def write_part(folder: Path, number: int, updates: range, rows: pa.Table, note: Mapping[str, object] | None) -> Part:
    """Write rows as one part. Once it has its name it is whole, and on the disk.

    Raises:
        OSError: the disk does not take it. No file is left.
    """
    if note is not None:
        rows = rows.replace_schema_metadata({NOTE: json.dumps(note).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    content = sink.getvalue()
    check = zlib.crc32(content)
    path = folder / f"part-{number:06d}.{updates.start}-{updates.stop}.{check:08x}.parquet"
    write_file(path, content)
    return Part(path, number, updates.start, updates.stop, check)


def write_file(path: Path, content: pa.Buffer | bytes) -> None:
    """Write a new file so that it is complete or absent at every moment, also if the power fails.

    Raises:
        OSError: the disk does not take it. No file is left.
    """
    aside = path.with_name("." + path.name)
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync_folder(path.parent)
    except OSError:
        for left in (path, aside):
            with contextlib.suppress(OSError):
                left.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    """The new name reaches the disk too; where folders cannot be synced, the operating system does it in time."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(handle)


def list_parts(folder: Path) -> list[Part]:
    """The parts of one table, oldest first; [] where it has none."""
    found = (_named(path) for path in folder.glob("part-*.parquet"))
    return sorted((part for part in found if part), key=lambda part: (part.number, part.path.name))


def read_part(part: Part) -> pa.Table:
    """All rows of a part.

    Raises:
        DamagedPart: a byte is not what was written, or (schema 1) parquet cannot make sense of it.
    """
    try:
        content = part.path.read_bytes()
    except OSError as error:
        raise DamagedPart(f"{_place(part.path)}: {error.strerror or error}") from None
    if part.check is not None and zlib.crc32(content) != part.check:
        raise DamagedPart(
            f"{_place(part.path)}: damaged (its bytes do not match the check in its name; if they were changed on "
            f"purpose, take '.{part.check:08x}' out of the name)"
        )
    try:
        # Most parts are small: sharing one out among threads costs more than it gains.
        rows = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=len(content) > 2**20)
        rows = _as_expected(rows, schema(part.path.parent.name))
    except (pa.ArrowException, OSError) as error:
        raise DamagedPart(f"{_place(part.path)}: damaged ({str(error).splitlines()[0]})") from None
    if "step" not in rows.column_names:
        raise DamagedPart(f"{_place(part.path)}: it has no column 'step'")
    return rows


def _as_expected(rows: pa.Table, expected: pa.Schema) -> pa.Table:
    """The known columns in their types; absent ones and strangers are left to the reader."""
    if rows.schema.equals(expected):
        return rows
    for place, field in enumerate(rows.schema):
        if field.name in expected.names and field.type != expected.field(field.name).type:
            values = rows.column(place).cast(expected.field(field.name).type)
            rows = rows.set_column(place, field.name, values)
    return rows


def flushes(path: Path, damaged: list[str]) -> list[Flush]:
    """The flushes of a run folder that count, oldest first. What cannot be read is added to `damaged`.

    Safe while the folder is written: no part is changed or removed, and an `updates` part appears after the others.
    """
    found: list[Flush] = []
    lost: list[str] = []
    limit = float("inf")
    for part in reversed(list_parts(path / "updates")):
        if part.first is not None and part.first >= limit:
            continue
        if part.first is not None and part.first == part.stop:  # no rows: its name says all of it
            limit = part.first
            continue
        try:
            rows = read_part(part)
        except DamagedPart as error:
            lost.append(f"{error}; {part.updates(limit)} lost")
        else:
            rows = rows if part.within(limit) else before(rows, limit)
            found.append(Flush(part, rows, _others(path, part, rows), limit))
        limit = limit if part.first is None else min(limit, part.first)
    damaged += lost[::-1]
    return found[::-1]


def newest_note(path: Path) -> dict[str, object] | None:
    """The content of run.json as the newest readable `updates` part keeps it; None where none does."""
    for part in reversed(list_parts(path / "updates")):
        with contextlib.suppress(DamagedPart):
            note = _note_of(read_part(part))
            if "run" in note:
                return note["run"]
    return None


def before(rows: pa.Table, limit: float) -> pa.Table:
    """The rows of updates before `limit`."""
    return rows.filter(pc.less(rows["step"], int(limit)))


def _others(path: Path, part: Part, rows: pa.Table) -> dict[str, Part]:
    """The parts that an `updates` part vouches for."""
    named = _note_of(rows).get("parts")
    files: list[Path] = []
    if named is not None:
        for table, name in named.items():
            file = path / table / str(name)
            unchecked = file.with_name(file.name.rsplit(".", 2)[0] + ".parquet")
            files.append(unchecked if unchecked.is_file() and not file.is_file() else file)
    else:  # schema 1, or someone rewrote it: whatever has its number
        for folder in path.iterdir():
            if folder.is_dir() and folder.name != "updates":
                same = folder / part.path.name
                files += [same] if same.is_file() else folder.glob(f"part-{part.number:06d}.*parquet")
    found = {file.parent.name: _named(file) for file in files}
    return {table: other for table, other in found.items() if other}


def _named(path: Path) -> Part | None:
    if not (match := NAME.fullmatch(path.name)):
        return None
    number, first, stop, check = match.groups()
    return Part(
        path,
        int(number),
        None if first is None else int(first),
        None if stop is None else int(stop),
        None if check is None else int(check, 16),
    )


def _place(path: Path) -> str:
    """run/table/part, as a user finds it."""
    return str(Path(*path.parts[-3:]))


def _note_of(rows: pa.Table) -> dict[str, dict[str, object]]:
    """The note in an `updates` part's rows; empty in schema 1."""
    metadata = rows.schema.metadata or {}
    return json.loads(metadata[NOTE]) if NOTE in metadata else {}
