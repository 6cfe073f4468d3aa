"""The completions that made an update's gradient, token by token, coloured by their part of it."""

from __future__ import annotations

import numpy as np

from lcogeom.diagnosis.page.text import escaped, figure, percent
from lcogeom.diagnosis.page.tokens import DETAILS, SHADES, Heavy, hover, shade

MOST_SEQUENCES = 8


def heatmap(heavy: Heavy) -> str:
    """The sequences with the largest part of the squared gradient, heaviest first."""
    if not len(heavy):
        return "<p>No tokens of this update were recorded, so there is no heat map and no phase diagram.</p>"
    part = np.nan_to_num(heavy.share * heavy.weight, nan=0.0)
    broken = np.isinf(heavy.norm)
    names, place = np.unique(np.nan_to_num(heavy.sequence, nan=-1), return_inverse=True)
    parts = np.bincount(place, part, len(names))
    first = np.lexsort((-parts, -np.bincount(place, broken, len(names))))
    shown = first[:MOST_SEQUENCES]
    lines = [_sequence(heavy, np.flatnonzero(place == one), float(names[one]), float(parts[one])) for one in shown]
    rest = ""
    if len(names) > len(shown):
        left = parts[first[MOST_SEQUENCES:]].sum()
        rest = (
            f"<p class='small'>{len(names) - len(shown)} more sequences, together {percent(left)}, are not shown.</p>"
        )
    labels = escaped("|".join(DETAILS))
    return f'{_legend(heavy)}<div class="heat" data-labels="{labels}">{"".join(lines)}</div>{rest}'


def _sequence(heavy: Heavy, rows: np.ndarray, name: float, part: float) -> str:
    rows = rows[np.argsort(np.nan_to_num(heavy.position[rows]), kind="stable")]
    places = heavy.position[rows]
    pieces = []
    expected = 0.0
    for row, place in zip(rows, places, strict=True):
        missing = place - expected
        if missing > 0:
            pieces.append(f'<span class="gap" title="{missing:.0f} tokens not recorded">⋯{missing:.0f}⋯</span>')
        convex = " bent" if heavy.convex[row] == 0 else ""
        pieces.append(
            f'<span class="t {shade(heavy, row)}{convex}" {hover(heavy, row)}>{_token(heavy.text[row])}</span>'
        )
        if heavy.text[row].endswith("\n") and row != rows[-1]:
            pieces.append("<br>")
        expected = place + 1
    some = heavy.advantage[rows][~np.isnan(heavy.advantage[rows])]
    says = [f"sequence {name:.0f}" if name >= 0 else "sequence not known"]
    if len(some):
        low, high = figure(some.min()), figure(some.max())
        says.append(f"A = {low}" if low == high else f"A from {low} to {high}")
    says.append(percent(part))
    text = f'<div class="text">{"".join(pieces)}</div>'
    return f'<div class="sequence"><div class="small">{" · ".join(says)}</div>{text}</div>'


def _token(text: str) -> str:
    return escaped(text) if text else '<span class="empty">∅</span>'


def _legend(heavy: Heavy) -> str:
    bounds = ["less", *(f"≥ {100 * bound:g} %" for bound in SHADES)]
    up, down = (
        "".join(f'<span class="t {way}{level}">{text}</span>' for level, text in enumerate(bounds)) for way in "ud"
    )
    counted = f"{heavy.recorded} tokens recorded"
    if heavy.stands_for > heavy.recorded + 0.5:
        counted += f", standing for {heavy.stands_for:.0f}"
    if heavy.recorded > len(heavy):
        counted += f"; the {len(heavy)} with the largest gradient are on this page"
    return (
        f'<p class="legend">Share of a token, or a sequence, in the update\'s squared gradient norm in the logits: '
        f'<span class="keys">{up} pushed up</span> <span class="keys">{down} pushed down</span> '
        f'<span class="keys"><span class="t u0 bent">underlined</span> loss not convex there</span> '
        f"{_without_number(heavy)} · {counted}. "
        f"Point at a token for its numbers.</p>"
    )


def _without_number(heavy: Heavy) -> str:
    keys = {"bad": ("hatched", "gradient infinite"), "unknown": ("framed", "gradient not known")}
    there = {"bad": np.isinf(heavy.norm).any(), "unknown": np.isnan(heavy.norm).any()}
    return "".join(
        f'<span class="keys"><span class="t {kind}">{name}</span> {says}</span>'
        for kind, (name, says) in keys.items()
        if there[kind]
    )
