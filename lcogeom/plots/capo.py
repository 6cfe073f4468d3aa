"""CAPO's m_F against the true KL of the same token in a real update."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from scipy.stats import spearmanr

from lcogeom.plots.style import TEXT_WIDTH, line_of, paper_style, variants

ROWS = (  # (columns' suffix, column of the truth, its label, which step the prediction is of)
    ("", "kl", "KL, whole network moves", "token's own step"),
    ("_in_update", "kl_head", "KL, output matrix alone moves", "update's step"),
)
COLUMNS = (("m_F_empirical", "Empirical Fisher (CAPO)"), ("m_F_exact", "Exact Fisher"))
SHORT = {"ppo": "PPO", "reinforce": "REINFORCE", "lco-kld": "LCO-KLD"}
MOST_POINTS = 1000  # of an objective in a panel
DECADES = 14  # below the largest value; points further down lie on the edge


def capo_figure(table: pd.DataFrame, model: str, optimizer: str) -> Figure:
    """Tokens of one model and optimiser: m_F along the token's own step against the whole network's KL, and along the
    update's step against the KL that the output matrix alone makes; the empirical Fisher left, the exact one right.

    Correlations are of all tokens and updates; at most MOST_POINTS of each objective are drawn, chosen at random.

    Args:
        table: written by `analysis/capo.py`.

    Raises:
        ValueError: no token of that model and optimiser.
    """
    tokens = table[(table["level"] == "token") & (table["model"] == model) & (table["optimizer"] == optimizer)]
    if tokens.empty:
        raise ValueError(f"table: no token of model {model!r} with optimizer {optimizer!r}. See analysis/capo.py.")
    tokens = tokens.assign(variant=tokens["objective"])
    with paper_style():
        figure, grid = plt.subplots(2, 2, figsize=(TEXT_WIDTH, 5.4), layout="constrained", sharex="row", sharey="row")
        for axes, (suffix, truth, label, step) in zip(grid, ROWS, strict=True):
            for panel, (column, title) in zip(axes, COLUMNS, strict=True):
                draw_panel(panel, tokens, f"{column}{suffix}", truth)
                panel.set_xlabel(f"$m_F$ along the {step} (nats)")
                if suffix == "":
                    panel.set_title(title)
            axes[0].set_ylabel(f"{label} (nats)")
            limits = axes[0].get_xlim(), axes[0].get_ylim()
            ends = [min(map(min, limits)), max(map(max, limits))]
            for panel in axes:
                panel.plot(ends, ends, color="black", linewidth=0.8, zorder=0.5)  # beneath the points
                panel.set(xlim=limits[0], ylim=limits[1])
        handles = [
            Line2D([], [], color=line_of(name).colour, marker="o", markersize=4, linestyle="", label=label_of(name))
            for name in variants(tokens)
        ]
        handles.append(Line2D([], [], color="black", linewidth=0.8, label="prediction = KL"))
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def draw_panel(axes: Axes, tokens: pd.DataFrame, predicted: str, truth: str) -> None:
    """The points of every objective, the line where both are equal, and each objective's Spearman correlation."""
    names = variants(tokens)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for place, name in enumerate(names):
        rows = tokens[tokens["variant"] == name]
        rho = spearmanr(rows[predicted], rows[truth]).statistic
        drawn = rows.sample(min(MOST_POINTS, len(rows)), random_state=0)
        x, y = (drawn[column].to_numpy(float) for column in (predicted, truth))
        lowest = [tokens[column].max() * 10.0**-DECADES for column in (predicted, truth)]
        colour = line_of(name).colour
        axes.scatter(
            np.maximum(x, lowest[0]),
            np.maximum(y, lowest[1]),
            s=4,
            color=colour,
            alpha=0.35,
            linewidths=0,
            rasterized=True,
        )
        axes.text(
            0.03,
            0.97 - 0.085 * place,
            f"ρ = {rho:.2f}",
            transform=axes.transAxes,
            color=colour,
            ha="left",
            va="top",
            fontsize=8,
            fontweight="bold",
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_minor_locator(NullLocator())


def label_of(name: str) -> str:
    """An objective's name in the legend."""
    return SHORT.get(name, line_of(name).label)
