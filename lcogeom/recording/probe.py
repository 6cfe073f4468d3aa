"""The recorder: taps and optimiser hooks on a running model -> rows in a run folder."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from lcogeom.objectives import Objective
from lcogeom.recording.audit import StepAuditor
from lcogeom.recording.batch import BatchRecord
from lcogeom.recording.gradients import GradientMeter
from lcogeom.recording.head import output_head
from lcogeom.recording.summary import summarise
from lcogeom.recording.taps import Tap, TapError, hidden_tap, logits_tap, silence
from lcogeom.recording.tokens import Candidates, Columns, choose, measure
from lcogeom.runs.store import RunWriter

FLUSH_SECONDS = 60.0


class Probe:
    """A recorder attached to one model and optimiser. Made by `attach`; a context manager."""

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        writer: RunWriter,
        minimised: Objective | None,
        tap: str,
        tokens_per_update: int,
        flush_every: int,
        seed: int,
        tokenizer: transformers.PreTrainedTokenizerBase | None,
        audit_every: int | None,
        sketch: int,
        sketch_layers: bool,
        on_update: Callable[[Mapping[str, object]], None] | None,
    ) -> None:
        self.path: Path = writer.path
        self._writer = writer
        self._objective = minimised
        self._budget = tokens_per_update
        self._flush_every = flush_every
        self._rng = torch.Generator().manual_seed(seed)
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._head = output_head(model)
        self._meter = GradientMeter(model, optimizer, sketch=sketch, sketch_layers=sketch_layers)
        self._tap: Tap = (
            logits_tap(model, self._arrived) if tap == "logits" else hidden_tap(model, self._head, self._arrived)
        )
        self._audit_every = audit_every
        self._auditor = None
        if audit_every is not None and minimised is not None:
            self._auditor = StepAuditor(model, minimised, self._tap)
        self._steps = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        self._batch: BatchRecord | None = None
        self._candidates: list[Candidates] = []
        self._measured: list[Columns] = []
        self._losses: list[Tensor] = []
        self._mismatches: list[Tensor] = []
        self._sequences = 0
        self._completion_tokens = 0
        self._backwards = 0
        self._step = 0
        self._now: dict[str, Any] = {}
        self._pending: list[dict[str, Any]] = []
        self._unwritten = 0
        self._on_update = on_update
        self._warned: set[str] = set()
        self._started = self._flushed = time.monotonic()

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
    ) -> None:
        """Say what the next backward pass is about. Optional; before `loss.backward()`, once for each of them.

        Args:
            input_ids: (B, T) as given to the model.
            action_mask: (B, T), true at completion tokens: entry t belongs to the token input_ids[:, t], which the
                logits at t - 1 predicted. Without it, tokens whose gradient is not zero count.
            advantages: (B, T), or (B, T, K) with `advantage_ids`.
            old_logprobs, ref_logprobs: (B, T), of the tokens input_ids[:, t] under behaviour and reference policy.
            loss: the loss to be back-propagated, for the record.
            advantage_ids: (B, T, K) token ids the advantages belong to.
            old_logits: (M, V), the rollout policy's logits of the M completion tokens, in the order of
                `action_mask.nonzero()`; target objectives need them for their misfit.

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
        self._batch = BatchRecord(input_ids, given, old_logits)
        if loss is not None:
            self._losses.append(torch.as_tensor(loss).detach().mean())

    def flush(self) -> None:
        """Write everything recorded so far to the run folder."""
        self.collect()
        self._writer.flush()
        self._unwritten = 0
        self._flushed = time.monotonic()

    def collect(self) -> None:
        """Make the rows of everything recorded so far, which waits for the device; the folder has them at a flush."""
        while self._pending:
            self._write(self._pending.pop(0))

    def close(self) -> None:
        """Take every hook off and flush. The model is as it was before `attach`."""
        self._tap.remove()
        self._meter.remove()
        if self._auditor is not None:
            self._auditor.remove()
        for handle in self._steps:
            handle.remove()
        self.flush()

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _arrived(self, values: Tensor, gradient: Tensor, ids: Tensor | None) -> None:
        """A backward pass reached the tap: keep its completion tokens."""
        batch, self._batch = self._batch, None
        self._backwards += 1
        if ids is None:
            if batch is None:
                raise TapError(
                    "the model was called without input_ids. Call probe.batch(input_ids=...) before backward()."
                )
            ids = batch.input_ids
        elif batch is not None:
            if batch.input_ids.shape != ids.shape:
                raise ValueError(
                    f"input_ids: batch() was given {tuple(batch.input_ids.shape)}, but the model saw "
                    f"{tuple(ids.shape)}. Call batch() once for each forward and backward pass, with its own rows."
                )
            self._mismatches.append((batch.input_ids.to(ids.device) != ids).any())
        kept = ids.shape[1] - values.shape[1]  # logits_to_keep: only the last positions were computed
        if batch is not None and batch.mask is not None:
            sequence, place = batch.mask.to(ids.device).nonzero(as_tuple=True)
        else:
            sequence, place = (gradient[:, :-1] != 0).any(2).nonzero(as_tuple=True)
            place = place + kept + 1
        if len(place) and int(place.min()) <= kept:
            raise ValueError(
                f"action_mask: it marks input position {int(place.min())}, but the model computed "
                f"{values.shape[1]} of {ids.shape[1]} positions. Keep one more in logits_to_keep."
            )
        self._completion_tokens += len(place)
        self._keep_for_audit(batch, ids, sequence, place)
        first = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
        if batch is not None and batch.mask is not None:
            first = batch.mask.to(ids.device).int().argmax(1)
        # Chosen before anything is copied: of logits, all tokens' rows may not fit a second time.
        sizes = torch.linalg.vector_norm(gradient, dim=2, dtype=torch.float32)[sequence, place - 1 - kept]
        [(rows, weight)] = choose([sizes], self._budget, self._rng)
        sequence, place = sequence[rows], place[rows]
        actions = ids[sequence, place]
        some = Candidates(
            values=values[sequence, place - 1 - kept],
            gradients=gradient[sequence, place - 1 - kept].detach(),
            sequence=sequence + self._sequences,
            position=place - first[sequence],
            actions=actions,
            weight=weight,
            batch=None if batch is None else batch.rows(sequence, place, rows, actions),
        )
        self._sequences += ids.shape[0]
        if not len(rows):
            return
        if self._tap.kind == "hidden":
            self._candidates.append(some)
        else:  # logits are too large to keep until the step
            self._measured.append(measure(some, self._objective, None))

    def _keep_for_audit(self, batch: BatchRecord | None, ids: Tensor, sequence: Tensor, place: Tensor) -> None:
        if self._auditor is None or batch is None:
            return
        said = batch.rows(sequence, place, torch.arange(len(place), device=place.device), ids[sequence, place])
        if said is not None:
            self._auditor.arrived(said, (sequence, place - 1 - ids.shape[1]))

    def _before_step(self) -> None:
        if not self._backwards:
            raise TapError(silence(self._tap))
        if self._candidates:
            kept = choose([some.gradients.float().norm(dim=1) for some in self._candidates], self._budget, self._rng)
            for some, (rows, growth) in zip(self._candidates, kept, strict=True):
                if len(rows):
                    part = replace(some[rows], weight=some.weight[rows] * growth)
                    self._measured.append(measure(part, self._objective, self._head))
        elif self._measured:
            kept = choose([columns["logit_grad_norm"] for columns in self._measured], self._budget, self._rng)
            self._measured = [
                {name: column[rows] * growth if name == "weight" else column[rows] for name, column in columns.items()}
                for columns, (rows, growth) in zip(self._measured, kept, strict=True)
            ]
        self._candidates = []
        self._now = self._meter.before_step()

    def _after_step(self) -> None:
        audit: dict[str, float] = {}
        if self._auditor is not None and self._audit_every is not None:
            if self._step % self._audit_every == 0:
                audit = self._auditor.audit(*self._meter.around_the_step())
            self._auditor.forget()
        found, norms = self._meter.after_step()
        self._pending.append(
            {
                "step": self._step,
                "seconds": time.monotonic() - self._started,
                "values": self._now | found | audit,
                "norms": norms,
                "sketches": self._meter.sketches(),
                "measured": self._measured,
                "losses": self._losses,
                "mismatches": self._mismatches,
                "tokens": self._completion_tokens,
            }
        )
        self._measured, self._losses, self._mismatches = [], [], []
        self._sequences = self._completion_tokens = self._backwards = 0
        self._step += 1
        self._unwritten += 1
        if self._unwritten >= self._flush_every or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _write(self, update: Mapping[str, Any]) -> None:
        """One update's rows. The only place that waits for the device."""
        if any(bool(mismatch) for mismatch in update["mismatches"]):
            warnings.warn(
                f"update {update['step']}: batch() was given other input_ids than the model saw; advantages and old "
                "log-probabilities of this update belong to other tokens",
                stacklevel=2,
            )
        step = update["step"]
        parts = update["measured"]
        tokens = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]} if parts else {}
        if tokens:
            if tokens.pop("contradicts").any():
                self._warn(
                    f"update {step}: at some tokens the gradient has the opposite sign of what "
                    f"{self._objective!r} says; their `convex` is left empty. Are these the advantages it trains on?"
                )
            elif self._objective is not None and np.isnan(tokens["convex"]).all():
                self._warn(
                    f"update {step}: `convex` stays empty, because {self._objective!r} could not be evaluated: its "
                    "logits are not finite, or probe.batch(...) was not given what it needs."
                )
            ids = tokens["token_id"].tolist()
            self._writer.add("tokens", {**tokens, "text": [self._text(i) for i in ids], "step": [step] * len(ids)})
        norms = {name: [_number(value) for value in values] for name, values in update["norms"].items()}
        norms["step"] = [step] * len(norms["name"])
        self._writer.add("norms", norms)
        for vector, layer, values in update["sketches"]:
            content = values.cpu().numpy().astype("<f4").tobytes()
            self._writer.add("sketches", {"step": [step], "vector": [vector], "layer": [layer], "values": [content]})
        losses = [float(loss) for loss in update["losses"]]
        row: dict[str, object] = {
            "step": step,
            "seconds": update["seconds"],
            "objective": None if self._objective is None else self._objective.name,
            "loss": sum(losses) / len(losses) if losses else None,
            "tokens": update["tokens"],
            **{name: float(value) for name, value in update["values"].items()},
            **summarise(tokens),
        }
        self._writer.add("updates", {name: [value] for name, value in row.items()})
        if self._on_update is not None:
            self._on_update(row)

    def _warn(self, message: str) -> None:
        """Once for each kind of message, whatever the update."""
        kind = message.partition(": ")[2]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    def _text(self, token: int) -> str | None:
        if self._tokenizer is None:
            return None
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


def _number(value: object) -> object:
    return float(value) if isinstance(value, Tensor) else value
