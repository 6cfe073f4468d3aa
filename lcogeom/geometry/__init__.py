"""How a loss of the logits curves, what vectors of parameters do: pure functions of tensors, no model, no files."""

from lcogeom.geometry.density import SpectralDensity, spectral_density
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
from lcogeom.geometry.lanczos import ExtremeEigenvalues, extreme_eigenvalues
from lcogeom.geometry.linear_operator import from_linear_operator, to_linear_operator
from lcogeom.geometry.sketch import sketch
from lcogeom.geometry.softmax import TokenDistribution, token_distribution

__all__ = [
    "Cosines",
    "ExtremeEigenvalues",
    "GradientCosines",
    "LogitHessian",
    "SpectralDensity",
    "TokenDistribution",
    "UpdateKl",
    "cosine",
    "directionality",
    "extreme_eigenvalues",
    "from_linear_operator",
    "gradient_cosines",
    "sketch",
    "sketch_cosines",
    "spectral_density",
    "to_linear_operator",
    "token_distribution",
    "token_kl",
    "update_kl",
]
