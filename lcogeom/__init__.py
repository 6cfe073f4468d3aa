"""lcogeom: gradient geometry for the policy optimisation of language models."""

from lcogeom.audit import AuditReport, audit_file
from lcogeom.curvature import (
    ModelHessian,
    RouteCheck,
    RouteError,
    StepAudit,
    audit_step,
    check_hvp,
    flat_matvec,
    ggn_vector_product,
    hvp,
    model_hessian,
)
from lcogeom.geometry import LogitHessian
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
from lcogeom.runs import Run, load_run

__version__ = "0.1.0"

__all__ = [
    "ActionObjective",
    "AdamState",
    "AuditReport",
    "AutogradObjective",
    "Choice",
    "Guarded",
    "Intervention",
    "LastLayer",
    "LogitHessian",
    "ModelHessian",
    "Objective",
    "Probe",
    "RouteCheck",
    "RouteError",
    "Run",
    "StepAudit",
    "TapError",
    "TokenBatch",
    "Verdict",
    "action_objective",
    "attach",
    "audit_file",
    "audit_step",
    "autograd_objective",
    "check_hvp",
    "flat_matvec",
    "ggn_vector_product",
    "hvp",
    "intervention",
    "intervention_names",
    "load_run",
    "model_hessian",
    "objective",
    "objective_names",
]
