"""Losses towards another policy's distribution: forward KL, distillation from a DPO teacher, LCO's first version."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian
from lcogeom.objectives.action import ActionObjective
from lcogeom.objectives.base import Objective, TokenBatch, register
from lcogeom.objectives.expected import ExpectedObjective, known_advantages, policy_field, policy_logits, scattered
from lcogeom.objectives.target import TargetObjective


@register("forward-kl")
def forward_kl(*, to: str = "reference") -> Objective:
    """KL(q || p), q the reference or (`to="rollout"`) the behaviour policy. Gradient p - q, Hessian S: convex.

    [systems.md 3.8, confirmed]

    Raises:
        ValueError: `to` is neither.
    """
    needed = policy_field(to)

    def log_target(z: Tensor, batch: TokenBatch) -> Tensor:
        return torch.log_softmax(policy_logits(batch, to).to(z), dim=1)

    return TargetObjective("forward-kl", log_target, None, (needed,), {"to": to})


@register("dckd")
def dckd(*, weight: float = 0.1, top_k: int = 50) -> Objective:
    """Distillation from a DPO teacher: -log p(a) on the chosen answers plus weight KL(p_T || p) on both. Convex.

    p_T: the teacher's `TokenBatch.ref_logits`, renormalised on its top_k ids; `TokenBatch.chosen` says which tokens are
    the chosen answer's. [systems.md 15, confirmed; that the top k are renormalised is our reading]

    Raises:
        ValueError: a negative weight, or top_k < 1.
    """
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"weight: {weight}; must be a finite number >= 0.")
    if top_k < 1:
        raise ValueError(f"top_k: {top_k}; must be at least 1.")

    def log_target(z: Tensor, batch: TokenBatch) -> Tensor:
        teacher = policy_logits(batch, "reference").to(z)
        kept = teacher.topk(min(top_k, teacher.shape[1]), dim=1)
        return torch.full_like(z, -math.inf).scatter(1, kept.indices, torch.log_softmax(kept.values, dim=1))

    options = {"weight": weight, "top_k": top_k}
    return Named("dckd", options, _on_chosen() + weight * TargetObjective("dckd", log_target, None, ("ref_logits",)))


@register("adpa")
def adpa(*, weight: float = 1.6) -> Objective:
    """-log p(a) on the chosen answers plus weight (-sum_j p_j A_j) on the student's own.

    A_j = log(max(p_dpo, 1e-7) / max(p_ref, 1e-7)) of the DPO teacher's top ids, by the caller, in `advantages` and
    `advantage_ids`; the other ids get the least of them. Tokens with `chosen` off are the student's. [systems.md 15,
    confirmed]

    Raises:
        ValueError: a negative weight.
    """
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"weight: {weight}; must be a finite number >= 0.")

    def costs(z: Tensor, batch: TokenBatch) -> Tensor:
        assert batch.chosen is not None
        advantages, ids = known_advantages(batch)
        own = (~batch.chosen.bool()).to(z)[:, None]
        return -own * scattered(advantages, ids, z, advantages.min(dim=1, keepdim=True).values.to(z))

    expected = ExpectedObjective("adpa", 0.0, costs, ("advantages", "advantage_ids", "chosen"))
    return Named("adpa", {"weight": weight}, _on_chosen() + weight * expected)


@register("lco-v0")
def lco_v0(
    *, ratio_positive: float = 1.2, ratio_negative: float = 0.8, least: float = 0.8, most: float = 0.99
) -> Objective:
    """|A| KL(p' || p), p' the current policy with the action's probability scaled by a ratio. Hessian |A| S: convex.

    p'_a = ratio p_a, at most `most` where A > 0; where A < 0 and ratio p_a < `least` the token is not pushed (p' = p);
    the other ids share the rest in proportion. p' moves with the policy and is held fixed in every derivative. The
    paper's grid search gave 1.8 and 0.9; averages over positive and negative tokens are the caller's.
    [systems.md 1.3, confirmed in code]

    Raises:
        ValueError: a ratio that is not positive, `least` or `most` outside [0, 1).
    """
    for option, value in (("ratio_positive", ratio_positive), ("ratio_negative", ratio_negative)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{option}: {value}; must be a finite number > 0.")
    for option, value in (("least", least), ("most", most)):
        if not 0 <= value < 1:
            raise ValueError(f"{option}: {value}; must be in [0, 1).")

    def log_target(z: Tensor, batch: TokenBatch) -> Tensor:
        assert batch.advantages is not None
        logp = torch.log_softmax(z, dim=1)
        actions, positive = batch.actions.long()[:, None], batch.advantages[:, None] > 0
        pi = logp.gather(1, actions).exp()
        others = logp.scatter(1, actions, -math.inf)
        wanted = torch.where(positive, (ratio_positive * pi).clamp(max=most), ratio_negative * pi)
        rescaled = others - torch.logsumexp(others, 1, keepdim=True) + torch.log1p(-wanted)
        pushed = rescaled.scatter(1, actions, wanted.log())
        still = ~positive & (ratio_negative * pi < least)
        return torch.where(still, logp, pushed)

    options = {"ratio_positive": ratio_positive, "ratio_negative": ratio_negative, "least": least, "most": most}
    return TargetObjective("lco-v0", log_target, _size_of_advantage, ("advantages",), options)


def _size_of_advantage(batch: TokenBatch) -> Tensor:
    assert batch.advantages is not None
    return batch.advantages.double().abs()


def _on_chosen() -> ActionObjective:
    """-log p(a) on the tokens of the chosen answers."""

    def loss(logp: Tensor, batch: TokenBatch) -> Tensor:
        assert batch.chosen is not None
        return torch.where(batch.chosen.bool(), -logp, 0.0)

    return ActionObjective("sft-chosen", loss, ("chosen",))


@dataclass(frozen=True, eq=False, repr=False)
class Named(Objective):
    """A sum of terms under the name that the field knows it by."""

    name: str
    options: Mapping[str, object]
    total: Objective

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        return self.total.loss(logits, batch)

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        return self.total.gradient(logits, batch)

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        return self.total.hessian(logits, batch)
