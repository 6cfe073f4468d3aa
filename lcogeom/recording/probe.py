"""The recorder: taps and optimiser hooks on a running model -> rows in a run folder."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
import transformers
from torch import Tensor

from lcogeom.objectives import Objective
from lcogeom.recording.arrivals import completion_tokens, looked_at, norm_of_rows
from lcogeom.recording.audit import StepAuditor
from lcogeom.recording.batch import BatchRecord
from lcogeom.recording.black_box import BlackBox
from lcogeom.recording.candidates import Rows, choose, own
from lcogeom.recording.gradients import GradientMeter
from lcogeom.recording.head import output_head, vocabulary_size
from lcogeom.recording.passes import ModelParts
from lcogeom.recording.ranks import NoWriter, Ranks
from lcogeom.recording.rows import UpdateRows
from lcogeom.recording.taps import Sighting, Tap, TapError, silence, tap_model
from lcogeom.recording.tokens import Columns, measure, measure_logprobs
from lcogeom.recording.under_way import UnderWay
from lcogeom.runs.black_box import write_trigger
from lcogeom.runs.columns import NOTED
from lcogeom.runs.store import RunWriter

FLUSH_SECONDS = 60.0


class Probe:
    """A recorder attached to one model and optimiser. Made by `attach`; a context manager."""

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        writer: RunWriter | NoWriter,
        minimised: Objective | None,
        tap: str,
        temperature: float,
        scaler: torch.amp.GradScaler | None,
        tokens_per_update: int,
        flush_every: int | None,
        seed: int,
        tokenizer: transformers.PreTrainedTokenizerBase | None,
        audit_every: int | None,
        sketch: int,
        sketch_layers: bool,
        copies: bool,
        black_box: int,
        spike: float,
        black_box_weights: bool,
        on_update: Callable[[Mapping[str, object]], None] | None,
        ranks: Ranks,
    ) -> None:
        self.path: Path = writer.path
        self._writer = writer
        self._objective = minimised
        self._ranks = ranks
        self._budget = max(1, tokens_per_update // ranks.size)
        self._flush_every = flush_every
        self._rng = torch.Generator().manual_seed(seed)
        self._rows = UpdateRows(writer, ranks, minimised, tokenizer, on_update)
        self._head, self._vocabulary = output_head(model), vocabulary_size(model)
        self._temperature = temperature
        self._meter = GradientMeter(
            model, optimizer, sketch=sketch, sketch_layers=sketch_layers, copies=copies, scaler=scaler, ranks=ranks
        )
        self._tap: Tap = tap_model(model, self._head, tap, self._arrived)
        self._audit_every = audit_every
        self._auditor = None
        if audit_every is not None and minimised is not None:
            self._auditor = StepAuditor(model, minimised, self._tap)
        self._black_box = None
        if black_box and ranks.rank == 0:
            self._black_box = BlackBox(
                parts=ModelParts(model, self._head, temperature),
                optimizer=optimizer,
                tap=self._tap,
                objective=minimised,
                run=self.path,
                text=self._rows.text,
                updates=black_box,
                spike=spike,
                weights=black_box_weights,
            )
        self._steps = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        self._batches: list[BatchRecord] = []
        self._factor: Tensor | None = None
        self._in_backward = False
        self._update = UnderWay(writer.next_update)
        self._noted: dict[str, float] = {}
        self._pending: list[UnderWay] = []
        self._unwritten = 0
        self._flushed = time.monotonic()
        self._started = self._flushed - writer.seconds

    def batch(
        self,
        *,
        input_ids: Tensor,
        action_mask: Tensor | None = None,
        advantages: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        loss: Tensor | float | None = None,
        advantage_ids: Tensor | None = None,
        old_logits: Tensor | None = None,
        divided_by: float = 1.0,
        summed: bool = False,
    ) -> None:
        """Say what the next backward pass is about. Optional; before it, once for each forward pass that it covers.

        Args:
            input_ids: (B, T) as given to the model.
            action_mask: (B, T), true at completion tokens: entry t belongs to the token input_ids[:, t], which the
                logits at t - 1 predicted. Without it, tokens whose gradient is not zero count.
            advantages: (B, T), or (B, T, K) with `advantage_ids`.
            old_logprobs, ref_logprobs: (B, T), of the tokens input_ids[:, t] under behaviour and reference policy.
            loss: the loss to be back-propagated, for the record, before it is divided for gradient accumulation or
                scaled for fp16: where it is a tensor with a graph, what it is multiplied by afterwards is read from
                the backward pass, and token columns are recorded without that factor.
            advantage_ids: (B, T, K) token ids the advantages belong to.
            old_logits: (M, V), the rollout policy's logits of the M completion tokens, in the order of
                `action_mask.nonzero()`; target objectives need them for their misfit.
            divided_by: what `loss` has been divided by for gradient accumulation already.
            summed: the update's loss is the sum of its backward passes' losses, each a part of it, not their mean.

        Raises:
            ValueError: a wrong shape, no completion token, a NaN among the completion tokens. Names the argument.
        """
        given = {
            "action_mask": action_mask,
            "advantages": advantages,
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "advantage_ids": advantage_ids,
        }
        self._batches.append(BatchRecord(input_ids, given, old_logits))
        if loss is not None:
            self._update.losses.append(torch.as_tensor(loss).detach().mean() * divided_by)
            self._update.summed = summed
            if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
                loss.register_hook(lambda gradient: self._multiplied(gradient, divided_by))
        if self._black_box is not None:
            self._black_box.told(self._batches[-1], loss)

    def note(self, values: Mapping[str, float], *, done: bool = False) -> None:
        """Fill columns of the row of the update under way that the caller knows: `reward`, `heldout_reward`, ...

        done: of the update just made instead, which must not have been flushed: attach with flush_every=None.

        Raises:
            ValueError: no such column, or one that the recorder fills; no update that waits to be flushed.
        """
        unknown = sorted(set(values) - set(NOTED))
        if unknown:
            raise ValueError(f"note: no column {unknown[0]!r}; there are {', '.join(NOTED)}.")
        if done and not self._pending:
            raise ValueError("note: no update waits to be flushed. Attach with flush_every=None, and flush() later.")
        noted = self._pending[-1].values if done else self._noted
        noted |= {name: float(value) for name, value in values.items()}

    def dump(self, reason: str) -> Path | None:
        """Write the black box now: the batches of the last updates, and of the one under way.

        Returns:
            The folder it was written to; None where another process writes, and, with a warning, if the disk refused.

        Raises:
            ValueError: attached with `black_box=0`.
        """
        if self._ranks.rank:
            return None
        if self._black_box is None:
            raise ValueError("dump: nothing was kept; attach(..., black_box=4) keeps the batches of 4 updates.")
        return self._black_box.dump(self._update.step, reason)

    def flush(self) -> None:
        """Write everything recorded so far to the run folder. Worth a call when a checkpoint is saved, for `resume`."""
        if self._black_box is not None:
            self._black_box.settle()
        self.collect()
        self._writer.flush()
        self._unwritten = 0
        self._flushed = time.monotonic()

    def collect(self) -> None:
        """Make the rows of everything recorded so far, which waits for the device; the folder has them at a flush."""
        while self._pending:  # one by one: if one raises, those before it are not added again
            self._rows.write(self._pending.pop(0))

    def close(self, *, failed: bool = False) -> None:
        """Take every hook off and flush. The model is as it was before `attach`.

        failed: training raised, perhaps in this process alone: nothing is exchanged with others any more, and of the
            updates since the last flush only process 0's tokens are written. The black box has a last look.
        """
        if failed:
            self._note_why()
            self._ranks = self._rows.ranks = replace(self._ranks, size=1)
            if self._black_box is not None:
                self._black_box.stopped(self._update.step)
        self._tap.remove()
        if self._auditor is not None:
            self._auditor.remove()
        for handle in self._steps:
            handle.remove()
        try:
            self.flush()
        finally:
            self._writer.close()
            if self._black_box is not None:
                self._black_box.remove()

    def _note_why(self) -> None:
        """The exception that ends training goes to the list of events: it may name what no row holds."""
        error = sys.exception()
        if error is None or self._ranks.rank:
            return
        reason = f"training raised {type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            write_trigger(self.path, {"step": self._update.step, "reason": reason, "dumped": False})

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def _multiplied(self, gradient: Tensor, divided_by: float) -> None:
        """What arrives at the loss is what it was multiplied by: 1 / accumulation steps, the fp16 scale."""
        self._factor = gradient.detach().double().reshape(()) / divided_by
        self._update.factors.append(self._factor)

    def _arrived(self, sighting: Sighting) -> None:
        """A backward pass reached the tap: keep its completion tokens."""
        if not self._in_backward:
            self._forget_skipped()  # not between two forward passes of one backward pass: its gradients are to come
            self._in_backward = True
            _at_end_of_backward(self._backward_ended)
        update = self._update
        update.backwards += 1
        batch, ids = self._said_of(sighting.ids)
        if self._black_box is not None:
            self._black_box.arrived(sighting.ids, batch)
        sequence, place = completion_tokens(sighting, ids, batch)
        update.tokens += len(place)
        self._keep_for_audit(batch, ids, sequence, place)
        factor = torch.ones((), dtype=torch.float64) if self._factor is None else self._factor
        some, inside = looked_at(
            sighting,
            ids,
            batch,
            (sequence, place),
            first_sequence=update.sequences,
            factor=factor * self._ranks.size,  # the step is made of the processes' mean
            budget=self._budget,
            rng=self._rng,
        )
        update.sequences += ids.shape[0]
        if inside is not None:
            update.inside.append(inside)
        if not len(some.actions):
            return
        if sighting.kind == "hidden":
            update.candidates.append(some.gathered())
        elif sighting.kind == "logits":  # they are too large to keep until the step
            update.measured.append(measure(some, self._objective, None, self._temperature))
        else:
            rows = some.values
            assert isinstance(rows, Rows)
            entropy, squares = (
                None if beside is None else beside[rows.sequence, rows.place]
                for beside in (sighting.entropy, sighting.log_sum_sq_probs)
            )
            update.measured.append(
                measure_logprobs(
                    some.gathered(),
                    self._objective,
                    vocabulary=self._vocabulary,
                    entropy=entropy,
                    sum_sq_prob=None if squares is None else squares.double().exp(),
                    temperature=self._temperature,
                )
            )

    def _backward_ended(self) -> None:
        self._in_backward, self._factor = False, None
        self._meter.backward_ended()

    def _said_of(self, ids: Tensor | None) -> tuple[BatchRecord | None, Tensor]:
        """(what batch() said of this forward pass, its input ids); each record serves one forward pass."""
        if ids is None:
            if not self._batches:
                raise TapError(
                    "the model was called without input_ids. Call probe.batch(input_ids=...) before backward()."
                )
            batch = self._batches.pop()  # the backward pass meets the last forward pass first
            return batch, batch.input_ids
        if not self._batches:
            return None, ids
        fitting = [batch for batch in self._batches if batch.input_ids.shape == ids.shape]
        if not fitting:
            raise ValueError(
                f"input_ids: batch() was given {tuple(self._batches[-1].input_ids.shape)}, but the model saw "
                f"{tuple(ids.shape)}. Call batch() once for each forward and backward pass, with its own rows."
            )
        same = [batch for batch in fitting if batch.input_ids.data_ptr() == ids.data_ptr()]
        batch = (same or fitting)[-1]
        self._batches.remove(batch)
        self._update.mismatches.append((batch.input_ids.to(ids.device) != ids).any())
        return batch, ids

    def _forget_skipped(self) -> None:
        """A new update begins though the last one's step never came: its gradients were thrown away."""
        if self._update.backwards and self._meter.gradients_gone():
            self._rows.warn(
                f"update {self._update.step}: gradients were thrown away without a step (a loss scaler does so when "
                "they overflow); the recorder forgot their tokens as well."
            )
            self._update.forget(keep_loss=bool(self._batches), keep_factor=self._factor is not None)
            if self._black_box is not None:
                self._black_box.forget()

    def _keep_for_audit(self, batch: BatchRecord | None, ids: Tensor, sequence: Tensor, place: Tensor) -> None:
        if self._auditor is None or batch is None:
            return
        said = batch.rows(sequence, place, torch.arange(len(place), device=place.device), ids[sequence, place])
        if said is not None:
            self._auditor.arrived(said, (sequence, place - 1 - ids.shape[1]))

    def _before_step(self) -> None:
        update = self._update
        if not update.backwards:
            raise TapError(silence(self._tap))
        head = self._head if self._head is None or self._tap.kind == "logits" else self._head.gathered()
        if update.candidates:
            kept = choose([norm_of_rows(own(some.gradients)) for some in update.candidates], self._budget, self._rng)
            for some, (rows, growth) in zip(update.candidates, kept, strict=True):
                if len(rows):
                    part = replace(some[rows], weight=some.weight[rows] * growth)
                    update.measured.append(measure(part, self._objective, head, self._temperature))
        elif update.measured:
            kept = choose([_size(columns) for columns in update.measured], self._budget, self._rng)
            update.measured = [
                {name: column[rows] * growth if name == "weight" else column[rows] for name, column in columns.items()}
                for columns, (rows, growth) in zip(update.measured, kept, strict=True)
            ]
        update.candidates = []
        keeps_weights = self._black_box is not None and self._black_box.keeps_weights
        update.values = self._meter.before_step(audited=self._audited() or keeps_weights)
        if self._black_box is not None:
            self._black_box.before_step(update.step, update.values, update.measured)

    def _audited(self) -> bool:
        every = self._audit_every
        return self._auditor is not None and every is not None and self._update.step % every == 0

    def _after_step(self) -> None:
        update, audit = self._update, dict[str, float]()
        around = self._meter.around_the_step()
        if self._auditor is not None:
            if self._audited():
                audit = self._auditor.audit(*around)
            self._auditor.forget()
        found, norms, sketches = self._meter.after_step()
        if self._black_box is not None:
            self._black_box.after_step(found.get("update_norm"), norms, around)
        update.seconds = time.monotonic() - self._started
        update.values = update.values | update.loss_factor() | found | audit | self._noted
        update.norms, update.sketches = norms, sketches
        self._pending.append(update)
        self._update = UnderWay(update.step + 1, summed=update.summed)
        self._batches, self._noted = [], {}
        self._unwritten += 1
        if self._flush_every is None:
            return
        late = self._ranks.size == 1 and time.monotonic() - self._flushed > FLUSH_SECONDS  # clocks differ
        if self._unwritten >= self._flush_every or late:
            self.flush()


def _size(columns: Columns) -> Tensor:
    """How much a token matters, where it has been measured: |f'| where the norm is not known."""
    norm = columns["logit_grad_norm"]
    return torch.where(norm.isnan(), columns["d1"].abs(), norm)


def _at_end_of_backward(call: Callable[[], None]) -> None:
    """After the running backward pass, and what others do at its end: DDP puts the averaged gradients in place."""
    engine = torch.autograd.Variable._execution_engine  # the engine runs what was queued last, last
    engine.queue_callback(lambda: engine.queue_callback(call))
