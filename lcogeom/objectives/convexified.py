"""PPO made convex token by token: just as much forward KL to the rollout policy as each token lacks."""

from __future__ import annotations

import torch
from torch import Tensor

from lcogeom.geometry.convexity import convexity_margins, odds_against
from lcogeom.geometry.hessian import LogitHessian, action_hessian
from lcogeom.geometry.softmax import action_logprobs
from lcogeom.objectives.action import ActionObjective
from lcogeom.objectives.base import Objective, TokenBatch, register, require_finite_logits, require_logits
from lcogeom.objectives.surrogates import ppo
from lcogeom.objectives.teacher import forward_kl

EPS = torch.finfo(torch.float64).eps


@register("ppo-cvx")
def ppo_cvx() -> Objective:
    """(unclipped PPO + k* KL(pi_old || p)) / (1 + k*), k* the least weight that makes the token convex.

    k* = max(0, f', f' - f'' (1 - pi) / pi) of each token (method.md, 2.2), held constant in every derivative and
    rounded up, so that every token is convex in floating point too. Reads `old_logits`. [ours, experimental]
    """
    return ConvexPPO()


class ConvexPPO(Objective):
    """See `ppo_cvx`."""

    def __init__(self) -> None:
        self.name = "ppo-cvx"
        self.options = {}
        surrogate = ppo(clip_low=None, clip_high=None)
        assert isinstance(surrogate, ActionObjective)
        self.surrogate = surrogate
        self.pull = forward_kl(to="rollout")

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        require_logits(logits, batch)
        weight = self._weight(logits, batch)
        surrogate, pull = self.surrogate.loss(logits, batch), self.pull.loss(logits, batch)
        return (1 / (1 + weight)).to(surrogate) * surrogate + (weight / (1 + weight)).to(surrogate) * pull

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        require_finite_logits(logits, batch)
        weight = self._weight(logits, batch)[:, None]
        total = self.surrogate.gradient(logits, batch)
        return total.add_(self.pull.gradient(logits, batch).mul_(weight)).div_(1 + weight)

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        require_finite_logits(logits, batch)
        weight = self._weight(logits, batch)
        _, d1, d2 = self.surrogate.derivatives(action_logprobs(logits, batch.actions), batch)
        d1 = (d1 - weight) / (1 + weight)  # of one sum: k* and f' must not be rounded apart
        return action_hessian(logits, batch.actions, batch.kept(d1), d2 / (1 + weight))

    def _weight(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """k*, (N,) float64."""
        batch.require(self.name, "advantages", "old_logprobs", "old_logits")
        logprobs = action_logprobs(logits.detach(), batch.actions)
        _, d1, d2 = self.surrogate.derivatives(logprobs, batch)
        margins = convexity_margins(d1, d2, odds_against(logprobs))
        least = torch.zeros_like(d1)
        for margin in margins:
            rounding = 8 * EPS * (d1.abs() + (margin + d1).abs())
            least = torch.where(margin < 0, torch.maximum(least, rounding - margin), least)
        return least.clamp(max=1e300)
