"""The black box: the batches of the last updates, written down when something goes wrong.

An event is a loss, gradient or weight that is not finite, or a gradient norm far above its running median. Whether
there was one is decided

- on a CPU, or where the weights are wanted: at the step, before it changes the weights. The update's passes can run
  again with the weights that made them, which names the first tensor that was not finite.
- elsewhere at a later step, from numbers that were copied without waiting for the device; batches are kept for as long
  as that may take. The weights have moved on by then: the report says what is known without them.
"""

from __future__ import annotations

import math
import statistics
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
from lcogeom.recording.snapshot import batch_files, optimizer_state, weights_state
from lcogeom.recording.taps import Tap
from lcogeom.runs.black_box import OPTIMIZER, WEIGHTS, NonFinite, write_entry, write_trigger

HISTORY = 100
"""Updates in the running median of the gradient norm."""
SETTLED = 5
"""No spike is called before so many norms are known."""
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
        self._updates, self._spike, self._weights = updates, spike, weights
        self._device = parts.device
        self._at_once = weights or self._device.type == "cpu"
        self._watcher = PassWatcher(parts, lambda: tap.paused)
        self._told: tuple[BatchRecord, Tensor | None, dict[str, str]] | None = None
        self._passes: list[ForwardPass] = []
        self._window: deque[KeptUpdate] = deque(maxlen=updates + LATE)
        self._waiting: deque[tuple[KeptUpdate, Tensor, Any]] = deque()
        self._norms: deque[float] = deque(maxlen=HISTORY)
        self._last: dict[str, int] = {}  # kind of event -> its latest update
        self._dumps = 0
        self._warned: set[str] = set()

    def told(self, batch: BatchRecord, loss: Tensor | float | None) -> None:
        """batch() was called for the next backward pass."""
        left_out: dict[str, str] = {}
        kept = keep_batch(batch, left_out)
        self._told = kept, None if loss is None else torch.as_tensor(loss).detach().mean(), left_out

    def arrived(self, ids: Tensor | None) -> None:
        """A backward pass reached the tap. ids: the model's input_ids."""
        told, self._told = self._told, None
        one = self._watcher.arrived(ids)
        if one is None:
            return
        if told is not None:
            one.batch, loss, left_out = told
            one.loss = one.loss if loss is None else loss
            one.left_out |= left_out
        self._passes.append(one)

    def before_step(self, step: int, values: Mapping[str, Tensor], tokens: Sequence[dict[str, Tensor]]) -> None:
        """The optimiser is about to step. values: columns of `updates`, 0-d each; tokens: of the tokens table."""
        passes, self._passes = self._passes, []
        self._watcher.forget()
        norm = values.get("grad_norm", values["grad_norm_clipped"])
        losses = [one.loss for one in passes if one.loss is not None]
        update = KeptUpdate(step, passes, losses, norm, list(tokens))
        self._window.append(update)
        if self._at_once:
            self._judge(update, [float(loss) for loss in losses], float(norm), live=True)

    def after_step(self, update_norm: Tensor, norms: Mapping[str, Sequence[object]]) -> None:
        """The optimiser has stepped. norms: rows of the norms table."""
        update = self._window[-1]
        update.update_norm = update_norm
        rows = zip(norms["scope"], norms["name"], norms["grad_norm"], strict=True)
        update.layers = [(str(n), value) for scope, n, value in rows if scope == "layer" and isinstance(value, Tensor)]
        if self._at_once:
            self._judge_weights(update, float(update_norm))
            return
        numbers = [update.grad_norm, update_norm, *update.losses]
        together = torch.stack([number.to(self._device, torch.float64, non_blocking=True) for number in numbers])
        copied = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
        copied.copy_(together, non_blocking=True)
        ready = torch.get_device_module(self._device).Event()
        ready.record()
        self._waiting.append((update, copied, ready))
        while self._waiting and (self._waiting[0][2].query() or len(self._waiting) > LATE):
            self._decide_late()

    def settle(self) -> None:
        """Decide what is still waiting for the device."""
        while self._waiting:
            self._decide_late()

    def dump(self, step: int, reason: str) -> Path | None:
        """Write the last updates, and the passes of the one under way; None if the disk refused."""
        self.settle()
        if not self._passes:
            return self._write(max(step - 1, 0), reason, list(self._window)[-self._updates :], None, "asked for")
        under_way = KeptUpdate(step, self._passes, [], torch.tensor(math.nan), [])
        kept = [*self._window, under_way][-self._updates :]
        return self._write(step, reason, kept, None, "asked for", weights=self._weights)

    def remove(self) -> None:
        """Take the hooks off and let go of everything."""
        self._watcher.remove()
        self._window.clear()
        self._passes.clear()

    def _decide_late(self) -> None:
        update, copied, ready = self._waiting.popleft()
        ready.synchronize()
        norm, step_norm, *losses = copied.tolist()
        if not self._judge(update, losses, norm, live=False):
            self._judge_weights(update, step_norm)

    def _judge(self, update: KeptUpdate, losses: Sequence[float], norm: float, *, live: bool) -> bool:
        """Dump if a loss or the norm is not finite, or a spike. live: the model's weights are those that made it."""
        usual = statistics.median(self._norms) if len(self._norms) >= SETTLED else math.inf
        if (
            math.isfinite(norm) and norm > 0
        ):  # an update without advantages has no gradient; it says nothing of the usual
            self._norms.append(norm)
        bad = next((loss for loss in losses if not math.isfinite(loss)), None)
        if bad is not None or not math.isfinite(norm):
            what = f"the loss is {bad}" if bad is not None else f"the gradient norm is {norm}"
            if self._is_new("non-finite", update.step):
                found, note = self._search(update) if live else self._known(update)
                self._event(update, what, found, note, live)
            return True
        if norm > self._spike * usual:
            reason = f"the gradient norm {norm:.3g} is {norm / usual:.3g} times its running median {usual:.3g}"
            if self._is_new("spike", update.step):
                self._event(update, reason, None, "loss and gradient norm are finite", live)
            return True
        return False

    def _judge_weights(self, update: KeptUpdate, step_norm: float) -> None:
        if math.isfinite(step_norm) or not self._is_new("non-finite", update.step):
            return
        named = ((name, parameter) for name, parameter in self._model.named_parameters())
        found = next((bad for name, weight in named if (bad := describe("weight", name, weight, None))), None)
        reason = f"the norm of the step is {step_norm}, the gradient's is finite"
        self._event(update, reason, found, "the weights after the step", live=False)

    def _is_new(self, kind: str, step: int) -> bool:
        """Whether an event of this kind has not been going on through the updates that are kept."""
        last = self._last.get(kind)
        self._last[kind] = step
        return last is None or step - last > self._updates

    def _event(self, update: KeptUpdate, reason: str, found: NonFinite | None, note: str, live: bool) -> None:
        dumped = self._dumps < DUMPS
        if dumped:
            self._dumps += 1
            kept = [one for one in self._window if one.step <= update.step][-self._updates :]
            self._write(update.step, reason, kept, found, note, weights=live and self._weights)
        else:
            self._warn(
                "left out",
                f"black box: update {update.step}: {reason}; not dumped, because {DUMPS} dumps were made already. "
                "triggers.jsonl lists every event; probe.dump(reason) writes one whenever it is called.",
            )
        try:
            write_trigger(self._run, {"step": update.step, "reason": reason, "dumped": dumped})
        except OSError as error:
            self._warn("disk", f"black box: the list of events could not be written: {error}")

    def _search(self, update: KeptUpdate) -> tuple[NonFinite | None, str]:
        """The first non-finite tensor, from running the passes again; else what is known without."""
        if _several_processes():
            found, note = self._known(update)
            return found, f"{note}; the passes did not run again, because other processes take part in them"
        with self._paused():
            found, note = first_non_finite(self._parts, update.passes, self._objective)
        if found is None:
            found, known = self._known(update)
            note = f"{note}; {known}"
        return found, note

    def _known(self, update: KeptUpdate) -> tuple[NonFinite | None, str]:
        """What the recorded numbers say."""
        columns = [part["logprob"] for part in update.tokens]
        if columns and (found := describe("logits", "of the recorded tokens", torch.cat(columns), None)):
            return found, "from the recorded tokens: their log-probabilities are not finite"
        for part, loss in enumerate(update.losses):
            if found := describe("loss", "of the whole pass", loss, part):
                return found, "from the loss handed to batch()"
        for name, parameter in reversed(list(self._model.named_parameters())):
            if parameter.grad is not None and (found := describe("gradient", name, parameter.grad, None)):
                return found, "from the gradients in .grad, from the last parameter to the first"
        for name, norm in reversed(update.layers):
            if found := describe("gradient", f"of the parameters of {name}", norm, None):
                return found, "from the norms of the layers' gradients, from the last to the first"
        return None, "nothing that was recorded is not finite"

    def _write(
        self,
        step: int,
        reason: str,
        kept: Sequence[KeptUpdate],
        found: NonFinite | None,
        note: str,
        *,
        weights: bool = False,
    ) -> Path | None:
        try:
            batches, files = batch_files([(update.step, update.passes) for update in kept])
            tied: dict[str, str] = {}
            optimizer: dict[str, Any] | None = None
            if weights:
                files[WEIGHTS], tied = weights_state(self._model)
                optimizer, tensors = optimizer_state(self._optimizer)
                if tensors:
                    files[OPTIMIZER] = tensors
            objective = self._objective
            report = {
                "step": step,
                "reason": reason,
                "objective": None
                if objective is None
                else {"name": objective.name, "options": {k: _plain(v) for k, v in objective.options.items()}},
                "batches": batches,
                "updates": [_numbers(update) for update in kept],
                "first_non_finite": found,
                "note": note,
                "tokens": heaviest_tokens(step, kept[-1].tokens if kept else [], self._text),
                "tied": tied,
                "optimizer": optimizer,
            }
            place = write_entry(self._run, step, report, files)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, or no memory for the copies
            self._warn("disk", f"black box: update {step} could not be written ({reason}): {error}")
            return None
        warnings.warn(f"black box: update {step}: {reason}. Written to {str(place)!r}", stacklevel=2)
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
