"""What each audited update did to its loss: stacked bars of first order, curvature and remainder."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lcogeom.plots.stability import require_replay, title_of
from lcogeom.plots.style import BLACK, BLUE, GREEN, ORANGE, TEXT_WIDTH, line_of, paper_style, variants
from lcogeom.runs import Run

PARTS = {
    "first_order": ("first order", "#BBBBBB"),
    "gauss_newton": ("curvature through the logits", BLUE),
    "residual": ("curvature of the network", ORANGE),
    "remainder": ("remainder", GREEN),
}
LIMITS = (-2.2, 3.2)


def audit_figure(run: Run) -> Figure:
    """One panel per objective; every bar an audited update, its parts in units of what the gradient promised.

    Bars are means over seeds over the mean of |first order|; black: the actual change with its range over the seeds.

    Args:
        run: a collection written by `lcogeom replay --audit-every k`.

    Raises:
        ValueError: a run without audits or without the label `variant`.
    """
    require_replay(run)
    updates = run.updates
    if "audit_actual" not in updates or updates["audit_actual"].isna().all():
        raise ValueError(f"run: {str(run.path)!r} holds no audits. Record them with: lcogeom replay --audit-every 5")
    names = variants(updates)
    with paper_style():
        columns = min(4, len(names))
        rows = -(-len(names) // columns)
        figure, grid = plt.subplots(
            rows, columns, figsize=(TEXT_WIDTH, 0.7 + 1.75 * rows), sharex=True, sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for place, axes in enumerate(grid.flat):
            if place >= len(names):
                axes.set_visible(False)
                continue
            _panel(axes, updates[updates["variant"] == names[place]])
            axes.set_title(line_of(names[place]).label)
        for axes in grid[-1]:
            axes.set_xlabel("Update")
        figure.supylabel("Change of the loss / |first order|", fontsize=8)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, title=title_of(run))
    return figure


def _panel(axes: Axes, updates: pd.DataFrame) -> None:
    audited = updates[updates["audit_actual"].notna()]
    table = audited[["step", *(f"audit_{name}" for name in (*PARTS, "actual"))]].replace([np.inf, -np.inf], np.nan)
    by_step = table.dropna().groupby("step")
    # Divided by the mean, not each seed by its own: a seed whose first order is nearly 0 would drown the others.
    promised = by_step["audit_first_order"].agg(lambda values: values.abs().mean())
    mean = by_step.mean().div(promised, axis=0)
    if mean.empty:
        return
    steps = mean.index.to_numpy(dtype=float)
    width = 0.8 * (np.diff(steps).min() if len(steps) > 1 else 1.0)
    up, down = np.zeros(len(steps)), np.zeros(len(steps))
    for name, (label, colour) in PARTS.items():
        values = mean[f"audit_{name}"].to_numpy()
        base = np.where(values >= 0, up, down)
        axes.bar(steps, values, width, bottom=base, color=colour, label=label, linewidth=0)
        up, down = up + values.clip(min=0), down + values.clip(max=0)
    middle = mean["audit_actual"].to_numpy()
    low, high = (by_step["audit_actual"].agg(end) / promised for end in ("min", "max"))
    whiskers = np.abs(np.stack([middle - low.to_numpy(), high.to_numpy() - middle]))
    axes.errorbar(
        steps, middle, yerr=whiskers, fmt="_", color=BLACK, markersize=7, elinewidth=0.8, label="actual change"
    )
    axes.axhline(0, color=BLACK, linewidth=0.6)
    axes.set_ylim(*LIMITS)
    for step, top in zip(steps, up, strict=True):
        if top > LIMITS[1]:  # a bar that leaves the panel says how far it goes
            axes.text(
                step, LIMITS[1] - 0.1, f"{top:.0f}", ha="center", va="top", fontsize=6, rotation=90, color="white"
            )
