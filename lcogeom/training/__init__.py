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
from lcogeom.training.tasks import Problem, Task, arithmetic, load_task, read_problems, score

__all__ = [
    "DEFAULT_OBJECTIVES",
    "Problem",
    "ReplaySettings",
    "Task",
    "arithmetic",
    "load_task",
    "make_batch",
    "mean_loss",
    "one_update",
    "read_problems",
    "replay",
    "score",
    "variant_objective",
]
