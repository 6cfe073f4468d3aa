"""The audit of real updates: an update's forward passes are kept as they were called, and run again after its step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lcogeom.curvature import RouteError, audit_step
from lcogeom.objectives import Objective, TokenBatch
from lcogeom.recording.taps import Tap

FIELDS = (
    "actual",
    "first_order",
    "gauss_newton",
    "residual",
    "remainder",
    "logit_first_order",
    "logit_curvature",
    "logit_remainder",
    "overshoot",
    "rounding",
)


@dataclass(frozen=True, eq=False)
class ForwardCall:
    """One forward pass of the model and the completion tokens of its backward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: tuple[Tensor, Tensor]
    """(sequence, position in the logits counted from their end) of each token, (M,) each."""
    batch: TokenBatch


class StepAuditor:
    """Audits the updates that it is asked to; the model, its gradients and its random numbers stay as they are."""

    def __init__(self, model: torch.nn.Module, objective: Objective, tap: Tap) -> None:
        self._model, self._objective, self._tap = model, objective, tap
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._parts: list[ForwardCall] = []
        self._handle = model.register_forward_pre_hook(self._called, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()
        self.forget()

    def forget(self) -> None:
        """Let go of the update's inputs."""
        self._call, self._parts = None, []

    def arrived(self, batch: TokenBatch, rows: tuple[Tensor, Tensor]) -> None:
        """The last forward pass's gradient has come: these were its completion tokens."""
        if self._call is not None:
            self._parts.append(ForwardCall(*self._call, rows, batch))
            self._call = None

    def audit(self, params: Sequence[Tensor], before: Sequence[Tensor]) -> dict[str, float]:
        """The columns `audit_...` of this update; none, and a warning, where it cannot be audited."""
        parts = self._parts
        self.forget()
        if not parts:
            warnings.warn("audit: left out, because no forward pass with input and batch() was seen", stacklevel=2)
            return {}
        try:
            with self._undisturbed():
                found = audit_step(
                    [self._logits(part) for part in parts],
                    self._objective,
                    [part.batch for part in parts],
                    params,
                    before,
                )
        except (RouteError, TypeError, ValueError) as error:
            warnings.warn(f"audit: left out, because {error}", stacklevel=2)
            return {}
        values = asdict(found)
        return {f"audit_{name}": values[name] for name in FIELDS}

    def _called(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not self._tap.paused:
            self._call = args, {name: value for name, value in kwargs.items() if name != "labels"}

    def _logits(self, part: ForwardCall) -> Callable[[], Tensor]:
        return lambda: self._model(*part.args, **part.kwargs).logits[part.rows]

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Without dropout, and without the recorder seeing these passes."""
        modes = [(module, module.training) for module in self._model.modules()]
        self._tap.paused = True
        self._model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            self._tap.paused = False
