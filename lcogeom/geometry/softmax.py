"""The softmax of a batch of tokens, kept accurate where the action's probability is near 0 or near 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_BLOCK = 2**17  # 1 MiB in float64: what the cache keeps while a block is worked on
GPU_BLOCK = 2**23  # 64 MiB: enough to occupy the device


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
    weights, chosen, others, gap = split_softmax(logits, actions)
    scale = 1 / (others + chosen)
    probs = weights.scatter_(1, actions[:, None], chosen).mul_(scale)
    return TokenDistribution(probs, actions, _logprobs(chosen, others, gap).squeeze(1), (others * scale).squeeze(1))


def split_softmax(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(exp(z - max z) with 0 at the action (N, V), that of the action, sum of the others, z_a - max z; (N, 1) each).

    All float64 and the caller's own. actions: (N,) int64.
    """
    top = logits.detach().amax(dim=1, keepdim=True).double()
    z = logits.detach().to(torch.float64, copy=True)
    weights = z.sub_(top)
    gap = weights.gather(1, actions[:, None])
    weights.exp_()  # in place: fresh memory costs as much as the arithmetic
    others = weights.scatter_(1, actions[:, None], 0.0).sum(1, keepdim=True)
    return weights, gap.exp(), others, gap


def _logprobs(chosen: Tensor, others: Tensor, gap: Tensor) -> Tensor:
    """log p_a from what `split_softmax` gives."""
    total = others + chosen
    complement = others / total
    # Near p_a = 1 the difference of logits cancels; log1p of the complement does not.
    return torch.where(complement < 0.5, torch.log1p(-complement), gap - total.log())


def block_elements(device: torch.device) -> int:
    """How many numbers are worked on together."""
    return CPU_BLOCK if device.type == "cpu" else GPU_BLOCK


def blocks(shape: Sequence[int], device: torch.device, times: int = 1) -> Iterator[slice]:
    """Rows of a matrix (rows, width) to be worked on together: they stay in the cache, and memory stays bounded.

    times: where little else is held, how many times as many.
    """
    rows, width = shape
    step = max(1, times * block_elements(device) // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def distributions(logits: Tensor, actions: Tensor) -> Iterator[tuple[slice, TokenDistribution]]:
    """(rows, `token_distribution` of those rows), block after block."""
    for rows in blocks(logits.shape, logits.device):
        yield rows, token_distribution(logits[rows], actions[rows])


def action_logprobs(logits: Tensor, actions: Tensor) -> Tensor:
    """log p_a, (N,) float64, from logits (N, V) of any floating dtype, without a copy of them."""
    actions = actions.long()
    # Filled in place, here and wherever blocks are worked through: results that outlive a block would lie between the
    # large temporaries and keep the allocator from giving their memory to the next block.
    chosen, others, gap = torch.empty(3, len(actions), 1, dtype=torch.float64, device=logits.device)
    for rows in blocks(logits.shape, logits.device):
        _, chosen[rows], others[rows], gap[rows] = split_softmax(logits[rows], actions[rows])
    return _logprobs(chosen, others, gap).squeeze(1)


def require_finite(logits: Tensor, name: str = "logits") -> None:
    """Raise ValueError naming the argument and the first token whose logits hold NaN or an infinity."""
    # One sum sees every NaN and infinity; one that overflowed is looked at again.
    wide = torch.float32 if logits.dtype == torch.float16 else None
    sums = logits.detach().sum(dim=1, dtype=wide)
    suspect = ~torch.isfinite(sums)
    if not suspect.any():
        return
    broken = suspect.clone()
    broken[suspect] = ~torch.isfinite(logits.detach()[suspect]).all(dim=1)
    if broken.any():
        token = int(broken.nonzero()[0])
        raise ValueError(
            f"{name}: token {token} holds a NaN or an infinity ({int(broken.sum())} of {len(logits)} tokens do). "
            "Drop those tokens, or replace masked entries by a large negative number."
        )
