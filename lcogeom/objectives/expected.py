"""Losses of the whole distribution, sum_j p_j (alpha log p_j + c_j): entropy, reverse KL, expected advantage.

With f = alpha log p + c and the centred f~ = f - p.f the gradient is p f~ and the Hessian

    alpha S + diag(g) - g p^T - p g^T,   g = p f~      (method.md, 2.4)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian, centred
from lcogeom.geometry.softmax import blocks
from lcogeom.objectives.base import (
    Objective,
    TokenBatch,
    register,
    require_finite_logits,
    require_logits,
    working_precision,
)

Costs = Callable[[Tensor, TokenBatch], Tensor]
"""(logits (n, V), their tokens) -> c (n, V), in the dtype of the logits."""


@dataclass(frozen=True, eq=False, repr=False)
class ExpectedObjective(Objective):
    """sum_j p_j (alpha log p_j + c_j)."""

    name: str
    alpha: float
    costs: Costs | None
    """c; None: 0."""
    needs: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        self._require(logits, batch)
        z = working_precision(logits)
        logp = torch.log_softmax(z, dim=1)
        inner = self.alpha * logp if self.costs is None else self.alpha * logp + self.costs(z.detach(), batch)
        return batch.kept((logp.exp() * inner).sum(1))

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        require_finite_logits(logits, batch)
        self._require(logits, batch)
        keep = batch.kept(torch.ones(len(batch), dtype=torch.float64, device=logits.device))
        result = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
        for rows in blocks(logits.shape, logits.device):
            z = logits[rows].detach().double()
            p = torch.softmax(z, dim=1)
            result[rows] = keep[rows, None] * p * centred(p, p.argmax(dim=1, keepdim=True), self._inner(z, batch[rows]))
        return result

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        require_finite_logits(logits, batch)
        self._require(logits, batch)
        keep = batch.kept(torch.ones(len(batch), dtype=torch.float64, device=logits.device))

        def cost(z: Tensor, rows: slice) -> Tensor:
            return keep[rows, None] * self._inner(z, batch[rows])

        zero = torch.zeros_like(keep)
        return LogitHessian(logits.detach(), batch.actions.long(), self.alpha * keep, zero, cost)

    def _inner(self, z: Tensor, batch: TokenBatch) -> Tensor:
        """f up to a constant per row, (n, V)."""
        return self.alpha * z if self.costs is None else self.alpha * z + self.costs(z, batch)

    def _require(self, logits: Tensor, batch: TokenBatch) -> None:
        require_logits(logits, batch)
        batch.require(self.name, *self.needs)
        batch.require_vocabulary(logits.shape[1])


def policy_logits(batch: TokenBatch, policy: str) -> Tensor:
    """The logits, (N, V), of the policy that a divergence is taken to: "reference" or "rollout"."""
    found = batch.ref_logits if policy == "reference" else batch.old_logits
    assert found is not None
    return found.detach()


def policy_field(policy: str) -> str:
    """The TokenBatch field of `policy`; ValueError unless it is "reference" or "rollout"."""
    names = {"reference": "ref_logits", "rollout": "old_logits"}
    if policy not in names:
        raise ValueError(f"to: {policy!r}; must be one of {', '.join(names)}.")
    return names[policy]


def scattered(values: Tensor, ids: Tensor, like: Tensor, elsewhere: Tensor | float = 0.0) -> Tensor:
    """(n, V) with `values` (n, K) at `ids` (n, K) and `elsewhere`, a number or (n, 1), at the others."""
    base = torch.zeros_like(like) + elsewhere
    return base.scatter(1, ids.long(), values.to(like))


def known_advantages(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(advantages (N, K), their ids (N, K)); K = 1, the sampled action, unless `advantage_ids` says otherwise."""
    assert batch.advantages is not None
    ids = batch.actions[:, None] if batch.advantage_ids is None else batch.advantage_ids
    return batch.advantages.reshape(ids.shape), ids


@register("entropy")
def entropy() -> Objective:
    """The entropy H(p) = -sum p log p in nats; subtract it for a bonus: `lg.objective("ppo") - 0.01 * entropy`.

    Gradient -p (log p + H). Neither convex nor concave. [systems.md 3.7, confirmed]
    """
    return ExpectedObjective("entropy", -1.0, None)


@register("reverse-kl")
def reverse_kl(*, to: str = "reference") -> Objective:
    """KL(p || q), q the reference or (`to="rollout"`) the behaviour policy, all of the vocabulary.

    c = -log q. Convex near q only. [systems.md 3.8, confirmed]

    Raises:
        ValueError: `to` is neither.
    """
    needed = policy_field(to)

    def costs(z: Tensor, batch: TokenBatch) -> Tensor:
        return -torch.log_softmax(policy_logits(batch, to).to(z), dim=1)

    return ExpectedObjective("reverse-kl", 1.0, costs, (needed,), {"to": to})


@register("expected-advantage")
def expected_advantage() -> Objective:
    """-sum_j p_j A_j over the ids with a known advantage (`advantage_ids`), 0 elsewhere. Indefinite.

    [systems.md 3.9, confirmed]
    """

    def costs(z: Tensor, batch: TokenBatch) -> Tensor:
        advantages, ids = known_advantages(batch)
        return scattered(-advantages, ids, z)

    return ExpectedObjective("expected-advantage", 0.0, costs, ("advantages",))
