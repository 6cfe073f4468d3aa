"""From a chunk of rows to flat tokens: numbers taken out of cells, lists exploded, masks applied, broken rows named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lcogeom.audit.columns import NUMBERS, Plan
from lcogeom.audit.formats import RawChunk

LOGPROB_TOLERANCE = 1e-3
"""A log-probability up to this far above 0 is the rounding of a bf16 softmax, and counts as 0."""
ONE_FOR_ALL = ("advantages",)
"""Roles of which a list-valued row may hold one number for all its tokens."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """One column's cells as numbers: row i holds `lengths[i]` of `values`, one after another."""

    values: np.ndarray
    """(sum of lengths,) float64; NaN where missing."""
    lengths: np.ndarray
    """(R,) int64."""
    listed: np.ndarray
    """(R,) bool: the cell was a list."""
    bad: dict[int, str]
    """Row -> why its cell is no number and no list of numbers."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a chunk that count, flat: T of them."""

    values: dict[str, np.ndarray]
    """Role -> (T,) float64."""
    rows: np.ndarray
    """(T,) int64: which row of the chunk."""
    places: np.ndarray
    """(T,) int64: which element of the row's list, from 0."""
    masked: int
    """Tokens that a mask left out."""
    clamped: int
    """Log-probabilities in (0, LOGPROB_TOLERANCE] that were set to 0."""
    broken: list[tuple[int, str]]
    """(row number, why), in the file's order; none of their tokens is here."""
    chunk: RawChunk
    listed: np.ndarray
    """(R,) bool: the row is a sequence."""

    def label(self, column: str | None, token: int, *, whole_row: bool = False) -> object:
        """What a column says of one token, as it stands in the file; None where it says nothing.

        whole_row: one value for a list-valued row stands for all its tokens.
        """
        if column is None:
            return None
        row = int(self.rows[token])
        cell = self.chunk.cells[column][row]
        if isinstance(cell, pa.Scalar):
            cell = cell.as_py()
        if not self.listed[row]:
            return cell
        if isinstance(cell, str) and cell.startswith("["):
            cell = _load(cell)
        if isinstance(cell, list):
            place = int(self.places[token])
            return cell[place] if place < len(cell) else None
        return cell if whole_row else None


def explode(chunk: RawChunk, plan: Plan) -> Tokens:
    """The chunk's tokens.

    A row is broken where a cell holds no number, where its lists differ in length (one advantage for a whole list is
    fine), or where a token that counts has no finite value of a required role, or a log-probability above
    LOGPROB_TOLERANCE. What masked tokens hold does not matter.

    Raises:
        ValueError: a column of a type that holds no numbers.
    """
    roles = [role for role in NUMBERS if role in plan.columns]
    names = [plan.columns[role] for role in roles] + list(plan.masks)
    columns = [_numbers(chunk.cells[name], name) for name in names]
    lead = columns[0]
    why: dict[int, str] = {}
    for role, name, column in zip([*roles, *plan.masks], names, columns, strict=True):
        if role in plan.required or role in plan.masks:
            for row, reason in column.bad.items():
                why.setdefault(row, f"{name}: {reason}")
            for row in np.flatnonzero(~_fits(role, column, lead)).tolist():
                found = f"{column.lengths[row]} values" if column.listed[row] else "one value"
                why.setdefault(row, f"{name}: {found} for the {lead.lengths[row]} of {names[0]}")

    fine = np.ones(len(chunk.numbers), dtype=bool)
    fine[list(why)] = False
    rows = np.repeat(np.flatnonzero(fine), lead.lengths[fine])  # (T,)
    ends = np.cumsum(lead.lengths[fine])
    places = np.arange(len(rows)) - np.repeat(ends - lead.lengths[fine], lead.lengths[fine])
    flat = {
        role: _spread(column, rows, places, _fits(role, column, lead))
        for role, column in zip([*roles, *plan.masks], columns, strict=True)
    }

    counts = np.ones(len(rows), dtype=bool)
    for name in plan.masks:
        _note(why, ~np.isfinite(flat[name]), rows, places, f"{name} is missing or not finite")
        counts &= flat[name] != 0
    for role in plan.required:
        name = plan.columns[role]
        _note(why, counts & ~np.isfinite(flat[role]), rows, places, f"{name} is missing or not finite")
        if role != "advantages":
            high = counts & (flat[role] > LOGPROB_TOLERANCE)
            _note(why, high, rows, places, f"{name} is above 0, which no log-probability is")

    fine[list(why)] = False
    masked = int((~counts & fine[rows]).sum())
    keep = counts & fine[rows]
    values = {role: flat[role][keep] for role in roles}
    clamped = 0
    for role in plan.required:
        if role != "advantages":
            clamped += int((values[role] > 0).sum())
            values[role] = np.minimum(values[role], 0.0)
    broken = sorted([*chunk.broken, *((int(chunk.numbers[row]), reason) for row, reason in why.items())])
    return Tokens(values, rows[keep], places[keep], masked, clamped, broken, chunk, lead.listed)


def _fits(role: str, column: Numbers, lead: Numbers) -> np.ndarray:
    """Which rows have a value for each token, (R,) bool."""
    return (column.lengths == lead.lengths) | (~column.listed & (role in ONE_FOR_ALL))


def _spread(column: Numbers, rows: np.ndarray, places: np.ndarray, fits: np.ndarray) -> np.ndarray:
    """The column's value at each token, (T,); NaN where its row does not fit."""
    starts = np.cumsum(column.lengths) - column.lengths
    index = starts[rows] + np.where(column.listed[rows], places, 0)
    values = np.append(column.values, np.nan)
    return values[np.where(fits[rows], index, -1)]


def _note(why: dict[int, str], wrong: np.ndarray, rows: np.ndarray, places: np.ndarray, what: str) -> None:
    for token in np.flatnonzero(wrong)[::-1]:  # backwards: the first of a row is what stays
        why[int(rows[token])] = f"{what} (token {places[token] + 1} of the row)"


def _numbers(cells: Sequence[Any] | pa.Array, name: str) -> Numbers:
    if isinstance(cells, pa.Array):
        return _from_arrow(cells, name)
    try:
        table = np.array(cells, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):  # lists of several lengths, or something that is no number
        return _one_by_one(cells)
    if table.ndim == 1:
        return Numbers(table, np.ones(len(table), np.int64), np.zeros(len(table), bool), {})
    if table.ndim == 2:
        count, width = table.shape
        return Numbers(table.ravel(), np.full(count, width, np.int64), np.ones(count, bool), {})
    return _one_by_one(cells)


def _from_arrow(cells: pa.Array, name: str) -> Numbers:
    kind = cells.type
    if pa.types.is_dictionary(kind):
        return _from_arrow(cells.dictionary_decode(), name)
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    inner = cells.flatten() if listed else cells
    if pa.types.is_string(inner.type) or pa.types.is_large_string(inner.type):
        return _one_by_one(cells.to_pylist())
    try:
        values = pc.cast(inner, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"column {name!r} holds {kind}; it must hold numbers or lists of numbers.") from error
    if not listed:
        return Numbers(values, np.ones(len(cells), np.int64), np.zeros(len(cells), bool), {})
    lengths = pc.fill_null(pc.list_value_length(cells), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    missing = np.flatnonzero(cells.is_null().to_numpy(zero_copy_only=False))
    return Numbers(values, lengths, np.ones(len(cells), bool), {int(row): "missing" for row in missing})


def _one_by_one(cells: Sequence[Any]) -> Numbers:
    parts, bad = [], {}
    for row, cell in enumerate(cells):
        value = np.array(np.nan)
        try:
            value = _number(cell)
        except (ValueError, TypeError, OverflowError, RecursionError):
            bad[row] = f"{_short(cell)} is no number and no list of numbers"
        parts.append(value)
    lengths = np.array([part.size for part in parts], dtype=np.int64)
    values = np.concatenate([part.ravel() for part in parts]) if parts else np.empty(0)
    return Numbers(values, lengths, np.array([part.ndim == 1 for part in parts], dtype=bool), bad)


def _number(cell: object) -> np.ndarray:
    if isinstance(cell, str):
        text = cell.strip()
        if text.startswith("["):
            cell = json.loads(text)
        elif text.lower() in ("true", "false"):
            cell = text.lower() == "true"
        else:
            cell = text or None
    value = np.array(cell, dtype=np.float64)
    if value.ndim > 1:
        raise ValueError("nested lists")
    return value


def _load(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _short(cell: object) -> str:
    text = repr(cell)
    return text if len(text) <= 40 else f"{text[:37]}..."
