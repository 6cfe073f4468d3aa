"""Objectives that see the logits only through l = log pi(a): one scalar function each (method.md, 2.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian, action_hessian
from lcogeom.geometry.softmax import require_finite, token_distribution
from lcogeom.objectives.base import Objective, TokenBatch, register, require_logits

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
        z = logits if logits.dtype == torch.float64 else logits.float()
        logprobs = torch.log_softmax(z, dim=1).gather(1, batch.actions.long()[:, None]).squeeze(1)
        return batch.kept(self._evaluate(logprobs, batch))

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        require_logits(logits, batch)
        require_finite(logits)
        distribution = token_distribution(logits, batch.actions)
        _, d1, _ = self.derivatives(distribution.logprobs, batch)
        return d1[:, None] * distribution.direction()

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        require_logits(logits, batch)
        require_finite(logits)
        distribution = token_distribution(logits, batch.actions)
        _, d1, d2 = self.derivatives(distribution.logprobs, batch)
        return action_hessian(distribution, d1, d2)

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


@register("sft")
def sft() -> Objective:
    """Negative log-likelihood, f = -l. Convex everywhere. [systems.md 3.1, confirmed]"""
    return ActionObjective("sft", lambda logp, _: -logp)


@register("reinforce")
def reinforce() -> Objective:
    """Policy gradient, f = -A l. Convex where A >= 0. [systems.md 3.1, confirmed]"""

    def loss(logp: Tensor, batch: TokenBatch) -> Tensor:
        assert batch.advantages is not None
        return -batch.advantages.to(logp) * logp

    return ActionObjective("reinforce", loss, ("advantages",))


@register("ppo")
def ppo(*, clip_low: float | None = 0.2, clip_high: float | None = 0.2) -> Objective:
    """PPO's surrogate, f = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(l - l_old).

    The clip is one-sided: with A > 0 only the upper bound acts, with A < 0 only the lower. `None` removes a bound.
    Unclipped: convex where A = 0, or A > 0 and pi >= 1/2. [systems.md 3.2, confirmed]

    Raises:
        ValueError: a bound below 0.
    """
    for option, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if bound is not None and not bound >= 0:
            raise ValueError(f"{option}: {bound}; must be >= 0, or None for no bound.")
    floor = -math.inf if clip_low is None or clip_low >= 1 else math.log1p(-clip_low)
    ceiling = math.inf if clip_high is None else math.log1p(clip_high)

    def loss(logp: Tensor, batch: TokenBatch) -> Tensor:
        assert batch.advantages is not None
        assert batch.old_logprobs is not None
        advantages = batch.advantages.to(logp)
        log_ratio = logp - batch.old_logprobs.to(logp)
        # Clipping the exponent instead of the ratio: a clipped ratio then never overflows, nor does its gradient.
        clipped = torch.where(advantages > 0, log_ratio.clamp(max=ceiling), log_ratio.clamp(min=floor))
        return -advantages * clipped.exp()

    return ActionObjective("ppo", loss, ("advantages", "old_logprobs"), {"clip_low": clip_low, "clip_high": clip_high})
