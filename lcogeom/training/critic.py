"""PPO's critic: a value for every token, learned by regression on returns.

It is a copy of the starting model without its head, and one number a token instead. Not a head on the policy's own
hidden states: detached, those only hold what the policy happens to need, and with gradients the critic's loss would
reach the policy, whose recorded gradient is to be the objective's alone. It costs a second model and optimiser.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lcogeom.training.rollout import Sequences


class Critic(torch.nn.Module):
    """Values of states, from a body of its own."""

    def __init__(self, model: Any) -> None:
        """model: the causal LM whose body is copied. The value head starts at 0."""
        super().__init__()
        self.body = copy.deepcopy(model.base_model)
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # where FSDP2 cuts
        width = model.get_output_embeddings().weight.shape[1]
        self.head = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T) float32: entry t is the value before the token input_ids[:, t] was chosen."""
        body = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        values = self.head(body.last_hidden_state).squeeze(2).float()
        return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], dim=1)


def values_of(critic: torch.nn.Module, sequences: Sequences) -> Tensor:
    """(B, T) float32 at the completion tokens, 0 elsewhere."""
    values: Tensor = critic(sequences.input_ids, sequences.attention_mask)
    return values.where(sequences.action_mask, 0.0)


def value_losses(values: Tensor, returns: Tensor, old_values: Tensor, clip: float | None) -> Tensor:
    """Half the squared error of each token's value; all arguments have one shape, which is the result's.

    clip: PPO's: the larger of this and the error of the value kept within +-clip of the rollout's.
    """
    losses = (values - returns).square() / 2
    if clip is None:
        return losses
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(losses, (near - returns).square() / 2)
