"""Axes and lines in SVG: from numbers to pixels, with ticks that can be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lcogeom.diagnosis.page.text import escaped, figure

SMALLEST = 1e-300
MOST_TICKS = 5


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels."""

    start: float
    """Pixel of the lowest value; `end`, of the highest."""
    end: float
    low: float
    high: float
    bend: Callable[[np.ndarray], np.ndarray]
    """From values to what is spread evenly."""
    ticks: tuple[float, ...]

    def __call__(self, values: float | np.ndarray) -> np.ndarray:
        """Pixels; what lies outside is put on the edge."""
        low, high, at = (self.bend(np.asarray(one, dtype=np.float64)) for one in (self.low, self.high, values))
        return self.start + np.clip((at - low) / (high - low), 0, 1) * (self.end - self.start)


def linear(
    values: np.ndarray,
    start: float,
    end: float,
    *,
    low: float | None = None,
    high: float | None = None,
    most: int = MOST_TICKS,
) -> Axis:
    """An even axis around the finite values, widened to round numbers; `low` and `high` fix an end."""
    finite = values[np.isfinite(values)]
    bottom = low if low is not None else float(finite.min(initial=0 if not len(finite) else finite[0]))
    top = high if high is not None else float(finite.max(initial=1 if not len(finite) else finite[0]))
    if not bottom < top:
        room = abs(top) * 0.1 or 1.0
        bottom, top = (bottom if low is not None else top - room), top + room
    width = round_step((top - bottom) / (most - 1))
    bottom = bottom if low is not None else math.floor(bottom / width + 1e-9) * width
    top = top if high is not None else math.ceil(top / width - 1e-9) * width
    first, last = math.ceil(bottom / width - 1e-9), math.floor(top / width + 1e-9)
    ticks = tuple(float(f"{place * width:.12g}") for place in range(first, last + 1))
    return Axis(start, end, bottom, top, lambda x: x, ticks)


def logarithmic(values: np.ndarray, start: float, end: float) -> Axis:
    """A logarithmic axis around the finite positive values.

    A value that is next to 0 beside the others does not stretch it: nothing below a millionth of their median.
    """
    good = values[np.isfinite(values) & (values > 0)]
    if not len(good):
        good = np.ones(1)
    low, high = max(float(good.min()), float(np.median(good)) * 1e-6, SMALLEST), float(good.max())
    bottom, top = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if top - bottom <= 2:  # room for 1, 2 and 5
        marks = sorted(m * 10.0**power for power in range(bottom - 1, top + 1) for m in (1, 2, 5))
        below, above = [m for m in marks if m <= low * 1.0001], [m for m in marks if m >= high * 0.9999]
        low, high = below[-1] if below else marks[0], above[0] if above else 10.0**top
        if low == high:
            low, high = low / 2, high * 2
        ticks = [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]
        if len(ticks) > MOST_TICKS:
            ticks = [mark for mark in ticks if f"{mark:e}".startswith("1")] or ticks[:: len(ticks) // 3]
    else:
        stride = math.ceil((top - bottom) / (MOST_TICKS - 1))
        low, high = 10.0**bottom, 10.0**top
        ticks = [10.0**power for power in range(bottom, top + 1, stride)]
    return Axis(start, end, low, high, _log10, tuple(ticks))


def symmetric_log(values: np.ndarray, start: float, end: float, *, even: float, most: int) -> Axis:
    """A logarithmic axis for both signs, even between -`even` and `even`, with up to `most` ticks to each side."""
    finite = np.abs(values[np.isfinite(values)])
    reach = math.ceil(math.log10(max(float(finite.max(initial=0)), even * 10) / even) - 1e-9)
    stride = max(1, math.ceil((reach + 1) / most))
    sizes = [even * 10.0**power for power in range(reach, -1, -stride)]
    ticks = tuple([-size for size in sizes] + [0.0] + sizes[::-1])
    top = even * 10.0**reach

    def bend(x: np.ndarray) -> np.ndarray:
        size = np.abs(x) / even
        return np.sign(x) * np.where(size <= 1, size * 0.6, 0.6 + _log10(np.maximum(size, 1)))

    return Axis(start, end, -top, top, bend, ticks)


def probability(values: np.ndarray, start: float, end: float, edge: float) -> Axis:
    """log(p / (1 - p)) around p = 1/2 and the values (N,); what is nearer to 0 or 1 than `edge` is put there."""
    low = min(float(values.min(initial=0.01)), 0.005)
    high = max(float(values.max(initial=0.99)), 0.995)
    low = max(10.0 ** math.floor(math.log10(max(low, SMALLEST))), edge)
    high = min(1 - 10.0 ** math.floor(math.log10(max(1 - high, SMALLEST))), 1 - edge)

    def bend(p: np.ndarray) -> np.ndarray:
        inside = np.clip(p, edge, 1 - edge)
        return np.log(inside) - np.log1p(-inside)

    ticks = tuple(tick for tick in (1e-6, 1e-4, 1e-2, 0.5, 0.99, 0.9999, 0.999999) if low <= tick <= high)
    return Axis(start, end, low, high, bend, ticks)


def round_step(width: float) -> float:
    """The next of 1, 2, 5, 10, ... at or above a width."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= width * 0.999)


def polylines(x: np.ndarray, y: np.ndarray, style: str) -> str:
    """Lines through pixels (N,), (N,), broken where y is NaN; a point alone between gaps is a dot."""
    parts, good = [], np.isfinite(y)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], good.astype(int), [0]])))
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        if last - first == 1:
            parts.append(f'<circle class="dot {style}" cx="{x[first]:.1f}" cy="{y[first]:.1f}" r="2"/>')
        else:
            parts.append(f'<polyline class="{style}" points="{pairs(x[first:last], y[first:last])}"/>')
    return "".join(parts)


def pairs(x: np.ndarray, y: np.ndarray) -> str:
    """x,y x,y ... to a tenth of a pixel."""
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def label(x: float, y: float, text: object, *, anchor: str = "start", style: str = "") -> str:
    """A text; anchor is start, middle or end."""
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def cross(x: float, y: float, size: float = 4) -> str:
    """Where a value was not finite."""
    d = f"M{x - size:.1f} {y - size:.1f}l{2 * size} {2 * size}m0 {-2 * size}l{-2 * size} {2 * size}"
    return f'<path class="cross" d="{d}"/>'


def tick_text(value: float) -> str:
    """A probability next to 1 is written as what it lacks."""
    return f"1−{figure(float(f'{1 - value:.3g}'))}" if 0.9999 < value < 1 else figure(value)


def left_axis(axis: Axis, left: float, right: float) -> str:
    """Horizontal grid lines with their values at the left."""
    parts = []
    for tick in axis.ticks:
        y = float(axis(tick))
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(label(left - 6, y + 4, figure(tick), anchor="end", style="tick"))
    return "".join(parts)


def bottom_axis(axis: Axis, top: float, bottom: float, *, grid: bool = True) -> str:
    """Values below, with vertical grid lines."""
    parts = []
    for tick in axis.ticks:
        x = float(axis(tick))
        parts.append(f'<path class="grid" d="M{x:.1f} {top if grid else bottom - 4:.1f}V{bottom:.1f}"/>')
        parts.append(label(x, bottom + 15, tick_text(tick), anchor="middle", style="tick"))
    return "".join(parts)


def drawing(width: float, height: float, says: str, parts: Sequence[str], extra: str = "") -> str:
    """An SVG that fills the width it is given; `says` is what a reader hears who cannot see it."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escaped(says)}"{extra}>{"".join(parts)}</svg>'
    )


def _log10(x: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(x, SMALLEST))
