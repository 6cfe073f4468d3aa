"""Figures from recorded run folders, and only from them."""

from lcogeom.plots.capo import capo_figure
from lcogeom.plots.convexity import convexity_figure
from lcogeom.plots.stability import stability_figure

__all__ = ["capo_figure", "convexity_figure", "stability_figure"]
