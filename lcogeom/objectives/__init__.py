"""What an update minimises: losses of the logits, each with its exact gradient and Hessian."""

# Importing them fills the registry, in this order.
from lcogeom.objectives import surrogates, coupled, dppo, lco, teacher, expected, reppo, convexified  # noqa: F401, I001
from lcogeom.objectives.action import ActionObjective, action_objective
from lcogeom.objectives.base import Objective, TokenBatch, objective, objective_names

__all__ = ["ActionObjective", "Objective", "TokenBatch", "action_objective", "objective", "objective_names"]
