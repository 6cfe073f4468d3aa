"""Figures from recorded run folders and tables, and only from them."""

from lcogeom.plots.convexity import convexity_figure
from lcogeom.plots.density import density_figure
from lcogeom.plots.stability import stability_figure

__all__ = ["convexity_figure", "density_figure", "stability_figure"]
