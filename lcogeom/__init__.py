"""lcogeom: gradient geometry for the policy optimisation of language models."""

from lcogeom.audit import AuditReport, audit_file
from lcogeom.geometry import LogitHessian, UpdateKl, token_kl, update_kl
from lcogeom.objectives import (
    ActionObjective,
    AdamState,
    AutogradObjective,
    Choice,
    CurvatureTerms,
    Guarded,
    Intervention,
    LastLayer,
    LastLayerCurvature,
    Objective,
    TokenBatch,
    Verdict,
    action_objective,
    autograd_objective,
    intervention,
    intervention_names,
    last_layer_curvature,
    objective,
    objective_names,
)
from lcogeom.recording import Probe, TapError, attach
from lcogeom.runs import Run, load_run

__version__ = "0.1.0"

__all__ = [
    "ActionObjective",
    "AdamState",
    "AuditReport",
    "AutogradObjective",
    "Choice",
    "CurvatureTerms",
    "Guarded",
    "Intervention",
    "LastLayer",
    "LastLayerCurvature",
    "LogitHessian",
    "Objective",
    "Probe",
    "Run",
    "TapError",
    "TokenBatch",
    "UpdateKl",
    "Verdict",
    "action_objective",
    "attach",
    "audit_file",
    "autograd_objective",
    "intervention",
    "intervention_names",
    "last_layer_curvature",
    "load_run",
    "objective",
    "objective_names",
    "token_kl",
    "update_kl",
]
