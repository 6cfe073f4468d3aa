"""Where the models come from: `tiny` (shipped), `smollm2` (a wheel), a local folder, or a hub id."""

from lcogeom.models.loading import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
