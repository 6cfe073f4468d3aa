"""How a loss of the logits curves, and how vectors of parameters lie: pure functions of tensors, no model, no files."""

from lcogeom.geometry.direction import (
    Cosines,
    GradientCosines,
    cosine,
    directionality,
    gradient_cosines,
    sketch_cosines,
)
from lcogeom.geometry.divergence import UpdateKl, token_kl, update_kl
from lcogeom.geometry.hessian import LogitHessian
from lcogeom.geometry.sketch import sketch
from lcogeom.geometry.softmax import TokenDistribution, token_distribution

__all__ = [
    "Cosines",
    "GradientCosines",
    "LogitHessian",
    "TokenDistribution",
    "UpdateKl",
    "cosine",
    "directionality",
    "gradient_cosines",
    "sketch",
    "sketch_cosines",
    "token_distribution",
    "token_kl",
    "update_kl",
]
