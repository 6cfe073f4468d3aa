"""Hooks on a live run: they read, and never change a bit of it."""

from lcogeom.recording.attach import attach
from lcogeom.recording.compare_objectives import ObjectiveComparison, ObjectiveOnBatch, compare_objectives
from lcogeom.recording.probe import Probe
from lcogeom.recording.replay_batch import ReplayedBatch, replay_batch
from lcogeom.recording.taps import TapError

__all__ = [
    "ObjectiveComparison",
    "ObjectiveOnBatch",
    "Probe",
    "ReplayedBatch",
    "TapError",
    "attach",
    "compare_objectives",
    "replay_batch",
]
