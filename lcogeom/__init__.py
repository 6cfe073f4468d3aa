"""lcogeom: gradient geometry for the policy optimisation of language models."""

from lcogeom.audit import AuditReport, audit_file
from lcogeom.geometry import (
    Cosines,
    GradientCosines,
    LogitHessian,
    cosine,
    directionality,
    gradient_cosines,
    sketch,
    sketch_cosines,
)
from lcogeom.objectives import (
    ActionObjective,
    AdamState,
    AutogradObjective,
    Choice,
    Guarded,
    Intervention,
    LastLayer,
    Objective,
    TokenBatch,
    Verdict,
    action_objective,
    autograd_objective,
    intervention,
    intervention_names,
    objective,
    objective_names,
)
from lcogeom.recording import Probe, TapError, attach
from lcogeom.runs import Run, Sketches, load_run

__version__ = "0.1.0"

__all__ = [
    "ActionObjective",
    "AdamState",
    "AuditReport",
    "AutogradObjective",
    "Choice",
    "Cosines",
    "GradientCosines",
    "Guarded",
    "Intervention",
    "LastLayer",
    "LogitHessian",
    "Objective",
    "Probe",
    "Run",
    "Sketches",
    "TapError",
    "TokenBatch",
    "Verdict",
    "action_objective",
    "attach",
    "audit_file",
    "autograd_objective",
    "cosine",
    "directionality",
    "gradient_cosines",
    "intervention",
    "intervention_names",
    "load_run",
    "objective",
    "objective_names",
    "sketch",
    "sketch_cosines",
]
