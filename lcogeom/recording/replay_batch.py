"""A batch from the black box, run again."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from lcogeom.objectives import Objective
from lcogeom.objectives import objective as objective_by_name
from lcogeom.recording.head import output_head
from lcogeom.recording.passes import ModelParts, tokens_again
from lcogeom.recording.snapshot import recorded_pass
from lcogeom.runs.black_box import RecordedBatch


@dataclass(frozen=True, eq=False)
class ReplayedBatch:
    """What a recorded batch gives under a model."""

    loss: float
    """Mean of the objective over the completion tokens."""
    recorded_loss: float | None
    """As it was in the run. Equal to `loss` where the loop's loss is that mean, and the weights are the same."""
    tokens: pd.DataFrame
    """sequence, position, token_id, logprob, loss of each completion token, in the order of `action_mask.nonzero()`."""


def replay_batch(
    batch: RecordedBatch, model: torch.nn.Module, objective: str | Objective | None = None
) -> ReplayedBatch:
    """Run the forward pass of a recorded batch again, in its mode, autocast and random numbers.

    With the weights of that update (`BlackBoxEntry.load_weights`, or one's own checkpoint) and on the same kind of
    device, the loss is the recorded one up to the rounding of another matrix product: to 1e-6, in bf16 and under
    autocast too, on the CPU. Random numbers, modes and buffers of the model end as they were.

    Args:
        batch: one of `run.black_box()[-1].batches`.
        model: a causal LM of the same architecture, on any device.
        objective: what was minimised; None: the one named at attach(), or for a batch with `labels` alone "sft".

    Raises:
        ValueError: the objective is not known or lacks a field; an input was left out; no completion tokens are known.
        TypeError: not a causal LM of transformers.
    """
    one = recorded_pass(batch)
    minimised = _objective(batch, objective, labels="labels" in one.inputs)
    parts = ModelParts(model, output_head(model), batch.temperature)
    sequence, place, logits, tokens = tokens_again(parts, one)
    with torch.no_grad():
        losses = minimised.loss(logits, tokens)
        logprobs = torch.log_softmax(logits.float(), 1).gather(1, tokens.actions[:, None]).squeeze(1)
    return ReplayedBatch(
        loss=float(losses.double().mean()),
        recorded_loss=batch.loss,
        tokens=pd.DataFrame(
            {
                "sequence": sequence.tolist(),
                "position": _from_first(sequence, place).tolist(),
                "token_id": tokens.actions.tolist(),
                "logprob": logprobs.double().tolist(),
                "loss": losses.double().tolist(),
            }
        ),
    )


def _objective(batch: RecordedBatch, given: str | Objective | None, *, labels: bool) -> Objective:
    if isinstance(given, Objective):
        return given
    if given is not None:
        return objective_by_name(given)
    if batch.objective is not None:
        try:
            return objective_by_name(batch.objective["name"], **batch.objective["options"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"objective: {batch.objective['name']!r} cannot be built from the record; pass objective=..."
            ) from error
    if labels:
        return objective_by_name("sft")
    raise ValueError("objective: none was named at attach(); pass objective=...")


def _from_first(sequence: Tensor, place: Tensor) -> Tensor:
    """Places counted from the first completion token of each sequence."""
    first = torch.full((int(sequence.max()) + 1,), int(place.max()), device=place.device)
    return place - first.scatter_reduce(0, sequence, place, "amin")[sequence]
