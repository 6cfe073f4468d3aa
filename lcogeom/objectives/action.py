"""Objectives that see the logits only through l = log pi(a): one scalar function each (method.md, 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian, action_hessian
from lcogeom.geometry.softmax import action_logprobs, distributions
from lcogeom.objectives.base import (
    Objective,
    TokenBatch,
    require_factor,
    require_finite_logits,
    require_logits,
    working_precision,
)

ScalarLoss = Callable[[Tensor, TokenBatch], Tensor]
COUPLING_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class ActionObjective(Objective):
    """The objective f(l). Gradient f' u and Hessian f'' u u^T - f' S follow from f by scalar differentiation."""

    name: str
    function: ScalarLoss
    """f: (log-probabilities (N,), batch) -> per-token loss (N,); token n may depend on l_n only."""
    needs: tuple[str, ...] = ()
    """TokenBatch fields that f reads."""
    options: Mapping[str, object] = field(default_factory=dict)

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        require_logits(logits, batch)
        logprobs = (
            torch.log_softmax(working_precision(logits), dim=1).gather(1, batch.actions.long()[:, None]).squeeze(1)
        )
        return batch.kept(self._evaluate(logprobs, batch))

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        require_finite_logits(logits, batch)
        _, d1, _ = self.derivatives(action_logprobs(logits, batch.actions), batch)
        return along_direction(logits, batch.actions, d1)

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        require_finite_logits(logits, batch)
        _, d1, d2 = self.derivatives(action_logprobs(logits, batch.actions), batch)
        return action_hessian(logits, batch.actions, d1, d2)

    def __add__(self, other: Objective) -> Objective:
        if not isinstance(other, ActionObjective):
            return super().__add__(other)
        return ActionObjective(  # a sum of functions of l is one
            f"{self.name} + {other.name}",
            lambda logp, b: self.function(logp, b) + other.function(logp, b),
            tuple(dict.fromkeys((*self.needs, *other.needs))),
            {self.name: dict(self.options), other.name: dict(other.options)},
        )

    def __mul__(self, factor: float) -> Objective:
        factor = require_factor(factor)
        scaled = {"factor": factor, **self.options}
        return ActionObjective(
            f"{factor:g} * {self.name}", lambda logp, b: factor * self.function(logp, b), self.needs, scaled
        )

    __rmul__ = __mul__

    def derivatives(self, logprobs: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(f, f', f'') at each token, (N,) float64 each, 0 where the mask is off. logprobs: (N,).

        Raises:
            ValueError: f returns another shape than (N,), or couples tokens.
        """
        with torch.enable_grad():
            point = logprobs.detach().double().requires_grad_()
            value = self._evaluate(point, batch)
            d1 = _slope(value, point, torch.ones_like(point))
            d2 = _slope(d1, point, torch.ones_like(point))
            # sum_m s_m f_m has the derivative s_n f'_n only where f_n depends on l_n alone.
            signs = torch.ones_like(point)
            signs[1::2] = -1
            mixed = _slope(value, point, signs)
        gap = (mixed - signs * d1).detach().abs()
        if bool((gap > COUPLING_TOLERANCE * d1.detach().abs().max()).any()):
            raise ValueError(
                f"objective {self.name!r}: the loss of a token depends on other tokens' log-probabilities. "
                "An action objective is a function of each token's own; return (N,) without sums or means over logp."
            )
        return batch.kept(value.detach()), batch.kept(d1.detach()), batch.kept(d2.detach())

    def _evaluate(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        batch.require(self.name, *self.needs)
        value = self.function(logprobs, batch)
        if value.shape != logprobs.shape:
            raise ValueError(
                f"objective {self.name!r}: the function returned shape {tuple(value.shape)} for log-probabilities of "
                f"shape {tuple(logprobs.shape)}; it must return one loss per token, without a mean or sum."
            )
        return value


def _slope(value: Tensor, point: Tensor, weights: Tensor) -> Tensor:
    """d (weights . value) / d point, (N,); 0 where value does not depend on point."""
    if not value.requires_grad:
        return torch.zeros_like(point)
    (slope,) = torch.autograd.grad(value, point, weights, create_graph=True, allow_unused=True)
    return torch.zeros_like(point) if slope is None else slope


def action_objective(function: ScalarLoss, *, name: str = "custom") -> ActionObjective:
    """An objective of your own: `lg.action_objective(lambda logp, b: -b.advantages * (logp - b.old_logprobs).exp())`.

    Args:
        function: per-token loss (N,) of the actions' log-probabilities (N,) and the `TokenBatch`, in torch
            operations that autograd differentiates twice. Token n's loss may depend on logp[n] only.
        name: how it is called in a run's record.
    """
    return ActionObjective(name, function)


def along_direction(logits: Tensor, actions: Tensor, d1: Tensor) -> Tensor:
    """f' u, (N, V) float64, block by block. d1 = f', (N,)."""
    result = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    for rows, some in distributions(logits, actions):
        result[rows] = d1[rows, None] * some.direction()
    return result
