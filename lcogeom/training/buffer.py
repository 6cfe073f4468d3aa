"""What a rollout leaves for the updates made from it, and the loss of some of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcogeom.objectives import TokenBatch
from lcogeom.training.old_policy import OldPolicy
from lcogeom.training.rollout import Sample, Sequences


@dataclass(frozen=True, eq=False)
class Rollout:
    """B completions of this process; every tensor of tokens is (B, T), entry t belongs to input_ids[:, t]."""

    samples: Sequence[Sample]
    sequences: Sequences
    rewards: Tensor
    """(B,) float32."""
    advantages: Tensor | None = None
    """(B, T), or (B, T, K) of the ids in `advantage_ids`."""
    advantage_ids: Tensor | None = None
    """(B, T, K) int64."""
    old_logprobs: Tensor | None = None
    """(B, T); None: the policy has not moved since, its own log-probabilities serve."""
    old: OldPolicy | None = None
    """Gives old logits back; None: nothing asks for them, or the policy has not moved since."""
    ref_logprobs: Tensor | None = None
    """(B, T), of the policy that training started from."""
    values: Tensor | None = None
    """(B, T), the critic's when the rollout was made."""
    returns: Tensor | None = None
    """(B, T), what the critic learns."""

    def token_batch(self, rows: Tensor, logits: Tensor, temperature: float, needs: frozenset[str]) -> TokenBatch:
        """The completion tokens of some rows, in the order of `action_mask[rows].nonzero()`.

        Args:
            rows: (R,) int64.
            logits: (M, V), the policy's now, divided by the temperature.
            temperature: what old logits are divided by.
            needs: the fields that the objective reads.
        """
        mask = self.sequences.action_mask[rows]
        actions = self.sequences.input_ids[rows][mask]
        given: dict[str, Any] = {"sequences": mask.nonzero()[:, 0]}
        for name in ("advantages", "advantage_ids", "ref_logprobs", "old_logprobs"):
            value = getattr(self, name)
            if value is not None:
                given[name] = value[rows][mask]
        if self.old_logprobs is None:
            given["old_logprobs"] = logprobs_of(logits.detach(), actions)
        if "old_logits" in needs:
            given["old_logits"] = (
                logits.detach() if self.old is None else self.old.logits(rows, mask).float() / temperature
            )
        return TokenBatch(actions, **given)


def logprobs_of(logits: Tensor, actions: Tensor) -> Tensor:
    """Log-probability of each token, (M,) float32, at most 0."""
    scores = logits.float()
    chosen = scores.gather(1, actions[:, None]).squeeze(1)
    return (chosen - scores.logsumexp(1)).clamp(max=0.0)


def token_weights(
    mask: Tensor, reduction: str, *, completions: int, tokens: Tensor | int, longest: int, kept: Tensor | None = None
) -> Tensor:
    """What each token's loss is multiplied by, so that the sum over all rows of an update is its loss.

        token      1 / tokens                       DAPO; PPO and LCO as mostly implemented
        sequence   1 / (completions * length)       GRPO [systems.md 3.3]
        sum        1 / completions                  REINFORCE
        constant   1 / (completions * longest)      Dr. GRPO, Dr.CAPO [systems.md 2.4]

    Args:
        mask: (R, T) bool, the completion tokens of some rows.
        completions, tokens: of the whole update, all processes.
        longest: max_new_tokens.
        kept: (M,) bool, tokens that an intervention kept. `sequence` divides by the kept length, at least 1, as CAPO's
            code does; the other divisors count dropped tokens.

    Returns:
        (M,) float32, in the order of `mask.nonzero()`.
    """
    row = mask.nonzero()[:, 0]
    ones = torch.ones(len(row), device=mask.device)
    if reduction == "token":
        return ones / tokens
    if reduction == "sum":
        return ones / completions
    if reduction == "constant":
        return ones / (completions * longest)
    counted = ones if kept is None else kept.float()
    length = torch.zeros(len(mask), device=mask.device).index_add_(0, row, counted).clamp(min=1.0)
    return ones / (completions * length[row])
