"""The Gauss-Newton part of a model's Hessian, J^T H_z J, with the exact H_z of any objective (method.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lcogeom.curvature.checks import REACHES, TOLERANCES
from lcogeom.curvature.differences import value_differences
from lcogeom.curvature.forward import Owners, owners_of, pushed_by_forward_mode
from lcogeom.curvature.hvp import twice_differentiable
from lcogeom.curvature.parameters import require_like, require_params
from lcogeom.objectives import Objective, TokenBatch

LogitsFn = Callable[[], Tensor]
Route = Callable[[LogitsFn, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]
MicroBatches = tuple[tuple[LogitsFn, TokenBatch], ...]


def ggn_vector_product(
    logits_fn: LogitsFn | Sequence[LogitsFn],
    objective: Objective,
    batch: TokenBatch | Sequence[TokenBatch],
    params: Sequence[Tensor],
    vector: Sequence[Tensor],
) -> list[Tensor]:
    """G v for the Gauss-Newton matrix G = J^T H_z J of the mean loss over the batch's tokens; J = d logits / d params.

    H_z is the objective's exact Hessian in the logits, joint where it couples tokens. G is positive semi-definite
    wherever that is.

    Args:
        logits_fn: () -> (N, V), the logits at the batch's tokens, with a graph. A list of them, one for each
            micro-batch, is worked through one at a time: memory is that of one.
        objective: from the registry, or your own.
        batch: its N tokens; a list where logits_fn is one. The mean runs over the tokens of all of them.
        params: trainable parameters, each once.
        vector: shaped like params.

    Returns:
        A list shaped like params, in their dtypes.

    Raises:
        TypeError, ValueError: an argument that cannot be used, or logits that are not finite.
    """
    params = require_params(params)
    parts = micro_batches(logits_fn, batch)
    vector = require_like("vector", vector, params)
    tokens = sum(len(some) for _, some in parts)
    route = pushing_route(parts[0][0], params, vector)

    def one(run: LogitsFn, some: TokenBatch) -> Sequence[Tensor]:
        """The part of one micro-batch, whose graph ends with this call."""
        logits, along = route(run, params, vector)
        push = objective.joint_hessian(logits.detach(), some) @ along
        return torch.autograd.grad(logits, params, push.div_(tokens).to(logits), materialize_grads=True)

    total = list(one(*parts[0]))
    for part in parts[1:]:
        total = [a.add_(b) for a, b in zip(total, one(*part), strict=True)]
    return total


def pushing_route(logits_fn: LogitsFn, params: Sequence[Tensor], vector: Sequence[Tensor]) -> Route:
    """How J v is computed: by forward mode, by double backward, or by differences of the logits.

    The first that agrees with differences; kernels without the derivative needed may cut J v off without a word.
    Checked once for a set of parameters.
    """
    known = _ROUTES.setdefault(params[0], {})
    key = tuple(map(id, params))
    if key in known:
        route: Route = known[key]
        return route
    coarse = max((parameter.dtype for parameter in params), key=lambda dtype: torch.finfo(dtype).eps)
    allowed = TOLERANCES.get(coarse, TOLERANCES[torch.float32])[1]
    found = [value_differences(logits_fn, params, vector, reach) for reach in REACHES]
    gaps = [float((one - other).norm() / one.norm().clamp(min=1e-300)) for one, other in pairwise(found)]
    differences = partial(_by_differences, reach=REACHES[gaps.index(min(gaps))])
    if not any(bool(one.any()) for one in found):
        return differences  # J v = 0 shows nothing of the others
    forward = partial(_by_forward_mode, owners=owners_of(logits_fn, params))
    known[key] = differences
    for candidate in (forward, _by_double_backward):
        try:
            _, exact = candidate(logits_fn, params, vector)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # NotImplementedError is one
            continue
        if min(float((one - exact).norm() / one.norm()) for one in found) <= allowed:
            known[key] = candidate
            break
    chosen: Route = known[key]
    return chosen


def _by_forward_mode(
    logits_fn: LogitsFn, params: Sequence[Tensor], vector: Sequence[Tensor], owners: Owners
) -> tuple[Tensor, Tensor]:
    """(logits with their graph, J v (N, V) float64), with 5/3 of a gradient's products of matrices."""
    with twice_differentiable():
        logits, along = pushed_by_forward_mode(logits_fn, params, vector, owners)
    return logits, along.double()


def _by_double_backward(
    logits_fn: LogitsFn, params: Sequence[Tensor], vector: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The same: <J^T w, v> is linear in w, and J v its derivative."""
    with torch.enable_grad(), twice_differentiable():
        logits = logits_fn()
        w = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, params, w, create_graph=True, materialize_grads=True)
        live = [(g, v) for g, v in zip(pulled, vector, strict=True) if g.requires_grad]
        (along,) = torch.autograd.grad([g for g, _ in live], w, [v for _, v in live])
    return logits, along.detach().double()


def _by_differences(
    logits_fn: LogitsFn, params: Sequence[Tensor], vector: Sequence[Tensor], reach: float
) -> tuple[Tensor, Tensor]:
    """The same, by moving the parameters; to three or four digits."""
    along = value_differences(logits_fn, params, vector, reach)
    with torch.enable_grad():
        return logits_fn(), along  # after the parameters were moved and put back: that would spoil its graph


_ROUTES = WeakIdKeyDictionary()


def micro_batches(logits_fn: LogitsFn | Sequence[LogitsFn], batch: TokenBatch | Sequence[TokenBatch]) -> MicroBatches:
    """The pairs; raises ValueError unless there are as many functions as batches."""
    functions = (logits_fn,) if callable(logits_fn) else tuple(logits_fn)
    batches = (batch,) if isinstance(batch, TokenBatch) else tuple(batch)
    if not functions or len(functions) != len(batches):
        raise ValueError(
            f"logits_fn, batch: {len(functions)} functions for {len(batches)} batches; one for each micro-batch."
        )
    return tuple(zip(functions, batches, strict=True))
