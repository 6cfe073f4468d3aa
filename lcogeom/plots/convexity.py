"""Where the tokens of a real run fall in the convexity phase diagram, and the share of convex ones against updates."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lcogeom.plots.stability import draw_variant, require_replay, title_of
from lcogeom.plots.style import TEXT_WIDTH, line_of, paper_style, variants
from lcogeom.runs import Run

PHASE_VARIANTS = ("ppo-unclipped:positive", "ppo-unclipped:negative")
EDGE = 1e-6  # probabilities are drawn within [EDGE, 1 - EDGE]
MOST_POINTS = 4000
REGIONS = (  # method.md 2.2 for -A e^(l - l_old): (A r > 0, pi >= 1/2, what is negative, colour)
    (True, False, "one negative\neigenvalue", "#FBE3D6"),
    (True, True, "convex", "#D5EBF7"),
    (False, False, "V − 2 negative", "#F9D0C0"),
    (False, True, "V − 1 negative", "#F4B7A3"),
)


def convexity_figure(runs: Sequence[Run]) -> Figure:
    """One column for each replay: the phase diagram of unclipped PPO above, the convex share below.

    Args:
        runs: collections written by `lcogeom replay`.

    Raises:
        ValueError: a run without updates, or without tokens of unclipped PPO.
    """
    with paper_style():
        size = (TEXT_WIDTH, 5.6) if len(runs) > 1 else (TEXT_WIDTH / 2, 5.6)
        figure, grid = plt.subplots(
            2, len(runs), figsize=size, squeeze=False, layout="constrained", height_ratios=(1.25, 1)
        )
        for column, run in enumerate(runs):
            require_replay(run)
            draw_phase(grid[0, column], run)
            draw_share(grid[1, column], run)
            grid[0, column].set_title(title_of(run))
            if column == 0:
                grid[0, column].set_ylabel("Advantage × ratio,  A r")
                grid[1, column].set_ylabel("Share of convex tokens")
    return figure


def draw_phase(axes: Axes, run: Run) -> None:
    """Every recorded token of unclipped PPO at (pi, A r), coloured by its update."""
    tokens = run.tokens[run.tokens["variant"].isin(PHASE_VARIANTS)]
    tokens = tokens[np.isfinite(tokens["prob"].astype(float)) & np.isfinite(tokens["ratio"].astype(float))]
    if tokens.empty:
        raise ValueError(f"run: {str(run.path)!r} holds no tokens of {' or '.join(PHASE_VARIANTS)} to draw.")
    if len(tokens) > MOST_POINTS:
        tokens = tokens.sample(MOST_POINTS, random_state=0)
    pi = tokens["prob"].to_numpy(float).clip(EDGE, 1 - EDGE)
    pull = (tokens["advantage"] * tokens["ratio"]).to_numpy(float)
    top = max(10.0, float(np.abs(pull).max()) * 2)
    axes.set_xscale("logit")
    axes.set_yscale("symlog", linthresh=0.1, linscale=0.6)
    axes.set_xlim(EDGE / 2, 1 - EDGE / 2)
    axes.set_ylim(-top, top)
    for above, right, text, colour in REGIONS:
        span = (0.5, 1 - EDGE / 2) if right else (EDGE / 2, 0.5)
        axes.fill_between(span, 0, top if above else -top, color=colour, linewidth=0, zorder=0)
        axes.text(
            0.98 if right else 0.02,
            0.97 if above else 0.03,
            text,
            transform=axes.transAxes,
            ha="right" if right else "left",
            va="top" if above else "bottom",
            fontsize=7.5,
        )
    axes.grid(visible=False)
    axes.set_xlabel("Action probability π")
    points = axes.scatter(pi, pull, c=tokens["step"].to_numpy(int), s=4, cmap="viridis", linewidths=0, rasterized=True)
    axes.set_xticks([1e-6, 1e-4, 1e-2, 0.5, 0.99, 0.9999], ["$10^{-6}$", "$10^{-4}$", ".01", ".5", ".99", ".9999"])
    axes.minorticks_off()
    bar = axes.figure.colorbar(points, ax=axes, pad=0.02, aspect=30)
    bar.set_label("Update")
    bar.outline.set_visible(False)


def draw_share(axes: Axes, run: Run) -> None:
    """Share of convex tokens; variants whose share is the same in every update share one line."""
    for names in same_series(run.updates, "convex_share"):
        draw_variant(axes, run.updates, names[0], "convex_share")
        axes.lines[-1].set_label(", ".join(line_of(name).label.removesuffix(", A = ±1") for name in names))
    axes.set_ylim(-0.04, 1.04)
    axes.set_xlabel("Update on the same batch")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), frameon=False, fontsize=6.8)


def same_series(updates: pd.DataFrame, column: str) -> list[list[str]]:
    """Variants grouped by equal values of a column in every update and seed."""
    groups: dict[bytes, list[str]] = {}
    for name in variants(updates):
        rows = updates[updates["variant"] == name].sort_values(["seed", "step"])
        groups.setdefault(rows[column].to_numpy(float).tobytes(), []).append(name)
    return list(groups.values())
