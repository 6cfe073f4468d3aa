"""What an update minimises: losses of the logits, each with its exact gradient and Hessian."""

from lcogeom.objectives import action, target  # noqa: F401  (importing them fills the registry)
from lcogeom.objectives.action import ActionObjective, action_objective
from lcogeom.objectives.base import Objective, TokenBatch, objective, objective_names

__all__ = ["ActionObjective", "Objective", "TokenBatch", "action_objective", "objective", "objective_names"]
