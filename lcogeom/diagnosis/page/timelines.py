"""The time lines: what every update was like, with the updates marked that the findings name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lcogeom.diagnosis.finding import Report
from lcogeom.diagnosis.page import svg
from lcogeom.diagnosis.page.text import escaped, numbers

WIDTH, LEFT, RIGHT, HIGH, BELOW = 560.0, 72.0, 10.0, 120.0, 36.0
CHIP = 15.0
"""Height of a row of markers above a panel."""
MOST_POINTS = 800
"""Of one line; of a longer one the smallest and largest value of each stretch are drawn."""
CLOSE_UP = 40
"""Updates to each side of the first finding that are drawn again, where the run is more than five times as long."""


@dataclass(frozen=True)
class Marker:
    """An update that findings name."""

    x: float
    middle: float
    """Of its label, which may stand beside the line at an edge."""
    row: int
    """Of its label: those of one row do not overlap."""
    text: str
    first: bool


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    scale: str
    """'log', 'linear', 'signed' (logarithmic to both sides of 0), 'share' (0 to 1) or 'cosine' (-1 to 1)."""
    series: Mapping[str, str]
    """Column of `updates` -> what its line is."""
    always: bool = False
    """A gap means that the value was not finite, not that it was not known."""


PANELS = (
    Panel(
        "Gradient norm",
        "loss / weight",
        "log",
        {"grad_norm": "before clipping", "grad_norm_clipped": "as the optimiser got it"},
        always=True,
    ),
    Panel("Norm of the step", "weight", "log", {"update_norm": "θ after − θ before"}, always=True),
    Panel("Gradient norm in the logits", "loss", "log", {"logit_grad_norm": "all completion tokens"}),
    Panel("Loss", "loss", "signed", {"loss": "as back-propagated"}, always=True),
    Panel(
        "Ratio, current / behaviour policy",
        "1",
        "log",
        {"ratio_max": "largest", "ratio_median": "median", "ratio_min": "smallest"},
    ),
    Panel("Entropy", "nat", "linear", {"entropy": "mean over tokens"}),
    Panel(
        "Probability of the actions",
        "1",
        "share",
        {"action_prob": "mean", "action_prob_positive": "where A > 0", "action_prob_negative": "where A < 0"},
    ),
    Panel("Convex tokens", "share", "share", {"convex_share": "loss convex in the logits"}),
    Panel(
        "Direction",
        "cosine",
        "cosine",
        {"step_grad_cos": "step with −gradient", "grad_cos_prev": "gradient with the one before"},
    ),
    Panel("Reward", "reward", "linear", {"reward": "of the rollout", "heldout_reward": "held out"}),
    Panel("Learning rate", "1", "log", {"learning_rate": "of this update"}),
)


def timelines(report: Report, updates: pd.DataFrame, units: Mapping[str, str]) -> str:
    """Every panel that the run has columns for, and those of the evidence; the whole run, then the event close up.

    units: column of `updates` -> its unit, from the glossary.
    """
    updates = updates.sort_values("step", kind="stable") if "step" in updates.columns else updates.iloc[:0]
    if updates.empty:
        return "<p>No updates were recorded.</p>"
    events = events_of(report)
    panels = [panel for panel in [*PANELS, *_of_evidence(report, updates, units)] if _known(panel, updates)]
    if not panels:
        return "<p>None of the columns recorded are known here; nothing to draw.</p>"
    parts = [_panels(panels, updates, events)]
    steps = numbers(updates, "step")
    if events and len(updates) > 10 * CLOSE_UP:
        around = np.abs(steps - next(iter(events))) <= CLOSE_UP
        parts.append(f"<h3>Close up: {CLOSE_UP} updates to each side of the first finding</h3>")
        parts.append(_panels([p for p in panels if _known(p, updates[around])], updates[around], events))
    return "".join(parts)


def events_of(report: Report) -> dict[int, str]:
    """Update -> the numbers of the findings that begin there, the first finding's first."""
    events: dict[int, list[str]] = {}
    for number, finding in enumerate(report.findings, 1):
        events.setdefault(finding.update, []).append(str(number))
    return {update: ", ".join(found) for update, found in events.items()}


def _of_evidence(report: Report, updates: pd.DataFrame, units: Mapping[str, str]) -> list[Panel]:
    drawn = {name for panel in PANELS for name in panel.series} | {"step"}
    panels = []
    for finding in report.findings:
        for one in finding.evidence:
            if one.table in ("updates", "log") and one.column in updates.columns and one.column not in drawn:
                drawn.add(one.column)
                values = numbers(updates, one.column)
                finite = values[np.isfinite(values)]
                wide = len(finite) > 0 and finite.min() > 0 and finite.max() > 20 * finite.min()
                unit, scale = units.get(one.column, ""), "log" if wide else "linear"
                panels.append(Panel(one.column, unit, scale, {one.column: "as recorded"}))
    return panels


def _known(panel: Panel, updates: pd.DataFrame) -> bool:
    return any(not np.isnan(numbers(updates, name)).all() for name in panel.series)


def _panels(panels: Sequence[Panel], updates: pd.DataFrame, events: Mapping[int, str]) -> str:
    steps = numbers(updates, "step")
    low, high = steps.min(), steps.max()
    if low == high:
        low, high = low - 1, high + 1
    across = svg.linear(steps, LEFT, WIDTH - RIGHT, low=float(low), high=float(high), most=9)
    markers = _markers({at: text for at, text in events.items() if low <= at <= high}, across)
    drawn = "".join(_panel(panel, updates, across, markers) for panel in panels)
    return f'<div class="panels" data-x="{low:g} {high:g} {LEFT:g} {WIDTH - RIGHT:g}">{drawn}</div>'


def _markers(events: Mapping[int, str], across: svg.Axis) -> list[Marker]:
    ends: list[float] = []  # of each row, so far
    markers = []
    for at in sorted(events):
        x, half = float(across(at)), _wide(events[at]) / 2
        middle = min(max(x, LEFT + half), WIDTH - RIGHT - half)
        row = next((row for row, end in enumerate(ends) if end + 2 < middle - half), len(ends))
        ends[row : row + 1] = [middle + half]
        markers.append(Marker(x, middle, row, events[at], first=at == next(iter(events))))
    return markers


def _wide(text: str) -> float:
    return 8 + 7.0 * len(text)


def _panel(panel: Panel, updates: pd.DataFrame, across: svg.Axis, markers: Sequence[Marker]) -> str:
    top = 4 + CHIP * max([1, *(marker.row + 1 for marker in markers)])
    bottom = top + HIGH
    steps = numbers(updates, "step")
    lines = {name: numbers(updates, name) for name in panel.series}
    lines = {name: values for name, values in lines.items() if not np.isnan(values).all()}
    up = _scale(panel.scale, np.concatenate(list(lines.values())), bottom, top)
    parts = [svg.left_axis(up, LEFT, WIDTH - RIGHT), svg.bottom_axis(_whole(across), top, bottom)]
    parts.append(svg.label(WIDTH - RIGHT, bottom + 31, "update", anchor="end", style="name"))
    for marker in markers:
        wide, y = _wide(marker.text), 2 + CHIP * marker.row
        kind = "event first" if marker.first else "event"
        parts.append(f'<path class="{kind}" d="M{marker.x:.1f} {y + CHIP - 2:.1f}V{bottom:.1f}"/>')
        box = (
            f'<rect class="chip" x="{marker.middle - wide / 2:.1f}" y="{y:.1f}" width="{wide:.1f}" height="13" rx="3"/>'
        )
        parts.append(box + svg.label(marker.middle, y + 10.5, marker.text, anchor="middle", style="chiptext"))
    legend = []
    for place, (name, values) in enumerate(lines.items()):
        chosen = thinned(values)
        across_page = across(steps[chosen])
        heights = np.where(np.isfinite(values[chosen]), up(values[chosen]), np.nan)
        parts.append(svg.polylines(across_page, heights, f"line s{place}"))
        parts += [svg.cross(x, top + 5) for x in across_page[_not_finite(values[chosen], panel.always)]]
        readout = f'data-s="{_list(steps[chosen])}" data-v="{_list(values[chosen])}"'
        key = f'<svg class="key" viewBox="0 0 24 8"><path class="line s{place}" d="M0 4H24"/></svg>'
        legend.append(f'<span class="series" {readout}>{key}{escaped(panel.series[name])} <output></output></span>')
    parts.append(f'<path class="hair" d="M-9 {top:g}V{bottom:g}"/>')
    says = f"{panel.title} against updates"
    unit = f' <span class="unit">{escaped(panel.unit)}</span>' if panel.unit not in ("", "1") else ""
    return (
        f'<figure class="panel"><figcaption><b>{escaped(panel.title)}</b>{unit}<br>{"".join(legend)}'
        f"</figcaption>{svg.drawing(WIDTH, bottom + BELOW, says, parts)}</figure>"
    )


def thinned(values: np.ndarray) -> np.ndarray:
    """Places (K,) to draw of a line (N,): all, or the lowest, the highest and the first not finite of each stretch."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    chosen = [np.array([0, len(values) - 1])]
    for stretch in np.array_split(np.arange(len(values)), MOST_POINTS // 2):
        some = values[stretch]
        chosen.append(
            stretch[[np.argmin(np.nan_to_num(some, nan=np.inf)), np.argmax(np.nan_to_num(some, nan=-np.inf))]]
        )
        chosen.append(stretch[~np.isfinite(some)][:1])
    return np.unique(np.concatenate(chosen))


def _not_finite(values: np.ndarray, always: bool) -> np.ndarray:
    """Where a cross is drawn. A column that was not recorded at first, or no longer, is not a fault of the run."""
    if not always:
        return np.isinf(values)
    known = np.flatnonzero(~np.isnan(values))
    return ~np.isfinite(values) & (np.arange(len(values)) >= known[0])


def _scale(scale: str, values: np.ndarray, bottom: float, top: float) -> svg.Axis:
    if scale == "log":
        return svg.logarithmic(values, bottom, top)
    if scale == "share":
        return svg.linear(values, bottom, top, low=0, high=1)
    if scale == "cosine":
        return svg.linear(values, bottom, top, low=-1, high=1)
    if scale == "signed":
        finite = np.abs(values[np.isfinite(values)])
        usual = float(np.median(finite)) if len(finite) else 1.0
        if len(finite) and finite.max() > 50 * max(usual, 1e-12):
            return svg.symmetric_log(values, bottom, top, even=10.0 ** np.ceil(np.log10(max(usual, 1e-12))), most=2)
        return svg.linear(values, bottom, top)
    finite = values[np.isfinite(values)]
    return svg.linear(values, bottom, top, low=0.0 if len(finite) and finite.min() >= 0 else None)


def _whole(across: svg.Axis) -> svg.Axis:
    """Updates are counted: no tick between two of them."""
    ticks = tuple(tick for tick in across.ticks if tick == int(tick))
    return svg.Axis(across.start, across.end, across.low, across.high, across.bend, ticks)


def _list(values: np.ndarray) -> str:
    return " ".join("-" if np.isnan(value) else f"{value:.5g}" for value in values)
