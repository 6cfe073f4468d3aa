"""The method, top to bottom: problems with checkable answers, rollouts, updates.

`lcogeom.training.trainer.train` is not imported here: it needs accelerate (pip install 'lcogeom[train]').
"""

from lcogeom.recording.head import output_head
from lcogeom.training.chunked_loss import chunked_loss
from lcogeom.training.old_policy import OldPolicy, keep_old_policy
from lcogeom.training.presets import PRESETS, preset
from lcogeom.training.replay import (
    DEFAULT_OBJECTIVES,
    ReplaySettings,
    make_batch,
    mean_loss,
    one_update,
    replay,
    variant_objective,
)
from lcogeom.training.rollout import Sequences
from lcogeom.training.settings import TrainSettings, override
from lcogeom.training.tasks import Problem, Task, arithmetic, load_task, read_problems, score

__all__ = [
    "DEFAULT_OBJECTIVES",
    "PRESETS",
    "OldPolicy",
    "Problem",
    "ReplaySettings",
    "Sequences",
    "Task",
    "TrainSettings",
    "arithmetic",
    "chunked_loss",
    "keep_old_policy",
    "load_task",
    "make_batch",
    "mean_loss",
    "one_update",
    "output_head",
    "override",
    "preset",
    "read_problems",
    "replay",
    "score",
    "variant_objective",
]
