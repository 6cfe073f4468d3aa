"""The black box: the batches of the last updates, written down when something goes wrong.

An event is a loss, gradient or weight that is not finite, or a gradient or step whose norm is far above its running
median (a wrong learning rate shows in the step first). Whether there was one is decided

- on a CPU, or where the weights are wanted: at the step, before it changes the weights. The update's passes can run
  again with the weights that made them, which names the first tensor that was not finite.
- elsewhere at a later step, from numbers that were copied without waiting for the device; batches are kept for as long
  as that may take. The weights have moved on by then: the report says what is known without them.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lcogeom.objectives import Objective
from lcogeom.recording.batch import BatchRecord
from lcogeom.recording.heaviest import heaviest_tokens
from lcogeom.recording.non_finite import describe, first_non_finite
from lcogeom.recording.passes import ForwardPass, ModelParts, PassWatcher, keep_batch
from lcogeom.recording.ranks import local
from lcogeom.recording.snapshot import batch_files, optimizer_state, weights_state
from lcogeom.recording.taps import Tap
from lcogeom.recording.triggers import Triggers
from lcogeom.runs.black_box import OPTIMIZER, WEIGHTS, NonFinite, write_entry, write_trigger

DUMPS = 3
"""Automatic ones in one run; events beyond them are listed, not dumped."""
LATE = 2
"""Steps after which the numbers of an update are waited for, at the latest."""


@dataclass(eq=False)
class KeptUpdate:
    """What is kept of one update."""

    step: int
    passes: list[ForwardPass]
    losses: list[Tensor]
    grad_norm: Tensor
    tokens: list[dict[str, Tensor]]
    """Columns of its recorded tokens, for each pass."""
    update_norm: Tensor | None = None
    layers: list[tuple[str, Tensor]] = field(default_factory=list)
    """Gradient norm of each layer."""


@dataclass(frozen=True, eq=False)
class _Event:
    reason: str
    found: NonFinite | None
    note: str
    before: Mapping[int, Tensor] | None
    """Weights to be written: None for none; those the step has changed already, by id, with their values before."""


class BlackBox:
    """Watches a run's passes and norms for one Probe."""

    def __init__(
        self,
        *,
        parts: ModelParts,
        optimizer: torch.optim.Optimizer,
        tap: Tap,
        objective: Objective | None,
        run: Path,
        text: Callable[[int], str | None],
        updates: int,
        spike: float,
        weights: bool,
    ) -> None:
        """updates: how many of the last ones are kept; the rest as in `attach`."""
        self._parts, self._model, self._optimizer = parts, parts.model, optimizer
        self._tap, self._objective, self._run, self._text = tap, objective, run, text
        self._updates, self.keeps_weights = updates, weights
        self._device = parts.device
        self._at_once = weights or self._device.type == "cpu"
        self._watcher = PassWatcher(parts, lambda: tap.paused)
        self._told: dict[int, tuple[BatchRecord, Tensor | None, dict[str, str]]] = {}  # by the id of batch()'s record
        self._passes: list[ForwardPass] = []
        self._window: deque[KeptUpdate] = deque(maxlen=updates + LATE)
        self._waiting: deque[tuple[KeptUpdate, _OnItsWay]] = deque()
        self._triggers = Triggers(spike, apart=updates)
        self._dumps = 0
        self._warned: set[str] = set()

    def told(self, batch: BatchRecord, loss: Tensor | float | None) -> None:
        """batch() was called."""
        left_out: dict[str, str] = {}
        kept = keep_batch(batch, left_out)
        self._told[id(batch)] = kept, None if loss is None else torch.as_tensor(loss).detach().mean(), left_out

    def arrived(self, ids: Tensor | None, batch: BatchRecord | None) -> None:
        """A backward pass reached the tap. ids: the model's input_ids; batch: what batch() said of them."""
        told = None if batch is None else self._told.pop(id(batch), None)
        one = self._watcher.arrived(ids)
        if one is None:
            return
        if told is not None:
            one.batch, loss, left_out = told
            one.loss = one.loss if loss is None else loss
            one.left_out |= left_out
        self._passes.append(one)

    def forget(self) -> None:
        """The gradients of the passes so far were thrown away."""
        self._passes = []

    def before_step(self, step: int, values: Mapping[str, Tensor], tokens: Sequence[dict[str, Tensor]]) -> None:
        """The optimiser is about to step. values: columns of `updates`, 0-d each; tokens: of the tokens table."""
        passes, self._passes = self._passes, []
        self._watcher.forget()
        self._told.clear()
        norm = values["grad_norm_clipped"]
        if "grad_norm" in values:  # NaN where something else than one factor came over the gradient before the step
            norm = torch.where(values["grad_norm"].isnan(), norm, values["grad_norm"])
        losses = [one.loss for one in passes if one.loss is not None]
        update = KeptUpdate(step, passes, losses, norm, list(tokens))
        self._window.append(update)
        if self._at_once:
            self._judge(update, [float(loss) for loss in losses], float(norm), live=True)

    def after_step(
        self,
        update_norm: Tensor | None,
        norms: Mapping[str, Sequence[object]],
        around: tuple[Sequence[Tensor], Sequence[Tensor]],
    ) -> None:
        """The optimiser has stepped.

        Args:
            update_norm: 0-d; None where it is not measured.
            norms: rows of the norms table.
            around: the parameters, and their values before the step where they were kept.
        """
        update = self._window[-1]
        update.update_norm = update_norm
        rows = zip(norms["scope"], norms["name"], norms["grad_norm"], strict=True)
        update.layers = [(str(n), value) for scope, n, value in rows if scope == "layer" and isinstance(value, Tensor)]
        if self._at_once:
            old = {id(p): value for p, value in zip(*around, strict=True)} if self.keeps_weights else None
            if update_norm is not None:
                self._judge_step(update, float(update_norm), old)
            return
        numbers = [update.grad_norm, *([] if update_norm is None else [update_norm]), *update.losses]
        self._waiting.append((update, _OnItsWay(numbers, self._device)))
        while self._waiting and (self._waiting[0][1].is_here() or len(self._waiting) > LATE):
            self._decide_late()

    def settle(self) -> None:
        """Decide what is still waiting for the device."""
        while self._waiting:
            self._decide_late()

    def dump(self, step: int, reason: str) -> Path | None:
        """Write the last updates, and the passes of the one under way; None if the disk refused."""
        self.settle()
        asked = _Event(reason, None, "written on request", {} if self.keeps_weights and self._passes else None)
        if not self._passes:
            return self._write(max(step - 1, 0), list(self._window)[-self._updates :], asked)
        under_way = KeptUpdate(step, self._passes, [], torch.tensor(math.nan), [])
        kept = [*self._window, under_way][-self._updates :]
        return self._write(step, kept, asked)

    def stopped(self, step: int) -> None:
        """The loop raises within an update, as clip_grad_norm_(error_if_nonfinite=True) does: a last look at it."""
        if not self._passes:
            return
        losses = [one.loss for one in self._passes if one.loss is not None]
        gradients = (parameter.grad for parameter in self._model.parameters() if parameter.grad is not None)
        finite = all(bool(torch.isfinite(local(gradient)).all()) for gradient in gradients)
        norm = torch.tensor(0.0 if finite else math.nan)
        update = KeptUpdate(step, self._passes, losses, norm, [])
        self._window.append(update)
        self._judge(update, [float(loss) for loss in losses], float(norm), live=True)

    def remove(self) -> None:
        """Take the hooks off and let go of everything."""
        self._watcher.remove()
        self._window.clear()
        self._passes.clear()

    def _decide_late(self) -> None:
        update, numbers = self._waiting.popleft()
        norm, *others = numbers.wait()
        losses = others[len(others) - len(update.losses) :]
        self._judge(update, losses, norm, live=False)
        if update.update_norm is not None:
            self._judge_step(update, others[0])

    def _judge(self, update: KeptUpdate, losses: Sequence[float], norm: float, *, live: bool) -> None:
        """Dump if losses or gradient are an event. live: the model's weights and gradients are those of the update."""
        reason = self._triggers.before_step(update.step, losses, norm)
        if reason is None:
            return
        found, note = None, "loss and gradient are finite"
        if not math.isfinite(sum(losses, norm)):
            found, note = self._search(update) if live else self._known(update, live=False)
        self._happened(update, _Event(reason, found, note, {} if live and self.keeps_weights else None))

    def _judge_step(self, update: KeptUpdate, norm: float, before: Mapping[int, Tensor] | None = None) -> None:
        """Dump if the step is an event. before: the weights' values from before it, by id, where they are known."""
        reason = self._triggers.after_step(update.step, norm)
        if reason is None:
            return
        found, note = None, "loss, gradient and step are finite"
        if not math.isfinite(norm):
            named = ((name, parameter) for name, parameter in self._model.named_parameters())
            found = next((bad for name, weight in named if (bad := describe("weight", name, weight, None))), None)
            note = "from the weights after the step"
        self._happened(update, _Event(reason, found, note, before))

    def _happened(self, update: KeptUpdate, event: _Event) -> None:
        dumped = False
        if self._dumps < DUMPS:
            kept = [one for one in self._window if one.step <= update.step][-self._updates :]
            dumped = self._write(update.step, kept, event) is not None
            self._dumps += dumped
        else:
            self._warn(
                "left out",
                f"black box: update {update.step}: {event.reason}; not dumped, because {DUMPS} dumps were made "
                "already. triggers.jsonl lists every event; probe.dump(reason) writes one whenever it is called.",
            )
        try:
            write_trigger(self._run, {"step": update.step, "reason": event.reason, "dumped": dumped})
        except OSError as error:
            self._warn("disk", f"black box: the list of events could not be written: {error}")

    def _search(self, update: KeptUpdate) -> tuple[NonFinite | None, str]:
        """The first non-finite tensor, from running the passes again; else what is known without."""
        if _several_processes():
            found, note = self._known(update, live=True)
            return found, f"{note}; the passes did not run again, because other processes take part in them"
        with self._paused():
            found, note = first_non_finite(self._parts, update.passes, self._objective)
        if found is None:
            found, known = self._known(update, live=True)
            note = f"{note}; {known}"
        return found, note

    def _known(self, update: KeptUpdate, *, live: bool) -> tuple[NonFinite | None, str]:
        """What the recorded numbers say. live: .grad is still that of the update."""
        columns = [part["logprob"] for part in update.tokens]
        if columns and (found := describe("logits", "of the recorded tokens", torch.cat(columns), None)):
            return found, "from the recorded tokens: their log-probabilities are not finite"
        for part, loss in enumerate(update.losses):
            if found := describe("loss", "of the whole pass", loss, part):
                return found, "from the loss handed to batch()"
        for name, parameter in reversed(list(self._model.named_parameters()) if live else []):
            if parameter.grad is not None and (found := describe("gradient", name, parameter.grad, None)):
                return found, "from the gradients in .grad, from the last parameter to the first"
        for name, norm in reversed(update.layers):
            if found := describe("gradient", f"of the parameters of {name}", norm, None):
                return found, "from the norms of the layers' gradients, from the last to the first"
        return None, "nothing that was recorded is not finite"

    def _write(self, step: int, kept: Sequence[KeptUpdate], event: _Event) -> Path | None:
        try:
            batches, files = batch_files([(update.step, update.passes) for update in kept])
            tied: dict[str, str] = {}
            optimizer: dict[str, Any] | None = None
            if event.before is not None:
                files[WEIGHTS], tied = weights_state(self._model, event.before)
            if event.before == {}:  # after the step its own state from before is gone
                optimizer, tensors = optimizer_state(self._optimizer)
                if tensors:
                    files[OPTIMIZER] = tensors
            objective = self._objective
            report = {
                "step": step,
                "reason": event.reason,
                "objective": None
                if objective is None
                else {"name": objective.name, "options": {k: _plain(v) for k, v in objective.options.items()}},
                "temperature": self._parts.temperature,
                "batches": batches,
                "updates": [_numbers(update) for update in kept],
                "first_non_finite": event.found,
                "note": event.note,
                "tokens": heaviest_tokens(step, kept[-1].tokens if kept else [], self._text),
                "tied": tied,
                "optimizer": optimizer,
            }
            place = write_entry(self._run, step, report, files)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, or no memory for the copies
            self._warn("disk", f"black box: update {step} could not be written ({event.reason}): {error}")
            return None
        warnings.warn(f"black box: update {step}: {event.reason}. Written to {str(place)!r}", stacklevel=2)
        return place

    @contextmanager
    def _paused(self) -> Iterator[None]:
        before, self._tap.paused = self._tap.paused, True
        try:
            yield
        finally:
            self._tap.paused = before

    def _warn(self, kind: str, message: str) -> None:
        """Once for each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)


class _OnItsWay:
    """Numbers that are copied from a device while it goes on working."""

    def __init__(self, numbers: Sequence[Tensor], device: torch.device) -> None:
        """numbers: 0-d each."""
        together = torch.stack([number.to(device, torch.float64, non_blocking=True) for number in numbers])
        self._numbers = torch.empty(together.shape, dtype=together.dtype, pin_memory=device.type == "cuda")
        self._numbers.copy_(together, non_blocking=True)
        self._copied = None
        if device.type != "cpu":
            self._copied = torch.get_device_module(device).Event()
            self._copied.record()

    def is_here(self) -> bool:
        """Whether `wait` would return at once."""
        return self._copied is None or self._copied.query()

    def wait(self) -> list[float]:
        """The numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _numbers(update: KeptUpdate) -> dict[str, object]:
    losses = [float(loss) for loss in update.losses]
    return {
        "step": update.step,
        "loss": sum(losses) / len(losses) if losses else None,
        "grad_norm": float(update.grad_norm),
        "update_norm": None if update.update_norm is None else float(update.update_norm),
    }


def _plain(value: object) -> object:
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
