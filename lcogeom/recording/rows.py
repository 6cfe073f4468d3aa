"""What is known of one update -> its rows in the run folder, and what has to be said about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import transformers
from torch import Tensor

from lcogeom.objectives import Objective
from lcogeom.recording.ranks import NoWriter, Ranks
from lcogeom.recording.seen import together
from lcogeom.recording.summary import summarise
from lcogeom.recording.under_way import UnderWay
from lcogeom.runs.store import RunWriter


class UpdateRows:
    """Makes the rows of updates. The only place that waits for the device."""

    def __init__(
        self,
        writer: RunWriter | NoWriter,
        ranks: Ranks,
        objective: Objective | None,
        tokenizer: transformers.PreTrainedTokenizerBase | None,
        on_update: Callable[[Mapping[str, object]], None] | None,
    ) -> None:
        self._writer, self.ranks = writer, ranks
        self._objective, self._tokenizer, self._on_update = objective, tokenizer, on_update
        self._texts: dict[int, str] = {}
        self._warned: set[str] = set()

    def write(self, update: UnderWay) -> None:
        """One update's rows."""
        step = update.step
        seen = together(self.ranks, update)
        if seen.mismatch:
            warnings.warn(
                f"update {step}: batch() was given other input_ids than the model saw; advantages and old "
                "log-probabilities of this update belong to other tokens",
                stacklevel=2,
            )
        tokens = seen.tokens
        if tokens:
            if tokens.pop("contradicts").any():
                self.warn(
                    f"update {step}: at some tokens the gradient has the opposite sign of what "
                    f"{self._objective!r} says; their `convex` is left empty. Are these the advantages it trains on?"
                )
            elif self._objective is not None and np.isnan(tokens["convex"]).all():
                self.warn(
                    f"update {step}: `convex` stays empty, because {self._objective!r} could not be evaluated: its "
                    "logits are not finite, or probe.batch(...) was not given what it needs."
                )
            ids = tokens["token_id"].tolist()
            self._writer.add("tokens", {**tokens, "text": [self.text(i) for i in ids], "step": [step] * len(ids)})
        before, clipped = (update.values.get(name) for name in ("grad_norm", "grad_norm_clipped"))
        if before is not None and clipped is not None and bool(before.isnan()) and bool(clipped.isfinite()):
            self.warn(
                f"update {step}: `grad_norm` stays empty, because the gradient was changed entry by entry between the "
                "backward pass and the step (clip_grad_value_?); `grad_norm_clipped` is what the optimiser got."
            )
        norms = {name: [_number(value) for value in values] for name, values in update.norms.items()}
        norms["step"] = [step] * len(norms["name"])
        self._writer.add("norms", norms)
        for vector, layer, values in update.sketches:
            content = values.cpu().numpy().astype("<f4").tobytes()
            self._writer.add("sketches", {"step": [step], "vector": [vector], "layer": [layer], "values": [content]})
        row: dict[str, object] = {
            "step": step,
            "seconds": update.seconds,
            "objective": None if self._objective is None else self._objective.name,
            "loss": seen.loss,
            "tokens": seen.count,
            "outside_share": seen.outside_share,
            **{name: float(value) for name, value in update.values.items()},
            **summarise(tokens),
        }
        self._writer.add("updates", {name: [value] for name, value in row.items()})
        if self._on_update is not None:
            self._on_update(row)

    def warn(self, message: str) -> None:
        """Once for each kind of message, whatever the update."""
        kind = message.partition(": ")[2]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    def text(self, token: int) -> str | None:
        """The token decoded; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


def _number(value: object) -> object:
    return float(value) if isinstance(value, Tensor) else value
