"""What a backward pass brings to the tap: which tokens are its completion, and which of them are looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from lcogeom.recording.batch import BatchRecord
from lcogeom.recording.candidates import Candidates, Rows, choose
from lcogeom.recording.taps import Sighting


def completion_tokens(sighting: Sighting, ids: Tensor, batch: BatchRecord | None) -> tuple[Tensor, Tensor]:
    """(sequence, place in the input) of each token that is marked, or that has a gradient where none is: (N,) int64.

    Raises:
        ValueError: the mask marks a position that the model did not compute.
    """
    gradient, kept = sighting.gradient, _not_computed(sighting, ids)
    if batch is not None and batch.mask is not None:
        sequence, place = batch.mask.to(ids.device).nonzero(as_tuple=True)
    else:
        moved = gradient != 0 if sighting.kind == "log_probs" else (gradient[:, :-1] != 0).any(2)
        sequence, place = moved.nonzero(as_tuple=True)
        place = place + kept + 1
    if len(place) and int(place.min()) <= kept:
        raise ValueError(
            f"action_mask: it marks input position {int(place.min())}, but the model computed "
            f"{sighting.values.shape[1]} of {ids.shape[1]} positions. Keep one more in logits_to_keep."
        )
    return sequence, place


def looked_at(
    sighting: Sighting,
    ids: Tensor,
    batch: BatchRecord | None,
    tokens: tuple[Tensor, Tensor],
    *,
    first_sequence: int,
    factor: Tensor,
    budget: int,
    rng: torch.Generator,
) -> tuple[Candidates, Tensor | None]:
    """At most `budget` of the tokens, still as the tap saw them; and the gradient's share of them, with a mask.

    Args:
        tokens: from `completion_tokens`.
        first_sequence: number of the batch's first sequence in this update.
        factor: 0-d float64, what the loss was multiplied by.

    Returns:
        The tokens, chosen before anything is copied: of logits, all tokens' rows may not fit a second time. Then (2,)
        float64: squared norm of the gradient at the completion tokens, and everywhere; None without a mask.
    """
    values, gradient = sighting.values, sighting.gradient
    sequence, place = tokens
    at = place - 1 - _not_computed(sighting, ids)
    first = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
    inside = None
    sizes = gradient.abs().float() if gradient.ndim == 2 else norm_of_rows(gradient)
    if batch is not None and batch.mask is not None:
        first = batch.mask.to(ids.device).int().argmax(1)
        squares = sizes.double().square()
        inside = torch.stack([squares[sequence, at].sum(), squares.sum()])
    [(rows, weight)] = choose([sizes[sequence, at]], budget, rng)
    sequence, place, at = sequence[rows], place[rows], at[rows]
    actions = ids[sequence, place]
    some = Candidates(
        values=Rows(values, sequence, at),
        gradients=Rows(gradient.detach(), sequence, at),
        sequence=sequence + first_sequence,
        position=place - first[sequence],
        actions=actions,
        weight=weight,
        factor=factor.to(weight.device).expand(len(rows)),
        batch=None if batch is None else batch.rows(sequence, place, rows, actions),
    )
    return some, inside


def norm_of_rows(gradient: Tensor) -> Tensor:
    """(..., ) float32: norms along the last dimension."""
    return torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)


def _not_computed(sighting: Sighting, ids: Tensor) -> int:
    """Positions at the input's start that are not there: with logits_to_keep only the last were computed. The first
    log-probability is the second token's."""
    return ids.shape[1] - sighting.values.shape[1] - (sighting.kind == "log_probs")
