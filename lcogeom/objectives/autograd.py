"""A loss of the logits of which nothing is known but how to compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcogeom.geometry.autograd import AutogradHessian
from lcogeom.geometry.softmax import blocks
from lcogeom.objectives.base import TokenBatch, require_finite_logits, require_logits, working_precision

LogitLoss = Callable[[Tensor, TokenBatch], Tensor]


@dataclass(frozen=True, eq=False)
class AutogradObjective:
    """Loss, gradient and Hessian by autograd, with the methods of `Objective`. Its Hessian says `exact = False`."""

    name: str
    function: LogitLoss
    """(logits (n, V), their tokens) -> loss (n,); token i may depend on its own row only."""
    options: Mapping[str, object] = field(default_factory=dict)

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """Per-token loss, (N,), differentiable. logits: (N, V)."""
        require_logits(logits, batch)
        return batch.kept(self._evaluate(working_precision(logits), batch))

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """d loss_n / d logits_n, (N, V) float64, by backward in float64."""
        require_finite_logits(logits, batch)
        parts = []
        for rows in blocks(logits.shape, logits.device):
            with torch.enable_grad():
                z = logits[rows].detach().double().requires_grad_()
                some = batch[rows]
                parts.append(torch.autograd.grad(some.kept(self._evaluate(z, some)).sum(), z)[0])
        return torch.cat(parts)

    def hessian(self, logits: Tensor, batch: TokenBatch) -> AutogradHessian:
        """d^2 loss_n / d logits_n^2, N matrices, by double backward in float64."""
        require_finite_logits(logits, batch)

        def loss(z: Tensor, rows: slice) -> Tensor:
            some = batch[rows]
            return some.kept(self._evaluate(z, some))

        return AutogradHessian(logits.detach(), loss)

    def _evaluate(self, z: Tensor, batch: TokenBatch) -> Tensor:
        value = self.function(z, batch)
        if value.shape != (len(batch),):
            raise ValueError(
                f"objective {self.name!r}: the function returned shape {tuple(value.shape)} for {len(batch)} tokens; "
                "it must return one loss per token, without a mean or sum."
            )
        return value


def autograd_objective(function: LogitLoss, *, name: str = "custom") -> AutogradObjective:
    """Any per-token loss of the logits: `lg.autograd_objective(lambda z, b: torch.logsumexp(z, 1) ** 2)`.

    Where the loss sees the logits only through log pi(a), `lg.action_objective` is exact and faster.

    Args:
        function: (logits (n, V), `TokenBatch` of those tokens) -> loss (n,), in torch operations that autograd
            differentiates twice. A token's loss may depend on its own row only.
        name: how it is called.
    """
    return AutogradObjective(name, function)
