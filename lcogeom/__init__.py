"""lcogeom: gradient geometry for the policy optimisation of language models."""

from lcogeom.geometry import LogitHessian
from lcogeom.objectives import ActionObjective, Objective, TokenBatch, action_objective, objective, objective_names
from lcogeom.recording import Probe, TapError, attach
from lcogeom.runs import Run, load_run

__version__ = "0.1.0"

__all__ = [
    "ActionObjective",
    "LogitHessian",
    "Objective",
    "Probe",
    "Run",
    "TapError",
    "TokenBatch",
    "action_objective",
    "attach",
    "load_run",
    "objective",
    "objective_names",
]
