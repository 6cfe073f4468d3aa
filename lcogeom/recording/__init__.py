"""Hooks on a live run: they read, and never change a bit of it."""

from lcogeom.recording.attach import attach
from lcogeom.recording.probe import Probe
from lcogeom.recording.taps import TapError

__all__ = ["Probe", "TapError", "attach"]
