"""lcogeom: gradient geometry for the policy optimisation of language models."""

from lcogeom.geometry import LogitHessian
from lcogeom.objectives import ActionObjective, Objective, TokenBatch, action_objective, objective, objective_names

__version__ = "0.1.0"

__all__ = [
    "ActionObjective",
    "LogitHessian",
    "Objective",
    "TokenBatch",
    "action_objective",
    "objective",
    "objective_names",
]
