"""The softmax of a batch of tokens, kept accurate where the action's probability is near 0 or near 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**17  # 1 MiB in float64: what the cache keeps while a block is worked on


@dataclass(frozen=True, eq=False)
class TokenDistribution:
    """p = softmax(z) and what depends on the action, float64 (method.md, section 1)."""

    probs: Tensor
    """p, (N, V)."""
    actions: Tensor
    """a, (N,) int64."""
    logprobs: Tensor
    """l = log p_a, (N,)."""
    complement: Tensor
    """1 - p_a as the sum of the other probabilities, (N,): accurate where p_a rounds to 1."""

    def direction(self) -> Tensor:
        """u = e_a - p, the gradient of log p_a with respect to the logits, (N, V)."""
        return self.probs.neg().scatter_(1, self.actions[:, None], self.complement[:, None])

    def odds_against(self) -> Tensor:
        """(1 - p_a) / p_a, (N,); infinite where p_a underflows."""
        return self.complement / self.probs.gather(1, self.actions[:, None]).squeeze(1)

    def entropy(self) -> Tensor:
        """-sum_j p_j log p_j in nats, (N,)."""
        return -torch.special.xlogy(self.probs, self.probs).sum(1)

    def sum_sq_prob(self) -> Tensor:
        """sum_j p_j^2, (N,)."""
        return self.probs.square().sum(1)


def token_distribution(logits: Tensor, actions: Tensor) -> TokenDistribution:
    """The softmax of each row, in float64 whatever the logits' dtype.

    Args:
        logits: (N, V), any floating dtype. Non-finite rows give NaN.
        actions: (N,) integer, each in [0, V).
    """
    actions = actions.long()
    z = logits.detach().double()
    top = z.max(dim=1, keepdim=True).values
    chosen_logit = z.gather(1, actions[:, None])
    weights = (z - top).exp_()
    chosen = weights.gather(1, actions[:, None])
    others = weights.scatter_(1, actions[:, None], 0.0).sum(1, keepdim=True)
    total = others + chosen
    complement = (others / total).squeeze(1)
    direct = (chosen_logit - top - total.log()).squeeze(1)
    # Near p_a = 1 the difference of logits cancels; log1p of the complement does not.
    logprobs = torch.where(complement < 0.5, torch.log1p(-complement), direct)
    return TokenDistribution(weights.scatter_(1, actions[:, None], chosen).div_(total), actions, logprobs, complement)


def blocks(tokens: int, vocab: int) -> Iterator[slice]:
    """Rows to be worked on together: what is computed of them stays in the cache, and memory stays bounded."""
    step = max(1, BLOCK_ELEMENTS // vocab)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def distributions(logits: Tensor, actions: Tensor) -> Iterator[tuple[slice, TokenDistribution]]:
    """(rows, `token_distribution` of those rows), block after block."""
    for rows in blocks(*logits.shape):
        yield rows, token_distribution(logits[rows], actions[rows])


def action_logprobs(logits: Tensor, actions: Tensor) -> Tensor:
    """log p_a, (N,) float64, from logits (N, V) of any floating dtype, without a copy of them."""
    return torch.cat([distribution.logprobs for _, distribution in distributions(logits, actions)])


def require_finite(logits: Tensor) -> None:
    """Raise ValueError naming the first token whose logits hold NaN or an infinity."""
    low, high = logits.detach().aminmax(dim=1)
    broken = ~(torch.isfinite(low) & torch.isfinite(high))
    if broken.any():
        token = int(broken.nonzero()[0])
        raise ValueError(
            f"logits: token {token} holds a NaN or an infinity ({int(broken.sum())} of {len(logits)} tokens do). "
            "Drop those tokens, or replace masked entries by a large negative number."
        )
