"""The layer profile of one update: each layer's gradient and step beside what was usual before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lcogeom.diagnosis.page import svg
from lcogeom.diagnosis.page.text import figure, numbers

WIDTH, RIGHT, TOP, BELOW = 560.0, 76.0, 10.0, 48.0
BEFORE = 100
"""Updates before the event whose median is what was usual."""
MEASURES = {
    "grad_norm": ("Layer profile: gradient", "gradient norm (loss / weight)"),
    "update_norm": ("Layer profile: step", "norm of the step (weight)"),
}


@dataclass(frozen=True, eq=False)
class Profile:
    """One measure of every layer."""

    measure: str
    update: int
    names: list[str]
    now: np.ndarray
    """(L,), at the update."""
    usual: np.ndarray
    """(L,), the median before it; NaN where there was none."""


def layers(norms: pd.DataFrame, update: int, where: str | None) -> str:
    """One chart for the gradient and one for the step, a row for each layer in the order of the model.

    Args:
        norms: the run's table.
        update: `step`.
        where: a layer that a finding names; it is marked.
    """
    if not {"step", "scope", "name"} <= set(norms.columns):
        return "<p>No norms of layers were recorded.</p>"
    rows = norms[norms["scope"] == "layer"]
    steps = numbers(rows, "step")
    names = list(dict.fromkeys(rows["name"][steps == update].astype(str)))
    if not names:
        return "<p>No norms of the layers of this update were recorded.</p>"
    charts = []
    for measure in MEASURES:
        values = pd.Series(numbers(rows, measure), index=rows["name"].astype(str))
        now = values[steps == update].groupby(level=0, sort=False).first().reindex(names).to_numpy()
        known = values[(steps < update) & (steps >= update - BEFORE)]
        usual = known[np.isfinite(known)].groupby(level=0).median().reindex(names).to_numpy()
        profile = Profile(measure, update, names, now, usual)
        if not (np.isnan(now).all() and np.isnan(usual).all()):
            charts.append(_chart(profile, where))
    return "".join(charts) or "<p>The norms of the layers of this update are empty.</p>"


def _chart(profile: Profile, where: str | None) -> str:
    names, now, usual = profile.names, profile.now, profile.usual
    short = [_short(name) for name in names]
    left = 16 + 6.9 * max(map(len, short))
    pitch = 16.0 if len(names) <= 20 else 13.0
    height = TOP + pitch * len(names) + BELOW
    across = svg.logarithmic(np.concatenate([now, usual]), left, WIDTH - RIGHT)
    parts = [svg.bottom_axis(across, TOP, height - BELOW)]
    rise = np.full(len(names), np.nan)
    both = (usual > 0) & ~np.isnan(now)
    rise[both] = now[both] / usual[both]
    top = np.nanmax(rise) if both.any() else np.nan
    for row, name in enumerate(names):
        y = TOP + pitch * (row + 0.5)
        chosen = where is not None and (where == name or where.startswith(f"{name}."))
        if chosen:
            parts.append(f'<rect class="chosen" x="0" y="{y - pitch / 2:.1f}" width="{WIDTH:g}" height="{pitch:g}"/>')
        parts.append(svg.label(left - 8, y + 4, short[row], anchor="end", style="tick bold" if chosen else "tick"))
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{WIDTH - RIGHT:g}"/>')
        bad = not np.isfinite(now[row])
        at, was = (float(across(value)) if np.isfinite(value) else WIDTH - RIGHT for value in (now[row], usual[row]))
        if np.isfinite(usual[row]):
            parts.append(f'<path class="stem" d="M{was:.1f} {y:.1f}H{at:.1f}"/>')
            parts.append(f'<circle class="was" cx="{was:.1f}" cy="{y:.1f}" r="3.6"/>')
        if bad:
            parts.append(svg.cross(WIDTH - RIGHT, y))
        else:
            parts.append(f'<circle class="now" cx="{at:.1f}" cy="{y:.1f}" r="4"/>')
        text = f"{figure(now[row])}" if bad else f"× {_times(rise[row])}" if np.isfinite(rise[row]) else ""
        heaviest = bool(np.isfinite(rise[row]) and rise[row] == top)
        parts.append(svg.label(WIDTH - RIGHT + 8, y + 4, text, style="tick bold" if heaviest or bad else "tick"))
    title, unit = MEASURES[profile.measure]
    parts.append(svg.label((left + WIDTH - RIGHT) / 2, height - 8, unit, anchor="middle", style="name"))
    marks = (
        '<span class="series"><svg class="key" viewBox="0 0 24 8"><circle class="now" cx="12" cy="4" r="3.4"/></svg>'
        f"update {profile.update}</span>"
        '<span class="series"><svg class="key" viewBox="0 0 24 8"><circle class="was" cx="12" cy="4" r="3.4"/></svg>'
        f"median of up to {BEFORE} updates before</span>"
        '<span class="series">right: how many times that</span>'
    )
    says = f"{unit} of each layer at update {profile.update}"
    return (
        f"<figure><figcaption><b>{title}</b><br>{marks}</figcaption>{svg.drawing(WIDTH, height, says, parts)}</figure>"
    )


def _times(value: float) -> str:
    return figure(float(f"{value:.2g}"))


def _short(name: str) -> str:
    """The end of a module path: layers.17, embed_tokens, lm_head."""
    parts = name.split(".")
    short = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
    return short if len(short) <= 22 else "…" + short[-21:]
