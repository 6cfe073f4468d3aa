"""LCO: losses that pull the logits to the closed-form optimum of the KL-regularised objective (method.md, 2.3).

    max_q E_q[A] - beta KL(q || pi_old)   has the optimum   z* = z_old + A / beta,   t = softmax(z*)

Options, the same for all three:

    beta                 strength of the KL; 2.0 in the authors' scripts
    target               "rollout": z_old is the rollout policy's, as the paper defines it; "current": the authors'
                         MSE and log-cosh code, where z_old is the policy's own detached logits and the target moves
    negative_beta_scale  beta is multiplied by it where A < 0; the authors' sparse setting uses 100, the paper none
    standardise          divide the advantages of a token by their standard deviation over its K ids (authors, dense)
    outside              what the ids without a known advantage get in LCO-KLD: "keep" A = 0, or "drop", no mass at all
                         (authors, dense: A = -100 after the division by beta)

Sparse advantages: `TokenBatch.advantages` (N,), of the sampled action. Dense: (N, K) with `advantage_ids`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian, diagonal_hessian
from lcogeom.objectives.base import (
    Objective,
    TokenBatch,
    register,
    require_finite_logits,
    require_logits,
    working_precision,
)
from lcogeom.objectives.target import TargetObjective

DROPPED = -100.0  # the authors' stand-in for "no mass", after the division by beta


@dataclass(frozen=True)
class LCOTarget:
    """How z* is built; see the head of this file."""

    beta: float
    target: str
    negative_beta_scale: float
    standardise: bool
    outside: str

    def __post_init__(self) -> None:
        for option in ("beta", "negative_beta_scale"):
            value = getattr(self, option)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{option}: {value}; must be a finite number > 0.")
        for option, allowed in (("target", ("rollout", "current")), ("outside", ("keep", "drop"))):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option}: {getattr(self, option)!r}; must be one of {', '.join(allowed)}.")

    def anchor(self, name: str, logits: Tensor, batch: TokenBatch) -> Tensor:
        """z_old, (N, V), detached."""
        if self.target == "current":
            return logits.detach()
        batch.require(name, "old_logits")
        assert batch.old_logits is not None
        if batch.old_logits.shape != logits.shape:
            raise ValueError(f"old_logits: shape {tuple(batch.old_logits.shape)}; must be {tuple(logits.shape)}.")
        return batch.old_logits.detach()

    def shifts(self, name: str, batch: TokenBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(ids (N, K), A / beta at those ids (N, K)); K = 1 for sparse advantages."""
        batch.require(name, "advantages")
        assert batch.advantages is not None
        sparse = batch.advantage_ids is None
        ids = batch.actions[:, None] if batch.advantage_ids is None else batch.advantage_ids
        advantages = batch.advantages.to(dtype).reshape(ids.shape)
        if self.standardise:
            if sparse:
                raise ValueError("standardise: needs several advantages per token; pass TokenBatch(advantage_ids=...).")
            advantages = advantages / advantages.std(dim=1, keepdim=True).clamp(min=1e-6)
        scale = torch.where(advantages < 0, self.negative_beta_scale, 1.0)
        return ids.long(), advantages / (self.beta * scale)


def _log_target(lco: LCOTarget, name: str, z: Tensor, batch: TokenBatch) -> Tensor:
    """log t, (N, V)."""
    ids, shift = lco.shifts(name, batch, z.dtype)
    base = torch.log_softmax(lco.anchor(name, z, batch).to(z), dim=1)
    if lco.outside == "drop" and batch.advantage_ids is not None:
        shifted = (base + DROPPED).scatter(1, ids, base.gather(1, ids) + shift)
    else:
        shifted = base.scatter_add(1, ids, shift)
    return torch.log_softmax(shifted, dim=1)


@dataclass(frozen=True, eq=False, repr=False)
class LCODistance(Objective):
    """sum_j d(z_j - z*_j) over the ids with a known advantage, for a convex even function d of one number."""

    name: str
    lco: LCOTarget
    options: Mapping[str, object]
    distance: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    bend: Callable[[Tensor], Tensor]

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        require_logits(logits, batch)
        _, gap = self._gap(working_precision(logits), batch)
        return batch.kept(self.distance(gap).sum(1))

    def gradient(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        ids, values = self._at_ids(self.slope, logits, batch)
        return torch.zeros(logits.shape, dtype=torch.float64, device=logits.device).scatter_(1, ids, values)

    def hessian(self, logits: Tensor, batch: TokenBatch) -> LogitHessian:
        return diagonal_hessian(logits, batch.actions, *self._at_ids(self.bend, logits, batch))

    def _gap(self, z: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """(ids, z - z* at those ids), (N, K) each."""
        ids, shift = self.lco.shifts(self.name, batch, z.dtype)
        return ids, z.gather(1, ids) - self.lco.anchor(self.name, z, batch).gather(1, ids).to(shift) - shift

    def _at_ids(self, function: Callable[[Tensor], Tensor], logits: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """(ids, function of the gap there), (N, K) each, float64; 0 where the mask is off."""
        require_finite_logits(logits, batch)
        ids, shift = self.lco.shifts(self.name, batch, torch.float64)
        anchor = self.lco.anchor(self.name, logits, batch).gather(1, ids).double()
        gap = logits.detach().gather(1, ids).double() - anchor - shift
        keep = batch.kept(gap.new_ones(len(batch)))
        return ids, function(gap) * keep[:, None]


def _log_cosh(x: Tensor) -> Tensor:
    return torch.logaddexp(x, -x) - math.log(2.0)  # no overflow, and smooth at 0 for autograd too


def _sech_squared(x: Tensor) -> Tensor:
    return torch.cosh(x).pow(-2)


@register("lco-kld")
def lco_kld(
    *,
    beta: float = 2.0,
    target: str = "rollout",
    negative_beta_scale: float = 1.0,
    standardise: bool = False,
    outside: str = "keep",
) -> Objective:
    """KL(t || p), gradient p - t, Hessian S. Options: see `lcogeom.objectives.lco`. [systems.md 1.2, confirmed]"""
    lco = LCOTarget(beta, target, negative_beta_scale, standardise, outside)
    needs = ("advantages", "old_logits") if target == "rollout" else ("advantages",)
    return TargetObjective("lco-kld", partial(_log_target, lco, "lco-kld"), None, needs, vars(lco))


@register("lco-mse")
def lco_mse(
    *, beta: float = 2.0, target: str = "rollout", negative_beta_scale: float = 1.0, standardise: bool = False
) -> Objective:
    """1/2 sum_j (z_j - z*_j)^2, gradient z - z*, Hessian I, on the ids with a known advantage.

    The authors' code has no 1/2: their loss, gradient and Hessian are twice these. [systems.md 1.2, confirmed]
    """
    lco = LCOTarget(beta, target, negative_beta_scale, standardise, "keep")
    return LCODistance("lco-mse", lco, vars(lco), lambda x: x.square() / 2, lambda x: x, torch.ones_like)


@register("lco-lch")
def lco_lch(
    *, beta: float = 2.0, target: str = "rollout", negative_beta_scale: float = 1.0, standardise: bool = False
) -> Objective:
    """sum_j log cosh(z_j - z*_j), gradient tanh, Hessian diag(sech^2), on the ids with a known advantage.

    [systems.md 1.2, confirmed]
    """
    lco = LCOTarget(beta, target, negative_beta_scale, standardise, "keep")
    return LCODistance("lco-lch", lco, vars(lco), _log_cosh, torch.tanh, _sech_squared)
