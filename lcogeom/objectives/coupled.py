"""Losses that couple tokens: phi(m) of one weighted sum m over a completion or a preference pair.

    m_g = sum_t c_t (x_t - o_t),     x_t = log pi(a_t), or the action's raw logit (Q-RM)

Within a token the Hessian is phi' c_t (-S) + phi'' c_t^2 u u^T; between two tokens of a group phi'' c_t c_s u_t u_s^T.
`hessian` gives the former, `joint_hessian` both. The loss of a group is spread evenly over its kept tokens, so that
`loss(...).sum()` is the sum over groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian, action_hessian, diagonal_hessian
from lcogeom.geometry.joint import JointHessian, Link
from lcogeom.geometry.softmax import action_logprobs
from lcogeom.objectives.action import along_direction
from lcogeom.objectives.base import (
    Objective,
    TokenBatch,
    register,
    require_finite_logits,
    require_logits,
    working_precision,
)


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which kept tokens belong together."""

    index: Tensor
    """(N,) int64 in [0, G)."""
    groups: int
    """G."""
    keep: Tensor
    """Which tokens count, (N,) float64."""

    def total(self, values: Tensor) -> Tensor:
        """Sum of `values`, (N,), over each group's kept tokens, (G,)."""
        zero = values.new_zeros(self.groups)
        return zero.index_add(0, self.index, torch.where(self.keep.bool(), values, 0.0))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each group's kept tokens, (G,); 0 of no token."""
        return self.total(values) / self.total(torch.ones_like(values)).clamp(min=1.0)


Margins = Callable[[TokenBatch, Grouping], tuple[Tensor, Tensor]]
"""-> (c (N,), o (N,)), float64; c is 0 at masked tokens."""
Facts = Callable[[TokenBatch, Grouping], Tensor]
"""-> what phi needs to know of each group, (G,) float64."""


@dataclass(frozen=True, eq=False, repr=False)
class CoupledObjective(Objective):
    """phi(m) summed over groups."""

    name: str
    group_field: str
    """The TokenBatch field that says which tokens belong together: "sequences" or "pairs"."""
    margins: Margins
    phi: Callable[[Tensor, Tensor], Tensor]
    """(m (G,), facts (G,)) -> loss of each group (G,)."""
    facts: Facts
    needs: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)
    raw: bool = False
    """Whether x is the raw logit of the action."""

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        require_logits(logits, batch)
        z = working_precision(logits)
        x = z if self.raw else torch.log_softmax(z, dim=1)
        x = x.gather(1, batch.actions.long()[:, None]).squeeze(1)
        grouping, coefficient, offset = self._structure(batch)
        m = grouping.total(coefficient.to(x) * (x - offset.to(x)))
        value = self.phi(m, self.facts(batch, grouping).to(x))
        return batch.kept((value / grouping.total(torch.ones_like(x)).clamp(min=1.0))[grouping.index])

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        require_finite_logits(logits, batch)
        d1, _, _ = self._derivatives(logits, batch)
        if not self.raw:
            return along_direction(logits, batch.actions, d1)
        result = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
        return result.scatter_(1, batch.actions.long()[:, None], d1[:, None])

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        require_finite_logits(logits, batch)
        d1, d2, _ = self._derivatives(logits, batch)
        if not self.raw:
            return action_hessian(logits, batch.actions, d1, d2)
        return diagonal_hessian(logits, batch.actions, batch.actions[:, None], d2[:, None])

    def joint_hessian(self, logits: Tensor, batch: TokenBatch) -> JointHessian:
        blocks = self.hessian(logits, batch)
        _, _, link = self._derivatives(logits, batch)
        return JointHessian(blocks, (link,))

    def _derivatives(self, logits: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor, Link]:
        """(phi' c_t, phi'' c_t^2, what couples the tokens), the first two (N,) float64."""
        if self.raw:
            x = logits.detach().gather(1, batch.actions.long()[:, None]).squeeze(1).double()
        else:
            x = action_logprobs(logits, batch.actions)
        grouping, coefficient, offset = self._structure(batch)
        with torch.enable_grad():
            m = grouping.total(coefficient * (x - offset)).requires_grad_()
            value = self.phi(m, self.facts(batch, grouping))
            (slope,) = torch.autograd.grad(value.sum(), m, create_graph=True)
            bend = torch.zeros_like(m)
            if slope.requires_grad:
                (bend,) = torch.autograd.grad(slope.sum(), m)
        slope = slope.detach()
        d1, d2 = slope[grouping.index] * coefficient, bend[grouping.index] * coefficient.square()
        return d1, d2, Link(grouping.index, coefficient, bend, self.raw)

    def _structure(self, batch: TokenBatch) -> tuple[Grouping, Tensor, Tensor]:
        batch.require(self.name, self.group_field, *self.needs)
        found, index = torch.unique(getattr(batch, self.group_field), return_inverse=True)
        keep = batch.kept(torch.ones(len(batch), dtype=torch.float64, device=index.device))
        grouping = Grouping(index, len(found), keep)
        coefficient, offset = self.margins(batch, grouping)
        return grouping, coefficient, offset


@register("gspo")
def gspo(*, clip_low: float | None = 3e-4, clip_high: float | None = 4e-4) -> Objective:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), s = exp(mean_t log r_t) of the completion's n tokens.

    Reads `sequences`; A is the mean of the completion's advantages, which are equal in GSPO. For A > 0 and unclipped
    the joint Hessian is convex where mean_t (1 - p_t) / p_t <= 1, a token's block where p_t >= 1 / (1 + n).
    [systems.md 3.6, confirmed; clip bounds of the GSPO paper, section 5.1]

    Raises:
        ValueError: a bound below 0.
    """
    for option, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if bound is not None and not bound >= 0:
            raise ValueError(f"{option}: {bound}; must be >= 0, or None for no bound.")
    floor = -math.inf if clip_low is None or clip_low >= 1 else math.log1p(-clip_low)
    ceiling = math.inf if clip_high is None else math.log1p(clip_high)

    def margins(batch: TokenBatch, grouping: Grouping) -> tuple[Tensor, Tensor]:
        assert batch.old_logprobs is not None
        count = grouping.total(torch.ones_like(grouping.keep)).clamp(min=1.0)
        return grouping.keep / count[grouping.index], batch.old_logprobs.double()

    def facts(batch: TokenBatch, grouping: Grouping) -> Tensor:
        assert batch.advantages is not None
        return grouping.mean(batch.advantages.double())

    def phi(log_s: Tensor, advantage: Tensor) -> Tensor:
        clipped = torch.where(advantage > 0, log_s.clamp(max=ceiling), log_s.clamp(min=floor))
        return -advantage * clipped.exp()

    options = {"clip_low": clip_low, "clip_high": clip_high}
    return CoupledObjective("gspo", "sequences", margins, phi, facts, ("advantages", "old_logprobs"), options)


def _signs(batch: TokenBatch, grouping: Grouping) -> Tensor:
    """+1 at kept tokens of the chosen answer, -1 at those of the rejected, (N,) float64."""
    assert batch.chosen is not None
    return grouping.keep * torch.where(batch.chosen.bool(), 1.0, -1.0).double()


def _per_length(batch: TokenBatch, grouping: Grouping) -> Tensor:
    """1 / number of kept tokens of the same answer, (N,) float64."""
    assert batch.chosen is not None
    chosen = batch.chosen.bool()
    ones = torch.ones_like(grouping.keep)
    won, lost = grouping.total(torch.where(chosen, ones, 0.0)), grouping.total(torch.where(chosen, 0.0, ones))
    return 1 / torch.where(chosen, won[grouping.index], lost[grouping.index]).clamp(min=1.0)


def _no_facts(batch: TokenBatch, grouping: Grouping) -> Tensor:
    return grouping.keep.new_zeros(grouping.groups)


def _positive(option: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{option}: {value}; must be a finite number > 0.")


def _against_reference(beta: float) -> Margins:
    """DPO's m = beta [sum over chosen (l - l_ref) - sum over rejected (l - l_ref)]."""
    _positive("beta", beta)

    def margins(batch: TokenBatch, grouping: Grouping) -> tuple[Tensor, Tensor]:
        assert batch.ref_logprobs is not None
        return beta * _signs(batch, grouping), batch.ref_logprobs.double()

    return margins


@register("dpo")
def dpo(*, beta: float = 0.1) -> Objective:
    """-log sigmoid(beta [sum over chosen (l - l_ref) - sum over rejected (l - l_ref)]) of each preference pair.

    Reads `pairs`, `chosen` and `ref_logprobs`. Blocks of chosen tokens are convex, of rejected ones indefinite.
    [systems.md 3.10, confirmed]

    Raises:
        ValueError: beta is not a finite number > 0.
    """

    def phi(m: Tensor, _: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-m)

    return CoupledObjective(
        "dpo", "pairs", _against_reference(beta), phi, _no_facts, ("chosen", "ref_logprobs"), {"beta": beta}
    )


@register("simpo")
def simpo(*, beta: float = 2.0, gamma: float = 1.0) -> Objective:
    """-log sigmoid(beta (mean chosen l - mean rejected l) - gamma) of each preference pair; no reference.

    [systems.md 3.10, confirmed; published values vary with the model, the defaults are reconstructed]

    Raises:
        ValueError: beta is not a finite number > 0, or gamma is not finite.
    """
    return _length_normalised("simpo", beta, gamma, raw=False)


@register("qrm")
def qrm(*, beta: float = 0.2, gamma: float = 2.0) -> Objective:
    """Q-RM's own loss on raw logits, -log sigmoid(beta (mean chosen z[a] - mean rejected z[a]) - gamma). Convex.

    [systems.md 14, confirmed; convexity derived]

    Raises:
        ValueError: beta is not a finite number > 0, or gamma is not finite.
    """
    return _length_normalised("qrm", beta, gamma, raw=True)


def _length_normalised(name: str, beta: float, gamma: float, raw: bool) -> Objective:
    _positive("beta", beta)
    if not math.isfinite(gamma):
        raise ValueError(f"gamma: {gamma}; must be finite.")

    def margins(batch: TokenBatch, grouping: Grouping) -> tuple[Tensor, Tensor]:
        return beta * _signs(batch, grouping) * _per_length(batch, grouping), torch.zeros_like(grouping.keep)

    def phi(m: Tensor, _: Tensor) -> Tensor:
        return torch.nn.functional.softplus(gamma - m)

    options = {"beta": beta, "gamma": gamma}
    return CoupledObjective(name, "pairs", margins, phi, _no_facts, ("chosen",), options, raw)


@register("confidence-dpo")
def confidence_dpo(*, beta: float = 0.1) -> Objective:
    """-c log sigmoid(m) - (1 - c) log sigmoid(-m) with DPO's m and the confidence c = sigmoid(r_chosen - r_rejected).

    The rewards r of a representation-based reward model stand in `advantages`, one value for all tokens of an answer.
    With c = 1 it is DPO. [systems.md 13: reconstructed]

    Raises:
        ValueError: beta is not a finite number > 0.
    """

    def facts(batch: TokenBatch, grouping: Grouping) -> Tensor:
        assert batch.advantages is not None
        rewards = batch.advantages.double() * _signs(batch, grouping) * _per_length(batch, grouping)
        return torch.sigmoid(grouping.total(rewards))

    def phi(m: Tensor, confidence: Tensor) -> Tensor:
        softplus = torch.nn.functional.softplus
        return confidence * softplus(-m) + (1 - confidence) * softplus(m)

    needs = ("chosen", "ref_logprobs", "advantages")
    return CoupledObjective("confidence-dpo", "pairs", _against_reference(beta), phi, facts, needs, {"beta": beta})
