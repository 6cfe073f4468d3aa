"""What `compare` found of two runs, and how it is written down."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lcogeom.diagnosis.markdown import figure, table

BOUNDED = ("cos", "share", "prob")
"""Columns between -1 and 1, compared by difference: those with such a word in their name."""


@dataclass(frozen=True)
class Compared:
    """One column of both runs."""

    column: str
    unit: str
    a: float | None
    """The median over the run's updates; None if it has none."""
    b: float | None
    a_extreme: float | None
    """The value furthest from 0; infinite if one was."""
    b_extreme: float | None
    shared: int
    """Updates at which both have a value."""
    differs: int | None
    """The first update at which the values are not equal (to 1e-6)."""
    parts: int | None
    """The first at which they differ by more than `Comparison.apart`, relatively; absolutely where the column lies
    between -1 and 1 (cosines, shares, probabilities). A value that is finite in one run alone parts, too."""


@dataclass(frozen=True)
class Layer:
    """One layer of both runs: medians of its gradient's norm over the updates that both have."""

    name: str
    a: float
    b: float


@dataclass(frozen=True)
class Directions:
    """Cosines between the two runs, from their sketches: to 0.008 (one standard error) at 16384 numbers."""

    start: float
    """Of the weights before the first update: 1 where both started from the same."""
    first_gradient: float
    """Of the gradients of the first update that both have."""
    gradient: float
    """Median over the updates of the cosine of the two gradients."""
    step: float
    """The same of the steps."""
    travelled: float
    """Of what all steps together came to, over the updates that both have."""


@dataclass(frozen=True)
class Comparison:
    """Two runs, A and B."""

    a: str
    b: str
    updates: tuple[int, int]
    common: int
    """Updates that both have, by number."""
    apart: float
    columns: tuple[Compared, ...]
    layers: tuple[Layer, ...]
    """In the order of the model; empty where the two name no layer alike."""
    directions: Directions | None
    """None where a run has no sketches, or those of another size."""
    settings: tuple[tuple[str, str, str], ...]
    """(what, A's, B's) of run.json that differ."""
    notes: tuple[str, ...]

    @property
    def differ(self) -> int | None:
        """The first update at which any column differs; None if the records are the same."""
        return min((one.differs for one in self.columns if one.differs is not None), default=None)

    @property
    def part(self) -> int | None:
        """The first update at which any column differs by more than `apart`."""
        return min((one.parts for one in self.columns if one.parts is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite is its text."""
        return plain({**asdict(self), "differ": self.differ, "part": self.part})

    def to_markdown(self) -> str:
        """For a terminal as well as for an issue."""
        return (
            "\n".join([*_verdict(self), "", *_columns(self), *_directions(self), *_layers(self), *_rest(self)]) + "\n"
        )


def _verdict(found: Comparison) -> list[str]:
    lines = [f"A: {found.a} ({found.updates[0]} updates)", f"B: {found.b} ({found.updates[1]} updates)", ""]
    if found.differ is None:
        return [*lines, f"The {found.common} updates that both have are the same in every column."]
    told = [one.column for one in found.columns if one.differs == found.differ]
    lines.append(
        f"They differ from update {found.differ} on ({', '.join(told[:4])}{', ...' if len(told) > 4 else ''})."
    )
    if found.part is None:
        return [*lines, f"They never part by more than {found.apart:g}."]
    told = [one.column for one in found.columns if one.parts == found.part]
    named = f"{', '.join(told[:4])}{', ...' if len(told) > 4 else ''}"
    return [*lines, f"They part, by more than {found.apart:g}, at update {found.part}: {named}."]


def _columns(found: Comparison) -> list[str]:
    rows = []
    for one in found.columns:
        bounded = any(word in one.column for word in BOUNDED)
        rows.append(
            (
                one.column,
                one.unit,
                figure(one.a),
                figure(one.b),
                _against(one.a, one.b, bounded),
                figure(one.a_extreme),
                figure(one.b_extreme),
                figure(one.differs),
                figure(one.parts),
            )
        )
    head = ("median of", "unit", "A", "B", "B / A", "A, extreme", "B, extreme", "differ from", "part at")
    return table(head, rows)


def _against(a: float | None, b: float | None, bounded: bool) -> str:
    if a is None or b is None:
        return "–"
    if bounded or a == 0 or a * b < 0:
        return f"{figure(b - a, signed=True)} (B − A)"
    return figure(b / a)


def _directions(found: Comparison) -> list[str]:
    if found.directions is None:
        return []
    said = {
        "weights at the start": found.directions.start,
        "first gradient": found.directions.first_gradient,
        "gradient, median over updates": found.directions.gradient,
        "step, median over updates": found.directions.step,
        "all steps together": found.directions.travelled,
    }
    rows = [(name, f"{value:.3f}".replace("nan", "–").replace("-", "−")) for name, value in said.items()]
    return ["", *table(("between A and B, of the", "cosine"), rows)]


def _layers(found: Comparison) -> list[str]:
    """The five whose medians are furthest apart; all are in `to_dict`."""
    known = [layer for layer in found.layers if layer.a > 0 and layer.b > 0]
    known.sort(key=lambda layer: -abs(math.log(layer.b / layer.a)))
    rows = [(layer.name, figure(layer.a), figure(layer.b), figure(layer.b / layer.a)) for layer in known[:5]]
    return ["", *table(("layers furthest apart: gradient norm", "A", "B", "B / A"), rows)] if rows else []


def _rest(found: Comparison) -> list[str]:
    lines = ["", *table(("setting", "A", "B"), found.settings)] if found.settings else []
    return [*lines, "", *(f"- {note}" for note in found.notes)] if found.notes else lines


def plain(value: Any) -> Any:
    """Values for JSON, which knows no NaN and no infinity: they become their text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
