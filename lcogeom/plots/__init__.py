"""Figures from recorded run folders and tables, and only from them."""

from lcogeom.plots.audit import audit_figure
from lcogeom.plots.capo import capo_figure
from lcogeom.plots.convexity import convexity_figure
from lcogeom.plots.density import density_figure
from lcogeom.plots.directions import directions_figure
from lcogeom.plots.stability import stability_figure, title_of
from lcogeom.plots.training import training_figure

__all__ = [
    "audit_figure",
    "capo_figure",
    "convexity_figure",
    "density_figure",
    "directions_figure",
    "stability_figure",
    "title_of",
    "training_figure",
]
