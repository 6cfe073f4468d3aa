"""How a loss of the logits curves: pure functions of tensors, no model, no files."""

from lcogeom.geometry.divergence import UpdateKl, token_kl, update_kl
from lcogeom.geometry.hessian import LogitHessian
from lcogeom.geometry.softmax import TokenDistribution, token_distribution

__all__ = ["LogitHessian", "TokenDistribution", "UpdateKl", "token_distribution", "token_kl", "update_kl"]
