"""The method, top to bottom: problems with checkable answers, rollouts, updates."""

from lcogeom.training.replay import (
    DEFAULT_OBJECTIVES,
    ReplaySettings,
    make_batch,
    mean_loss,
    one_update,
    replay,
    variant_objective,
)
from lcogeom.training.tasks import Problem, arithmetic, read_problems, score

__all__ = [
    "DEFAULT_OBJECTIVES",
    "Problem",
    "ReplaySettings",
    "arithmetic",
    "make_batch",
    "mean_loss",
    "one_update",
    "read_problems",
    "replay",
    "score",
    "variant_objective",
]
