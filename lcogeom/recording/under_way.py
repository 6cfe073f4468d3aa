"""One update while it is being made: what its backward passes and its step have brought so far, not yet waited for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lcogeom.recording.candidates import Candidates
from lcogeom.recording.steps import StoredSketch
from lcogeom.recording.tokens import Columns


@dataclass(eq=False)
class UnderWay:
    """Tensors lie on the model's device. Its rows are made at a flush (rows.py)."""

    step: int
    candidates: list[Candidates] = field(default_factory=list)
    """Tokens that are measured at the step."""
    measured: list[Columns] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    """0-d, of each batch() that was given one."""
    summed: bool = False
    """Whether these are parts of a sum."""
    factors: list[Tensor] = field(default_factory=list)
    """0-d float64: by what each of them was multiplied before its backward pass."""
    mismatches: list[Tensor] = field(default_factory=list)
    """0-d bool: whether batch() was given other input ids than the model saw."""
    inside: list[Tensor] = field(default_factory=list)
    """(2,): squared norm of the gradient at the completion tokens, and everywhere."""
    sequences: int = 0
    tokens: int = 0
    """Completion tokens."""
    backwards: int = 0
    seconds: float = 0.0
    """Since training began, at the end of the step."""
    values: dict[str, Any] = field(default_factory=dict)
    """Columns of `updates`: 0-d tensors and numbers."""
    norms: dict[str, list[object]] = field(default_factory=dict)
    """Columns of `norms`."""
    sketches: list[StoredSketch] = field(default_factory=list)

    def forget(self, *, keep_loss: bool, keep_factor: bool) -> None:
        """Its gradients were thrown away; the last loss and factor may be those of the pass that has just begun."""
        self.candidates, self.measured, self.mismatches, self.inside = [], [], [], []
        self.losses = self.losses[-1:] if keep_loss else []
        self.factors = self.factors[-1:] if keep_factor else []
        self.sequences = self.tokens = self.backwards = 0

    def loss_factor(self) -> dict[str, Tensor]:
        """The column of that name: of several losses the mean is meant, whose factors add up to 1; parts share one."""
        if not self.factors:
            return {}
        factors = torch.stack(self.factors)
        return {"loss_factor": factors.mean() if self.summed else factors.sum()}
