"""How a loss of the logits curves: pure functions of tensors, no model, no files."""

from lcogeom.geometry.density import SpectralDensity, spectral_density
from lcogeom.geometry.hessian import LogitHessian
from lcogeom.geometry.lanczos import ExtremeEigenvalues, extreme_eigenvalues
from lcogeom.geometry.linear_operator import from_linear_operator, to_linear_operator
from lcogeom.geometry.softmax import TokenDistribution, token_distribution

__all__ = [
    "ExtremeEigenvalues",
    "LogitHessian",
    "SpectralDensity",
    "TokenDistribution",
    "extreme_eigenvalues",
    "from_linear_operator",
    "spectral_density",
    "to_linear_operator",
    "token_distribution",
]
