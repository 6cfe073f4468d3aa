"""How a loss of the logits curves: pure functions of tensors, no model, no files."""

from lcogeom.geometry.hessian import LogitHessian
from lcogeom.geometry.softmax import TokenDistribution, token_distribution

__all__ = ["LogitHessian", "TokenDistribution", "token_distribution"]
