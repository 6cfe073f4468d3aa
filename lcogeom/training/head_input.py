"""What CAPO judges by: the input of the output head at the completion tokens, and the head's Adam moments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lcogeom.objectives import AdamState, LastLayer
from lcogeom.recording.unwrap import unwrap_model
from lcogeom.training.rollout import Sequences


@contextmanager
def head_inputs(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """The head's inputs (B, K, d) of the forward passes within, detached."""
    seen: list[Tensor] = []
    head: Any = unwrap_model(model).get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        hook.remove()


def last_layer(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    hidden: Tensor,
    sequences: Sequences,
    *,
    learning_rate: float,
    temperature: float,
) -> LastLayer:
    """The last layer as it stands before a step.

    Args:
        hidden: (B, K, d), the head's input at the last K positions.

    Raises:
        ValueError: the head is not trained.
    """
    weight = unwrap_model(model).get_output_embeddings().weight  # type: ignore[operator]
    if not weight.requires_grad:
        raise ValueError("intervention: it judges a step of the output head, which is frozen here. Set lora_rank=0.")
    kept = sequences.input_ids.shape[1] - sequences.first_action + 1
    rows = hidden[:, -kept:-1][sequences.action_mask[:, 1 - kept :]]  # (M, d)
    state = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in optimizer.state.get(weight, {}).items()
    }
    group = optimizer.param_groups[0]
    adam = AdamState(**state, betas=tuple(group["betas"]), eps=group["eps"]) if state else None
    return LastLayer(rows.float() / temperature, learning_rate=learning_rate, adam=adam)
