"""Learning curves: held-out reward against completions trained on, one panel for each task."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from lcogeom.plots.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, TEXT_WIDTH, VERMILION, Line, paper_style

METHODS = {
    "sft": Line("SFT", BLACK, None),
    "reinforce": Line("REINFORCE", PURPLE, None),
    "ppo": Line("PPO with critic", VERMILION, (4, 2)),
    "grpo": Line("GRPO", ORANGE, None),
    "lco-kld": Line("LCO-KLD", BLUE, None),
    "lco-mse": Line("LCO-MSE", GREEN, (4, 2)),
    "lco-lch": Line("LCO-LCH", SKY, (1, 1)),
}
TITLES = {"addition-1": "One-digit addition", "addition-2": "Two-digit addition", "products": "One-digit products"}


def training_figure(rows: pd.DataFrame) -> Figure:
    """Mean over seeds; bands are Student's 95 % intervals of the mean, where there are several seeds.

    rows: columns task, method, seed, rollouts, heldout_reward: one row per run and evaluation.

    Raises:
        ValueError: no rows, or a column missing.
    """
    needed = ["task", "method", "seed", "rollouts", "heldout_reward"]
    absent = [name for name in needed if name not in rows]
    if absent or rows.empty:
        raise ValueError(f"rows: {f'no column {absent[0]!r}' if absent else 'empty'}; needs {', '.join(needed)}.")
    tasks = list(rows["task"].unique())
    with paper_style():
        width = TEXT_WIDTH if len(tasks) > 1 else TEXT_WIDTH / 2
        figure, grid = plt.subplots(1, len(tasks), figsize=(width, 2.8), squeeze=False, layout="constrained")
        for axes, task in zip(grid[0], tasks, strict=True):
            mine = rows[rows["task"] == task]
            for method in [name for name in METHODS if name in set(mine["method"])]:
                draw_method(axes, mine[mine["method"] == method], METHODS[method])
            seeds = mine["seed"].nunique()
            axes.set_title(f"{TITLES.get(task, task)}, {seeds} seed{'s' if seeds > 1 else ''}")
            axes.set_xlabel("Completions trained on")
            axes.set_ylim(0, 1)
        grid[0, 0].set_ylabel("Held-out reward")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4 if len(tasks) > 1 else 2, frameon=False)
    return figure


def draw_method(axes: Axes, rows: pd.DataFrame, line: Line) -> None:
    """One method's mean and interval."""
    table = rows.pivot(index="rollouts", columns="seed", values="heldout_reward").astype(float)
    count, values = table.shape[1], table.to_numpy()
    (drawn,) = axes.plot(table.index, values.mean(axis=1), color=line.colour, label=line.label)
    if line.dash:
        drawn.set_dashes(line.dash)
    if count > 1:
        half = stats.t.ppf(0.975, count - 1) * values.std(axis=1, ddof=1) / np.sqrt(count)
        low, high = values.mean(axis=1) - half, values.mean(axis=1) + half
        axes.fill_between(table.index, low, high, color=line.colour, alpha=0.13, linewidth=0)
