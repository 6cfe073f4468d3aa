"""The paper's stability plot: gradient norms, action probability and entropy against updates."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lcogeom.plots.style import TEXT_WIDTH, line_of, paper_style, variants
from lcogeom.runs import Run

PANELS = (
    ("qkv_mean_frobenius", "Parameter gradient norm\n(mean over q, k, v)", "log"),
    ("logit_grad_norm", "Logit gradient norm\n(all tokens)", "log"),
    ("action_prob", "Mean action\nprobability", "linear"),
    ("entropy", "Mean entropy (nats)", "linear"),
)


def stability_figure(runs: Sequence[Run]) -> Figure:
    """Four rows of panels, one column for each replay; lines are means over seeds, bands their range.

    Args:
        runs: collections written by `lcogeom replay`.

    Raises:
        ValueError: a run without updates or without the label `variant`.
    """
    with paper_style():
        size = (TEXT_WIDTH, 7.6) if len(runs) > 1 else (TEXT_WIDTH / 2, 7.6)
        figure, grid = plt.subplots(
            len(PANELS), len(runs), figsize=size, sharex="col", squeeze=False, layout="constrained"
        )
        for column, run in enumerate(runs):
            require_replay(run)
            for row, (name, label, scale) in enumerate(PANELS):
                axes: Axes = grid[row, column]
                axes.set_yscale(scale)
                for variant in variants(run.updates):
                    draw_variant(axes, run.updates, variant, name)
                if column == 0:
                    axes.set_ylabel(label)
                if name == "action_prob":
                    axes.set_ylim(-0.03, 1.03)
                elif scale == "linear":
                    axes.set_ylim(bottom=0)
            grid[0, column].set_title(title_of(run))
            grid[-1, column].set_xlabel("Update on the same batch")
        add_legend(figure, grid[0, 0])
    return figure


def draw_variant(axes: Axes, updates: pd.DataFrame, variant: str, column: str) -> None:
    """Mean over seeds with the range over seeds as a band; a value that is not finite ends the line with a cross."""
    line = line_of(variant)
    rows = updates[updates["variant"] == variant]
    table = rows.pivot(index="step", columns="seed", values=column).astype(float)
    steps, values = table.index.to_numpy(dtype=float), table.to_numpy()
    good = np.isfinite(values).all(axis=1)
    steps, values = steps[good], values[good]
    if not len(steps):
        return
    logarithmic = axes.get_yscale() == "log"
    middle = np.exp(np.log(np.maximum(values, 1e-300)).mean(axis=1)) if logarithmic else values.mean(axis=1)
    (drawn,) = axes.plot(steps, middle, color=line.colour, label=line.label)
    if line.dash:
        drawn.set_dashes(line.dash)
    if values.shape[1] > 1:
        axes.fill_between(steps, values.min(axis=1), values.max(axis=1), color=line.colour, alpha=0.15, linewidth=0)
    if not good.all():
        axes.plot(steps[-1], middle[-1], marker="x", color=line.colour)


def add_legend(figure: Figure, axes: Axes) -> None:
    """One legend above all panels."""
    handles, labels = axes.get_legend_handles_labels()
    wide = figure.get_figwidth() > TEXT_WIDTH * 0.75
    figure.legend(handles, labels, loc="outside upper center", ncols=3 if wide else 2, frameon=False)


def title_of(run: Run) -> str:
    """The model and how many seeds."""
    updates = run.updates
    count = updates["seed"].nunique()
    names = {"smollm2": "SmolLM2-135M", "tiny": "tiny (133k parameters)"}
    model = str(updates["model"].iloc[0])
    return f"{names.get(model, model)}, {count} seed{'s' if count > 1 else ''}"


def require_replay(run: Run) -> None:
    """Raise ValueError unless the run holds updates of named variants."""
    if run.updates.empty or "variant" not in run.updates:
        raise ValueError(f"run: {str(run.path)!r} holds no updates of a replay. Record one with: lcogeom replay")
