"""REPPO for discrete actions: improve the policy inside a KL bound, return to the rollout policy outside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian
from lcogeom.geometry.softmax import blocks
from lcogeom.objectives.base import Objective, TokenBatch, register, require_finite_logits
from lcogeom.objectives.expected import ExpectedObjective, known_advantages, scattered
from lcogeom.objectives.teacher import forward_kl


@register("reppo")
def reppo(*, alpha: float = 0.01, kl_weight: float = 0.01, kl_bound: float = 0.1) -> Objective:
    """sum_j p_j (alpha log p_j - Q_j) where KL(pi_old || p) < kl_bound, else kl_weight KL(pi_old || p).

    Q of the ids in `advantage_ids` stands in `TokenBatch.advantages`, 0 elsewhere. The gate is held constant in every
    derivative. [systems.md 10: the published code acts on continuous actions with sampled KL; this discrete form is
    reconstructed]

    Raises:
        ValueError: an option that is negative or not finite.
    """
    for option, value in (("alpha", alpha), ("kl_weight", kl_weight), ("kl_bound", kl_bound)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{option}: {value}; must be a finite number >= 0.")
    return Reppo(alpha, kl_weight, kl_bound)


class Reppo(Objective):
    """See `reppo`."""

    def __init__(self, alpha: float, kl_weight: float, kl_bound: float) -> None:
        self.name = "reppo"
        self.options = {"alpha": alpha, "kl_weight": kl_weight, "kl_bound": kl_bound}
        self.bound = kl_bound
        self.pull = kl_weight * forward_kl(to="rollout")

        def costs(z: Tensor, batch: TokenBatch) -> Tensor:
            advantages, ids = known_advantages(batch)
            return scattered(-advantages, ids, z)

        self.improve = ExpectedObjective("reppo", alpha, costs, ("advantages", "old_logits"))

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        inside, outside = self._branches(logits, batch)
        return self.improve.loss(logits, inside) + self.pull.loss(logits, outside)

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        inside, outside = self._branches(logits, batch)
        return self.improve.gradient(logits, inside).add_(self.pull.gradient(logits, outside))

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        inside, outside = self._branches(logits, batch)
        return self.improve.hessian(logits, inside) + self.pull.hessian(logits, outside)

    def _branches(self, logits: Tensor, batch: TokenBatch) -> tuple[TokenBatch, TokenBatch]:
        """The batch masked to the tokens of either branch."""
        require_finite_logits(logits, batch)
        batch.require(self.name, "advantages", "old_logits")
        batch.require_vocabulary(logits.shape[1])
        plain = batch.masked(torch.ones(len(batch), dtype=torch.bool, device=logits.device))
        near = torch.cat(
            [
                forward_kl(to="rollout").loss(logits[rows].detach().double(), plain[rows])
                for rows in blocks(logits.shape, logits.device)
            ]
        )
        near = near < self.bound
        return batch.masked(near), batch.masked(~near)
