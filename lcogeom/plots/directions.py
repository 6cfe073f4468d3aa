"""How the gradients of a run lie to each other, and whether they point to where it ends up."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lcogeom.plots.stability import draw_variant
from lcogeom.plots.style import TEXT_WIDTH, line_of, paper_style, variants

COLOURS = "RdBu_r"  # red and blue stay apart with every common colour blindness; white is 0
MOST_MAPS = 4


def directions_figure(cosines: Mapping[str, np.ndarray], directionality: pd.DataFrame, title: str = "") -> Figure:
    """All-pairs cosines of one run's gradients for each of a few objectives, above; directionality of all, below.

    Args:
        cosines: variant -> (T, T) cosines of its gradients, at most four variants (`lg.sketch_cosines`).
        directionality: columns `variant`, `seed`, `step`, `cosine` and `standard_error` (`lg.directionality`). Lines
            are means over seeds, bands their range; the grey band is two standard errors of the sketch around 0.
        title: above all panels.

    Raises:
        ValueError: no cosines, or more than four; a directionality without rows.
    """
    if not 1 <= len(cosines) <= MOST_MAPS:
        raise ValueError(f"cosines: {len(cosines)} maps; give 1 to {MOST_MAPS}.")
    if directionality.empty:
        raise ValueError("directionality: it has no rows.")
    with paper_style():
        figure = plt.figure(figsize=(TEXT_WIDTH, 5.0), layout="constrained")
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.5))[:, 0]
        maps = above.subplots(1, len(cosines), squeeze=False)[0]
        for axes, (variant, values) in zip(maps, cosines.items(), strict=True):
            drawn = draw_cosines(axes, values)
            axes.set_title(line_of(variant).label, fontsize=8)
        maps[0].set_ylabel("Update")
        bar = above.colorbar(drawn, ax=list(maps), aspect=18, pad=0.01)
        bar.set_label("Cosine of gradients")
        bar.outline.set_visible(False)
        draw_directionality(below.subplots(), directionality)
        if title:
            figure.suptitle(title, fontsize=9)
    return figure


def draw_cosines(axes: Axes, values: np.ndarray) -> AxesImage:
    """A (T, T) heat map from -1 to 1; a gradient without direction stays grey."""
    axes.set_facecolor("#BBBBBB")
    axes.grid(visible=False)
    drawn = axes.imshow(values, cmap=COLOURS, vmin=-1, vmax=1, origin="lower", interpolation="nearest")
    axes.set_xlabel("Update")
    return drawn


def draw_directionality(axes: Axes, table: pd.DataFrame) -> None:
    """One line for each variant, and the sketch's error around 0."""
    steps = table["step"].to_numpy(float)
    error = 2 * float(table["standard_error"].max())
    axes.fill_between(
        (steps.min(), steps.max()), -error, error, color="#BBBBBB", linewidth=0, label="sketch's error (± 2 s.e.)"
    )
    axes.axhline(0, color="black", linewidth=0.6)
    for variant in variants(table):
        draw_variant(axes, table, variant, "cosine")
    axes.set_xlim(steps.min(), steps.max())
    axes.set_xlabel("Update t on the same batch")
    axes.set_ylabel(r"Directionality  $\cos(-g_t,\ \theta_{\mathrm{end}} - \theta_t)$")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
