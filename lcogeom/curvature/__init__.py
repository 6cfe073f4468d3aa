"""Geometry in parameter space: products with a model's Hessian and Gauss-Newton matrix, and the audit of a step."""

from lcogeom.curvature.checks import RouteCheck, RouteError, check_hvp
from lcogeom.curvature.gauss_newton import ggn_vector_product
from lcogeom.curvature.hvp import ModelHessian, hvp, model_hessian
from lcogeom.curvature.parameters import flat_matvec
from lcogeom.curvature.step import StepAudit, audit_step

__all__ = [
    "ModelHessian",
    "RouteCheck",
    "RouteError",
    "StepAudit",
    "audit_step",
    "check_hvp",
    "flat_matvec",
    "ggn_vector_product",
    "hvp",
    "model_hessian",
]
