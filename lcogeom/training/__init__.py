"""The method, top to bottom: problems with checkable answers, rollouts, updates."""

from lcogeom.training.replay import DEFAULT_OBJECTIVES, ReplaySettings, replay
from lcogeom.training.tasks import Problem, arithmetic, read_problems, score

__all__ = ["DEFAULT_OBJECTIVES", "Problem", "ReplaySettings", "arithmetic", "read_problems", "replay", "score"]
