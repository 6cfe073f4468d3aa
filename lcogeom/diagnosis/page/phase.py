"""The phase diagram of one update: where its tokens lie in (pi, A r), and where the surrogate is convex."""

from __future__ import annotations

import numpy as np

from lcogeom.diagnosis.page import svg
from lcogeom.diagnosis.page.text import visible
from lcogeom.diagnosis.page.tokens import Heavy, hover

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW = 560.0, 400.0, 64.0, 26.0, 12.0, 48.0
EDGE = 1e-7
"""Probabilities below EDGE or above 1 - EDGE are drawn there."""
MOST_POINTS = 800
NAMED = 6
"""Of the heaviest tokens, written beside their points."""
SURROGATES = ("ppo", "grpo", "dr-grpo", "dapo")
"""Objectives that are -A e^(l - l_old) where no clip is active (method.md, 2.1)."""
CURVED = (  # of those, method.md 2.2: (A r > 0, pi >= 1/2) -> what is negative
    (True, False, "one negative eigenvalue", "one"),
    (True, True, "convex", "none"),
    (False, False, "V − 2 negative", "most"),
    (False, True, "V − 1 negative", "all"),
)
STRAIGHT = ("sft", "reinforce", "rloo", "cispo")
"""Objectives with f'' = 0: convex exactly where f' <= 0."""


def phase(heavy: Heavy, objective: str | None) -> str:
    """Tokens at (pi, A r), or at (pi, -f') where no ratio or advantage was recorded; a mark's area is its part."""
    pull, name, unit = _pull(heavy)
    if np.isnan(heavy.prob).all() or np.isnan(pull).all():
        return "<p>No probabilities with A r, or f′, of this update were recorded: no phase diagram.</p>"
    rows = np.flatnonzero(np.isfinite(heavy.prob) & ~np.isnan(pull))[:MOST_POINTS]
    across = svg.probability(heavy.prob[rows], LEFT, WIDTH - RIGHT, EDGE)
    size = np.abs(pull[rows][np.isfinite(pull[rows])])
    usual = float(np.median(size[size > 0])) if (size > 0).any() else 1.0
    up = svg.symmetric_log(
        3 * pull[rows], HEIGHT - BELOW, TOP, even=10.0 ** np.floor(np.log10(max(usual, 1e-290))) / 10, most=4
    )
    zero, half = float(up(0)), float(across(0.5))
    parts = [_regions(objective if unit == "ratio" else None, half, zero)]
    parts += [svg.left_axis(up, LEFT, WIDTH - RIGHT), svg.bottom_axis(across, TOP, HEIGHT - BELOW)]
    parts.append(f'<path class="zero" d="M{LEFT:g} {zero:.1f}H{WIDTH - RIGHT:g}"/>')
    x, y = across(heavy.prob[rows]), up(pull[rows])
    radius = 2.2 + 9 * np.sqrt(np.nan_to_num(heavy.share[rows]))
    for place in np.argsort(-radius, kind="stable"):  # small ones on top
        row = rows[place]
        kind = {1.0: "yes", 0.0: "no"}.get(float(heavy.convex[row]), "open")
        parts.append(
            f'<circle class="p {kind}" cx="{x[place]:.1f}" cy="{y[place]:.1f}" r="{radius[place]:.1f}" '
            f"{hover(heavy, row)}/>"
        )
    parts.append(_names(heavy, rows, x, y, radius))
    parts.append(
        svg.label((LEFT + WIDTH) / 2, HEIGHT - 8, "probability π of the action", anchor="middle", style="name")
    )
    says = f"Tokens of update {heavy.update} at probability and {name}"
    figure = svg.drawing(WIDTH, HEIGHT, says, parts)
    return (
        f"<figure><figcaption><b>Phase diagram</b> <span class='unit'>upwards: {name}</span><br>{_legend(heavy)}"
        f"{_caption(objective if unit == 'ratio' else None)}</figcaption>{figure}</figure>"
    )


def _pull(heavy: Heavy) -> tuple[np.ndarray, str, str]:
    product = heavy.advantage * heavy.ratio
    if not np.isnan(product).all():
        return product, "A r, advantage × ratio (units of A)", "ratio"
    if np.isnan(heavy.d1).all() and not np.isnan(heavy.advantage).all():
        return heavy.advantage, "A, the advantage (no ratio recorded)", "advantage"
    return -heavy.d1, "−f′, what pushes the token up (units of the loss)", "derivative"


def _regions(objective: str | None, half: float, zero: float) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BELOW
    parts = []
    if objective in SURROGATES:
        for above, likely, text, style in CURVED:
            x0, x1 = (half, right) if likely else (LEFT, half)
            y0, y1 = (TOP, zero) if above else (zero, bottom)
            parts.append(
                f'<rect class="{style}" x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"/>'
            )
            anchor = "end" if likely else "start"
            parts.append(
                svg.label(
                    x1 - 6 if likely else x0 + 6, y0 + 16 if above else y1 - 8, text, anchor=anchor, style="region"
                )
            )
    elif objective in STRAIGHT:
        for text, style, y0, y1 in (("convex", "none", TOP, zero), ("concave", "most", zero, bottom)):
            parts.append(
                f'<rect class="{style}" x="{LEFT:g}" y="{y0:.1f}" width="{right - LEFT:.1f}" height="{y1 - y0:.1f}"/>'
            )
            parts.append(svg.label(LEFT + 6, y0 + 16 if text == "convex" else y1 - 8, text, style="region"))
    return "".join(parts)


def _names(heavy: Heavy, rows: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> str:
    """Texts of the heaviest tokens beside their points, each where nothing else is written; none where no room is."""
    marks = [(a - r, b - r, a + r, b + r) for a, b, r in zip(x, y, radius, strict=True)]
    taken: list[tuple[float, ...]] = []
    parts: list[str] = []
    written: set[str] = set()
    for place in range(len(rows)):
        if len(parts) == NAMED or not heavy.share[rows[place]] > 0.01:
            break
        text = visible(heavy.text[rows[place]]).strip() or "␠"
        text = text if len(text) <= 14 else text[:13] + "…"
        if text in written:  # the same token again, most often at the same place
            continue
        wide, gap = 7.2 * len(text) + 4, radius[place] + 3
        for dx, dy in ((gap, 4), (-gap - wide, 4), (-wide / 2, -gap - 1), (-wide / 2, gap + 11), (gap, -8), (gap, 16)):
            box = (x[place] + dx, y[place] + dy - 11, x[place] + dx + wide, y[place] + dy + 3)
            inside = box[0] > LEFT and box[2] < WIDTH - RIGHT and box[1] > TOP + 20 and box[3] < HEIGHT - BELOW - 20
            if inside and not any(_touch(box, other) for other in [*taken, *marks]):
                taken.append(box)
                written.add(text)
                parts.append(svg.label(box[0] + 2, box[3] - 3, text, style="word"))
                break
    return "".join(parts)


def _touch(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _legend(heavy: Heavy) -> str:
    kinds = {1.0: ("yes", "convex"), 0.0: ("no", "not convex")}
    found = [kinds[value] for value in (1.0, 0.0) if (heavy.convex == value).any()]
    if np.isnan(heavy.convex).any():
        found.append(("open", "convexity not recorded"))
    marks = "".join(
        '<span class="series"><svg class="key" viewBox="0 0 24 8">'
        f'<circle class="p {kind}" cx="12" cy="4" r="3.4"/></svg>{text}</span>'
        for kind, text in found
    )
    return f'{marks}<span class="series">area: part of the gradient</span>'


def _caption(objective: str | None) -> str:
    if objective in SURROGATES:
        return "<br><span class='small'>Ground: the surrogate −A r where no clip is active.</span>"
    return ""
