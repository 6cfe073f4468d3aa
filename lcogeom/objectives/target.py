"""Losses towards a distribution that is held fixed, k KL(t || p): convex whatever the target (method.md, 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian, action_hessian
from lcogeom.geometry.softmax import blocks
from lcogeom.objectives.base import Objective, TokenBatch, require_finite_logits, require_logits, working_precision


@dataclass(frozen=True, eq=False, repr=False)
class TargetObjective(Objective):
    """k KL(t || p) for a target t and a weight k that are held fixed. Gradient k (p - t), Hessian k S."""

    name: str
    log_target: Callable[[Tensor, TokenBatch], Tensor]
    """(logits (n, V) detached, their tokens) -> log t, (n, V), in the dtype of the logits."""
    weight: Callable[[TokenBatch], Tensor] | None = None
    """k >= 0, (N,) float64; None: 1."""
    needs: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        self._require(logits, batch)
        z = working_precision(logits)
        log_target = self.log_target(z.detach(), batch)
        target = log_target.exp()
        gap = torch.where(target > 0, log_target - torch.log_softmax(z, dim=1), 0.0)
        return self._kept_weight(batch).to(z) * (target * gap).sum(1)

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        require_finite_logits(logits, batch)
        self._require(logits, batch)
        weight = self._kept_weight(batch)
        result = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
        for rows in blocks(logits.shape, logits.device):
            z = logits[rows].detach().double()
            result[rows] = weight[rows, None] * (torch.softmax(z, dim=1) - self.log_target(z, batch[rows]).exp())
        return result

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        require_finite_logits(logits, batch)
        if self.weight is not None:
            self._require(logits, batch)
        weight = self._kept_weight(batch)
        return action_hessian(logits, batch.actions, -weight, torch.zeros_like(weight))

    def _kept_weight(self, batch: TokenBatch) -> Tensor:
        ones = torch.ones(len(batch), dtype=torch.float64, device=batch.actions.device)
        return batch.kept(ones if self.weight is None else self.weight(batch))

    def _require(self, logits: Tensor, batch: TokenBatch) -> None:
        require_logits(logits, batch)
        batch.require(self.name, *self.needs)
        batch.require_vocabulary(logits.shape[1])
