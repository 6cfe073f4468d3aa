"""What an update minimises: losses of the logits, each with its exact gradient and Hessian."""

# Importing them fills the registry, in this order.
from lcogeom.objectives import surrogates, coupled, dppo, lco, teacher, expected, reppo, convexified  # noqa: F401, I001
from lcogeom.objectives.action import ActionObjective, action_objective
from lcogeom.objectives.autograd import AutogradObjective, autograd_objective
from lcogeom.objectives.base import Objective, TokenBatch, objective, objective_names
from lcogeom.objectives import capo, clip_bounds, sage  # noqa: F401  (they fill the interventions' registry)
from lcogeom.objectives.interventions import Choice, Guarded, Intervention, Verdict, intervention, intervention_names
from lcogeom.objectives.last_layer import AdamState, LastLayer
from lcogeom.objectives.last_layer_curvature import CurvatureTerms, LastLayerCurvature, last_layer_curvature

__all__ = [
    "ActionObjective",
    "AdamState",
    "AutogradObjective",
    "Choice",
    "CurvatureTerms",
    "Guarded",
    "Intervention",
    "LastLayer",
    "LastLayerCurvature",
    "Objective",
    "TokenBatch",
    "Verdict",
    "action_objective",
    "autograd_objective",
    "intervention",
    "intervention_names",
    "last_layer_curvature",
    "objective",
    "objective_names",
]
