"""Runs small enough for a test: `tiny`, one-digit additions, two or three updates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lcogeom.training import checkpoint
from lcogeom.training.presets import preset
from lcogeom.training.settings import TrainSettings

SMALL: dict[str, Any] = {
    "prompts": 4,
    "samples": 4,
    "updates": 4,
    "held_out": 4,
    "held_out_samples": 1,
    "evaluate_every": 100,
    "sketch": 0,
    "tokens_per_update": 16,
}


def small(name: str, **changes: Any) -> TrainSettings:
    """A preset, made small."""
    return replace(preset(name), **(SMALL | changes))


def last_weights(run: Path, name: str = "policy") -> dict[str, torch.Tensor]:
    """Of a run's last checkpoint."""
    return load_file(checkpoint.complete(run)[-1] / f"{name}.safetensors")
