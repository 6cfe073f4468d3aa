"""What every figure shares: sizes, fonts, and one colour, dash and name per objective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import pandas as pd
import seaborn as sns

TEXT_WIDTH = 6.9
"""Inches, of a two-column page."""

# Okabe and Ito's palette, distinguishable with every common colour blindness; dashes tell the rest apart in print.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)


@dataclass(frozen=True)
class Line:
    label: str
    colour: str
    dash: tuple[int, ...] | None


BROWN = "#7A4A00"
SOLID = None
LINES = {
    "sft": Line("SFT", BLACK, SOLID),
    "reinforce:negative": Line("REINFORCE, A < 0", PURPLE, SOLID),
    "ppo-unclipped:positive": Line("PPO unclipped, A > 0", VERMILION, SOLID),
    "ppo-unclipped:negative": Line("PPO unclipped, A < 0", ORANGE, SOLID),
    "ppo": Line("PPO clipped, A = ±1", BROWN, (4, 2)),
    "lco-kld": Line("LCO-KLD, A = ±1", BLUE, SOLID),
    "lco-mse": Line("LCO-MSE, A = ±1", GREEN, (4, 2)),
    "lco-lch": Line("LCO-LCH, A = ±1", SKY, (1, 1)),
}
SPARE = [PURPLE, GREEN, BLUE, VERMILION, SKY, ORANGE, BLACK]


def line_of(variant: str) -> Line:
    """The look of a variant; one without its own gets a dash-dotted line."""
    if variant in LINES:
        return LINES[variant]
    return Line(variant.replace(":", ", A "), SPARE[sum(map(ord, variant)) % len(SPARE)], (5, 1, 1, 1))


def variants(updates: pd.DataFrame) -> list[str]:
    """The variants recorded, in the order of LINES, others behind."""
    found = list(updates["variant"].unique())
    return [name for name in LINES if name in found] + sorted(name for name in found if name not in LINES)


@contextmanager
def paper_style() -> Iterator[None]:
    """Fonts and lines that stay legible when the figure is printed one column wide; embedded, not outlined."""
    settings = {
        **sns.axes_style("ticks"),
        **sns.plotting_context("paper"),
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.labelsize": 8,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "legend.fontsize": 7.5,
        "lines.linewidth": 1.4,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "grid.linewidth": 0.4,
        "grid.color": "#DDDDDD",
        "pdf.fonttype": 42,
        "savefig.dpi": 200,
    }
    with mpl.rc_context(settings):
        yield
