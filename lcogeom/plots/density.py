"""Densities of a Hessian's eigenvalues before and after training, one panel for each objective."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lcogeom.plots.style import TEXT_WIDTH, line_of, paper_style, variants

COLUMNS = ("variant", "when", "size", "x", "density", "density_error", "width", "lowest", "highest")
GREY = "#777777"


def density_figure(table: pd.DataFrame) -> Figure:
    """Mean over probes with a band of one standard error either way; triangles mark the lowest and highest eigenvalue.

    Args:
        table: written by `analysis/spectrum.py`; a row for each variant, `when` ("before" or "after") and grid point x,
            with the density per unit of asinh(x), smoothed there by a Gaussian of width `width`.

    Raises:
        ValueError: columns are missing, or there are no rows.
    """
    missing = sorted(set(COLUMNS) - set(table.columns))
    if missing or table.empty:
        what = f"no column {missing[0]!r}" if missing else "no rows"
        raise ValueError(f"table: {what}. Write one with: python analysis/spectrum.py")
    names = variants(table)
    with paper_style():
        figure, panels = plt.subplots(
            len(names),
            1,
            figsize=(TEXT_WIDTH / 2, 0.6 + 1.55 * len(names)),
            squeeze=False,
            sharex=True,
            sharey=True,
            layout="constrained",
        )
        for axes, name in zip(panels[:, 0], names, strict=True):
            draw_densities(axes, table[table["variant"] == name], name)
            axes.set_ylabel("Share per unit\nof asinh(λ)")
        note = {"color": GREY, "fontsize": 6.5, "transform": panels[-1, 0].get_yaxis_transform()}
        panels[-1, 0].text(0.01, 1.2 * one_eigenvalue(table), "one eigenvalue", **note)
        panels[-1, 0].set_xlabel("Eigenvalue λ of the Hessian (loss / parameter²)")
    return figure


def draw_densities(axes: Axes, rows: pd.DataFrame, name: str) -> None:
    """The curves of one objective, down to a tenth of what a single eigenvalue gives."""
    line = line_of(name)
    single = one_eigenvalue(rows)
    floor = single / 10
    axes.set_yscale("log")
    axes.axhline(single, color=GREY, linewidth=0.6, linestyle=":")
    for when, colour, style in (("before", GREY, "--"), ("after", line.colour, "-")):
        curve = rows[rows["when"] == when].sort_values("x")
        if curve.empty:
            continue
        x, middle, error = (curve[column].to_numpy(float) for column in ("x", "density", "density_error"))
        axes.plot(x, np.maximum(middle, floor), color=colour, linestyle=style, label=when, linewidth=1.1)
        axes.fill_between(
            x,
            np.maximum(middle - error, floor),
            np.maximum(middle + error, floor),
            color=colour,
            alpha=0.25,
            linewidth=0,
        )
        ends = curve[["lowest", "highest"]].iloc[0].to_numpy(float)
        axes.plot(
            ends, [floor * 1.6] * 2, marker="^", markersize=4, linestyle="", color=colour,
            markerfacecolor=colour if when == "after" else "white", clip_on=False,
        )  # fmt: skip
    axes.set_xscale("asinh", linear_width=1.0)
    axes.set_xticks(
        [-1000, -100, -10, -1, 0, 1, 10, 100, 1000], ["−10³", "−100", "−10", "−1", "0", "1", "10", "100", "10³"]
    )
    axes.minorticks_off()
    axes.set_ylim(bottom=floor)
    axes.set_title(line.label, loc="left")
    axes.legend(frameon=False, loc="upper right", handlelength=2.2)


def one_eigenvalue(rows: pd.DataFrame) -> float:
    """The height of a single eigenvalue's Gaussian."""
    return float(1 / (rows["size"].iloc[0] * rows["width"].iloc[0] * np.sqrt(2 * np.pi)))
