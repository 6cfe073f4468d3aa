"""What one update did to its loss: first order, curvature through the logits, the network's own, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.curvature.differences import total_gradient
from lcogeom.curvature.gauss_newton import LogitsFn, MicroBatches, micro_batches, pushing_route
from lcogeom.curvature.hvp import model_hessian
from lcogeom.curvature.parameters import assign, held, inner, require_like, require_params
from lcogeom.objectives import Objective, TokenBatch


@dataclass(frozen=True)
class StepAudit:
    """The change of the mean loss over the batch's tokens from theta to theta + d, taken apart (method.md, section 3).

    actual = first_order + gauss_newton + residual + remainder, and
    actual = logit_first_order + logit_curvature + logit_remainder.
    """

    actual: float
    """L(theta + d) - L(theta)."""
    first_order: float
    """<g, d>."""
    gauss_newton: float
    """1/2 d^T J^T H_z J d: curvature through the logits; >= 0 wherever the loss is convex in them."""
    residual: float
    """1/2 d^T (H - J^T H_z J) d: the network's own curvature."""
    remainder: float
    """What second order does not explain."""
    logit_first_order: float
    """<grad_z L, dz> with the finite displacement dz of the logits."""
    logit_curvature: float
    """1/2 dz^T H_z dz."""
    logit_remainder: float
    overshoot: float
    """d^T H d / |<g, d>|: above 1 the step passed the minimum along d of the quadratic model, above 2 it raises it."""
    rounding: float
    """How far `actual` may be off because logits are rounded to their dtype: 2 eps mean_n sum_j |dL/dz_nj| |z_nj|."""
    route: str
    """How H d was computed: 'double-backward' or 'finite-differences'."""

    @property
    def unexplained(self) -> float:
        """|remainder| / |actual|; infinite for a loss that did not change."""
        return abs(self.remainder) / abs(self.actual) if self.actual else float("inf")


def audit_step(
    logits_fn: LogitsFn | Sequence[LogitsFn],
    objective: Objective,
    batch: TokenBatch | Sequence[TokenBatch],
    params: Sequence[Tensor],
    before: Sequence[Tensor],
    *,
    route: str = "auto",
) -> StepAudit:
    """Audit one update on the batch that made it. Call it after the step; the parameters keep their values to the bit.

    Costs two forward passes, one gradient, one Hessian- and one Jacobian-vector product, two copies of the parameters.

    Args:
        logits_fn: () -> (N, V), the logits at the batch's tokens, of the parameters as they stand, the same at every
            call (no dropout). A list of them, one for each micro-batch, is worked through one at a time.
        objective: what the update minimised.
        batch: its N tokens; a list where logits_fn is one.
        params: trainable parameters, each once, after the step.
        before: their values before it, shaped like params.
        route: of the Hessian-vector product, see `model_hessian`.

    Raises:
        RouteError: no route gives the Hessian.
        TypeError, ValueError: an argument that cannot be used, or logits that are not finite.
    """
    params = require_params(params)
    parts = micro_batches(logits_fn, batch)
    before = require_like("before", before, params)
    tokens = sum(len(some) for _, some in parts)
    losses = [_mean_loss(logits, some, objective, tokens) for logits, some in parts]
    with held(params) as after:
        step = [new - old for new, old in zip(after, before, strict=True)]
        seen = torch.zeros(4, dtype=torch.float64)
        for logits, some in parts:
            assign(params, after)
            later = _values(logits)
            assign(params, before)
            seen += _through_logits(_values(logits), later, some, objective)
        actual, along, bend, rounding = (seen / tokens).tolist()
        first = inner(total_gradient(losses, params), step)
        hessian = model_hessian(losses, params, route=route)
        whole = inner(hessian(step), step) / 2
        gauss_newton = _gauss_newton(parts, objective, params, step) / tokens / 2
    return StepAudit(
        actual=actual,
        first_order=first,
        gauss_newton=gauss_newton,
        residual=whole - gauss_newton,
        remainder=actual - first - whole,
        logit_first_order=along,
        logit_curvature=bend,
        logit_remainder=actual - along - bend,
        overshoot=2 * whole / abs(first) if first else float("nan"),
        rounding=rounding,
        route=hessian.route,
    )


def _mean_loss(logits_fn: LogitsFn, batch: TokenBatch, objective: Objective, tokens: int) -> Callable[[], Tensor]:
    return lambda: objective.loss(logits_fn(), batch).sum() / tokens


def _values(logits_fn: LogitsFn) -> Tensor:
    with torch.no_grad():
        return logits_fn()


def _through_logits(earlier: Tensor, later: Tensor, batch: TokenBatch, objective: Objective) -> Tensor:
    """Sums over the tokens: (actual change, <grad_z, dz>, 1/2 dz^T H_z dz, effect of rounding), (4,) float64."""
    with torch.no_grad():
        change = objective.loss(later.double(), batch).sum() - objective.loss(earlier.double(), batch).sum()
    gradient = objective.gradient(earlier, batch)
    moved = later.double() - earlier.double()
    bend = objective.joint_hessian(earlier, batch).quadratic(moved) / 2
    rounding = 2 * torch.finfo(earlier.dtype).eps * (gradient.abs() * earlier.double().abs()).sum()
    return torch.stack([change, (gradient * moved).sum(), bend, rounding]).double().cpu()


def _gauss_newton(parts: MicroBatches, objective: Objective, params: Sequence[Tensor], step: Sequence[Tensor]) -> float:
    """d^T J^T H_z J d of the summed loss."""
    route = pushing_route(parts[0][0], params, step)
    total = 0.0
    for logits_fn, batch in parts:
        logits, along = route(logits_fn, params, step)
        total += float(objective.joint_hessian(logits.detach(), batch).quadratic(along))
        del logits  # and the graph with it, before the next
    return total
