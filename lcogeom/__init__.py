"""lcogeom: gradient geometry for the policy optimisation of language models."""

from lcogeom.audit import AuditReport, audit_file
from lcogeom.geometry import (
    ExtremeEigenvalues,
    LogitHessian,
    SpectralDensity,
    extreme_eigenvalues,
    from_linear_operator,
    spectral_density,
    to_linear_operator,
)
from lcogeom.models import load_model
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
    "ExtremeEigenvalues",
    "Guarded",
    "Intervention",
    "LastLayer",
    "LogitHessian",
    "Objective",
    "Probe",
    "Run",
    "SpectralDensity",
    "TapError",
    "TokenBatch",
    "Verdict",
    "action_objective",
    "attach",
    "audit_file",
    "autograd_objective",
    "extreme_eigenvalues",
    "from_linear_operator",
    "intervention",
    "intervention_names",
    "load_model",
    "load_run",
    "objective",
    "objective_names",
    "spectral_density",
    "to_linear_operator",
]
