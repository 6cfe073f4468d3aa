"""Figures from recorded run folders, and only from them."""

from lcogeom.plots.audit import audit_figure
from lcogeom.plots.convexity import convexity_figure
from lcogeom.plots.stability import stability_figure

__all__ = ["audit_figure", "convexity_figure", "stability_figure"]
