"""Files of logged tokens, read a bounded piece at a time: parquet, CSV and JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CHUNK_ROWS = 1 << 15
CHUNK_TOKENS = 1 << 17
CHUNK_BYTES = 1 << 22
LONGEST_LINE = 1 << 26
"""Bytes: 64 MiB hold a sequence of more than a million tokens; a longer line is a file without line ends."""
PEEKED_LINES = 100
_DECODE = json.JSONDecoder().decode


@dataclass(frozen=True, eq=False)
class RawChunk:
    """Some consecutive rows, not yet looked at."""

    numbers: np.ndarray
    """(R,) int64: the line where the row starts (CSV, JSON lines), or the row's place (parquet), from 1."""
    cells: dict[str, Any]
    """Column -> R cells: a list (of str in CSV), or a pyarrow array."""
    broken: list[tuple[int, str]]
    """Rows that could not be taken apart, not among the R: (number, why)."""
    done: float
    """Share of the file read so far, in [0, 1]."""


class Source(Protocol):
    """A file of one format."""

    format: str
    unit: str
    """What a row number counts: 'line' or 'row'."""
    columns: list[str]

    def chunks(self, wanted: Sequence[str]) -> Iterator[RawChunk]:
        """The rows in their order, `wanted` columns only."""


def open_source(path: Path) -> Source:
    """The file's reader, by its first bytes and its name (.parquet, .csv, .tsv, .jsonl, .ndjson, .json).

    Raises:
        FileNotFoundError, IsADirectoryError: not a file.
        ValueError: empty, damaged, or of no known format.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; give one parquet, CSV or JSON-lines file of it.")
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}.")
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise ValueError("the file is empty.")
    suffix = path.suffix.lower()
    if start == b"PAR1" or suffix in (".parquet", ".pq"):
        return ParquetSource(path)
    if suffix in (".csv", ".tsv"):
        return CsvSource(path, "\t" if suffix == ".tsv" else ",")
    if suffix in (".jsonl", ".ndjson", ".json"):
        return JsonLinesSource(path)
    raise ValueError(f"cannot tell the format from {path.suffix!r}. Name it .parquet, .csv, .tsv or .jsonl.")


class ParquetSource:
    """Parquet. Rows count from 1."""

    format, unit = "parquet", "row"

    def __init__(self, path: Path) -> None:
        try:
            # Pages are streamed: pre-buffering would hold each row group until the end, 20 MB a million tokens.
            self._file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        except pa.ArrowException as error:
            raise ValueError(f"not a readable parquet file ({str(error).splitlines()[0]}).") from error
        self.columns = list(self._file.schema_arrow.names)

    def chunks(self, wanted: Sequence[str]) -> Iterator[RawChunk]:
        read, total = 0, max(self._file.metadata.num_rows, 1)
        try:
            for batch in self._file.iter_batches(self._rows_a_chunk(wanted), columns=list(wanted)):
                numbers = np.arange(read + 1, read + 1 + batch.num_rows)
                read += batch.num_rows
                yield RawChunk(numbers, {name: batch.column(name) for name in wanted}, [], read / total)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"damaged after row {read} ({str(error).splitlines()[0]}).") from error

    def _rows_a_chunk(self, wanted: Sequence[str]) -> int:
        """So many rows that a chunk of list-valued rows holds about CHUNK_TOKENS tokens."""
        densest = 1.0
        for group in (self._file.metadata.row_group(i) for i in range(self._file.metadata.num_row_groups)):
            for column in (group.column(i) for i in range(group.num_columns)):
                if column.path_in_schema.split(".")[0] in wanted:
                    densest = max(densest, column.num_values / max(group.num_rows, 1))
        return max(1, int(CHUNK_TOKENS / densest))


class CsvSource:
    """CSV with a header line. A list is written as JSON inside a cell. Rows are named by the line they start on."""

    format, unit = "csv", "line"

    def __init__(self, path: Path, delimiter: str) -> None:
        self._path, self._delimiter = path, delimiter
        # The module's own limit is 131,072 characters a cell; a long sequence's list is longer.
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
        with path.open("rb") as raw:
            try:
                self.columns = [name.strip() for name in next(self._reader(raw), [])]
            except csv.Error as error:
                raise ValueError(f"line 1 is no CSV header ({error}).") from error

    def _reader(self, raw: io.BufferedReader) -> Any:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="")
        return csv.reader(text, delimiter=self._delimiter)

    def chunks(self, wanted: Sequence[str]) -> Iterator[RawChunk]:
        places = [self.columns.index(name) for name in wanted]
        with self._path.open("rb") as raw:
            size = max(raw.seek(0, io.SEEK_END), 1)
            raw.seek(0)
            reader = self._reader(raw)
            next(reader)
            more = True
            while more:
                numbers, rows, broken, more = self._some_rows(reader, raw)
                cells = {name: [row[place] for row in rows] for name, place in zip(wanted, places, strict=True)}
                yield RawChunk(np.array(numbers, dtype=np.int64), cells, broken, raw.tell() / size)

    def _some_rows(
        self, reader: Any, raw: io.BufferedReader
    ) -> tuple[list[int], list[list[str]], list[tuple[int, str]], bool]:
        """(line numbers, rows, broken rows, whether the file goes on)."""
        numbers: list[int] = []
        rows: list[list[str]] = []
        broken: list[tuple[int, str]] = []
        width, limit, line = len(self.columns), raw.tell() + CHUNK_BYTES, reader.line_num + 1
        try:
            for row in reader:
                if len(row) == width:
                    numbers.append(line)
                    rows.append(row)
                elif row:  # an empty line is no row
                    broken.append((line, f"has {len(row)} cells, the header {width}"))
                line = reader.line_num + 1
                if raw.tell() > limit or len(rows) + len(broken) >= CHUNK_ROWS:
                    return numbers, rows, broken, True
        except csv.Error as error:
            return numbers, rows, [*broken, (line, f"no CSV: {error}")], True
        return numbers, rows, broken, False


class JsonLinesSource:
    """One JSON object a line. Empty lines are passed over, and counted in the line numbers."""

    format, unit = "jsonl", "line"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.columns: list[str] = []
        with path.open("rb") as raw:
            for _, line in zip(range(PEEKED_LINES), _lines(raw), strict=False):
                row = _parse(line)
                if isinstance(row, dict):
                    self.columns += [name for name in row if name not in self.columns]
        if not self.columns:
            raise ValueError(f"no JSON object in its first {PEEKED_LINES} lines; write one object a line.")

    def chunks(self, wanted: Sequence[str]) -> Iterator[RawChunk]:
        numbers: list[int] = []
        rows: list[dict[str, object]] = []
        broken: list[tuple[int, str]] = []
        read = sent = 0

        def chunk() -> RawChunk:
            cells = {name: [row.get(name) for row in rows] for name in wanted}
            return RawChunk(np.array(numbers, dtype=np.int64), cells, broken, read / size)

        with self._path.open("rb") as raw:
            size = max(raw.seek(0, io.SEEK_END), 1)
            raw.seek(0)
            for number, line in enumerate(_lines(raw), 1):
                read += len(line)
                row = _parse(line)
                if isinstance(row, dict):
                    numbers.append(number)
                    rows.append(row)
                elif row is not None:
                    broken.append((number, str(row)))
                if read - sent > CHUNK_BYTES or len(rows) + len(broken) >= CHUNK_ROWS:
                    yield chunk()
                    numbers, rows, broken, sent = [], [], [], read
            yield chunk()


def _lines(raw: io.BufferedReader) -> Iterator[bytes]:
    for number, line in enumerate(iter(partial(raw.readline, LONGEST_LINE), b""), 1):
        if len(line) == LONGEST_LINE:
            raise ValueError(f"line {number} is longer than {LONGEST_LINE >> 20} MiB; write one JSON object a line.")
        yield line


def _parse(line: bytes) -> dict[str, object] | str | None:
    """The line's object; why it is none; None for an empty line."""
    text = line.decode("utf-8-sig", "replace").strip()
    if not text:
        return None
    try:
        row = _DECODE(text)
    except (ValueError, RecursionError) as error:
        return f"no JSON ({str(error) or 'nested too deep'})"
    if isinstance(row, dict):
        return row
    return f"a JSON {type(row).__name__}, not an object; write one object a line"
