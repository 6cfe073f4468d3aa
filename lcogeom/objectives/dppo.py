"""DPPO: REINFORCE or the surrogate, without the tokens that would leave a divergence bound (systems.md, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian
from lcogeom.geometry.softmax import blocks
from lcogeom.objectives.action import ActionObjective
from lcogeom.objectives.base import Objective, TokenBatch, register, require_finite_logits

DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl", "full_tv", "full_kl")
PUBLISHED = {"tv": 0.15, "kl": 0.05}


@register("dppo")
def dppo(
    *,
    divergence: str = "binary_tv",
    delta_low: float | None = None,
    delta_high: float | None = None,
    most: float | None = 10.0,
    detached: bool = True,
    top_k: int = 20,
) -> Objective:
    """-A sg(min(r, most)) M log p, M = 0 where the token already moved past a divergence bound in A's direction.

    M = 0 where A > 0, p > mu and D > delta_high, or A <= 0, p < mu and D > delta_low; mu the rollout policy's
    probability. D by `divergence`: "binary_tv" |p - mu| and "binary_kl" KL of (mu, 1 - mu) from (p, 1 - p), from
    log-probabilities alone; "topk_*" of the rollout policy's top_k ids and the action with the rest as one; "full_*" of
    the whole vocabulary: these need `old_logits`. M is held constant in every derivative.

    `detached=False` is the paper's text, -A r M: PPO's Hessian instead of REINFORCE's. Defaults: delta 0.15 for TV and
    0.05 for KL, most = 10, top_k = 20 as published. [systems.md 4, confirmed in code]

    Raises:
        ValueError: an unknown divergence, a bound below 0, most <= 0 or top_k < 1.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: {divergence!r}; must be one of {', '.join(DIVERGENCES)}.")
    published = PUBLISHED[divergence[-2:]]
    low = published if delta_low is None else delta_low
    high = published if delta_high is None else delta_high
    for option, value in (("delta_low", low), ("delta_high", high)):
        if not value >= 0:
            raise ValueError(f"{option}: {value}; must be >= 0.")
    if most is not None and not most > 0:
        raise ValueError(f"most: {most}; must be > 0, or None for no bound.")
    if top_k < 1:
        raise ValueError(f"top_k: {top_k}; must be at least 1.")
    ceiling = math.inf if most is None else math.log(most)
    options = {
        "divergence": divergence,
        "delta_low": low,
        "delta_high": high,
        "most": most,
        "detached": detached,
        "top_k": top_k,
    }

    def surrogate(logp: Tensor, batch: TokenBatch) -> Tensor:
        advantages, old = _known(batch, logp)
        if not detached:
            return -advantages * (logp - old).exp()
        return -advantages * (logp - old).detach().clamp(max=ceiling).exp() * logp

    def moved(logp: Tensor, distance: Tensor, batch: TokenBatch) -> Tensor:
        """1 - M, (N,) bool."""
        advantages, old = _known(batch, logp)
        above = (advantages > 0) & (logp > old) & (distance > high)
        return above | ((advantages <= 0) & (logp < old) & (distance > low))

    needs = ("advantages", "old_logprobs")
    if divergence.startswith("binary"):

        def loss(logp: Tensor, batch: TokenBatch) -> Tensor:
            fixed = logp.detach()
            distance = _binary(fixed, _known(batch, fixed)[1], divergence)
            return torch.where(moved(fixed, distance, batch), 0.0, surrogate(logp, batch))

        return ActionObjective("dppo", loss, needs, options)

    def keep(z: Tensor, batch: TokenBatch) -> Tensor:
        assert batch.old_logits is not None
        distance = _wide(z, batch.old_logits.detach().to(z), batch.actions, divergence, top_k)
        logp = torch.log_softmax(z, dim=1).gather(1, batch.actions.long()[:, None]).squeeze(1)
        return ~moved(logp, distance, batch)

    return DivergenceMasked("dppo", ActionObjective("dppo", surrogate, needs), keep, options)


@dataclass(frozen=True, eq=False, repr=False)
class DivergenceMasked(Objective):
    """An objective without the tokens that `keep` drops from the whole distribution."""

    name: str
    inner: ActionObjective
    keep: Callable[[Tensor, TokenBatch], Tensor]
    """(logits (n, V) float64, their tokens) -> M, (n,) bool."""
    options: Mapping[str, object]

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        return self.inner.loss(logits, self._kept(logits, batch))

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        return self.inner.gradient(logits, self._kept(logits, batch))

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        return self.inner.hessian(logits, self._kept(logits, batch))

    def _kept(self, logits: Tensor, batch: TokenBatch) -> TokenBatch:
        require_finite_logits(logits, batch)
        batch.require(self.name, "advantages", "old_logprobs", "old_logits")
        batch.require_vocabulary(logits.shape[1])
        rows = blocks(logits.shape, logits.device)
        return batch.masked(torch.cat([self.keep(logits[some].detach().double(), batch[some]) for some in rows]))


def _known(batch: TokenBatch, like: Tensor) -> tuple[Tensor, Tensor]:
    assert batch.advantages is not None
    assert batch.old_logprobs is not None
    return batch.advantages.to(like), batch.old_logprobs.to(like)


def _binary(logp: Tensor, old: Tensor, divergence: str) -> Tensor:
    p, mu = logp.exp(), old.exp()
    if divergence.endswith("tv"):
        return (p - mu).abs()
    rest, old_rest = -torch.expm1(logp), -torch.expm1(old)
    return mu * (old - logp) + old_rest * ((old_rest + 1e-8) / (rest + 1e-8)).log()


def _wide(z: Tensor, old: Tensor, actions: Tensor, divergence: str, top_k: int) -> Tensor:
    """D of two rows of logits, (n,), over the whole vocabulary or over the top ids and the rest as one."""
    logp, logq = torch.log_softmax(z, dim=1), torch.log_softmax(old, dim=1)
    if divergence.startswith("topk"):
        chosen = actions.long()[:, None]
        kept = torch.zeros_like(logq, dtype=torch.bool)
        kept.scatter_(1, logq.topk(min(top_k, logq.shape[1]), dim=1).indices, True)
        kept.scatter_(1, chosen, True)
        logp, logq = _lumped(logp, kept), _lumped(logq, kept)
    p, q = logp.exp(), logq.exp()
    if divergence.endswith("tv"):
        return (p - q).abs().sum(1) / 2
    return torch.where(q > 0, q * (logq - logp), 0.0).sum(1)


def _lumped(logp: Tensor, kept: Tensor) -> Tensor:
    """log-probabilities of the kept ids and, in one more column, of all others together, (n, V + 1)."""
    rest = torch.logsumexp(torch.where(kept, -math.inf, logp), dim=1, keepdim=True)
    return torch.cat([torch.where(kept, logp, -math.inf), rest], dim=1)
