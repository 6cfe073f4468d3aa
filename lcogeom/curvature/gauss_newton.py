"""The Gauss-Newton part of a model's Hessian, J^T H_z J, with the exact H_z of any objective (method.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lcogeom.curvature.checks import REACHES, TOLERANCES
from lcogeom.curvature.differences import value_differences
from lcogeom.curvature.hvp import twice_differentiable
from lcogeom.curvature.parameters import require_like, require_params
from lcogeom.objectives import Objective, TokenBatch

LogitsFn = Callable[[], Tensor]
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
    reach = forward_reach(parts[0][0], params, vector)

    def one(run: LogitsFn, some: TokenBatch) -> Sequence[Tensor]:
        """The part of one micro-batch, whose graph ends with this call."""
        logits, along = pushed_forward(run, params, vector, reach)
        push = objective.joint_hessian(logits.detach(), some) @ along
        return torch.autograd.grad(logits, params, push.div_(tokens).to(logits), materialize_grads=True)

    total = list(one(*parts[0]))
    for part in parts[1:]:
        total = [a.add_(b) for a, b in zip(total, one(*part), strict=True)]
    return total


def pushed_forward(
    logits_fn: LogitsFn, params: Sequence[Tensor], vector: Sequence[Tensor], reach: float | None
) -> tuple[Tensor, Tensor]:
    """(logits with their graph, J v (N, V) float64). reach: see `forward_reach`."""
    if reach is None:
        return _by_double_backward(logits_fn, params, vector)
    along = value_differences(logits_fn, params, vector, reach)
    with torch.enable_grad():
        return logits_fn(), along  # after the parameters were moved and put back: that would spoil its graph


def _by_double_backward(
    logits_fn: LogitsFn, params: Sequence[Tensor], vector: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(logits with their graph, J v (N, V) float64): <J^T w, v> is linear in w, and J v its derivative."""
    with torch.enable_grad(), twice_differentiable():
        logits = logits_fn()
        w = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, params, w, create_graph=True, materialize_grads=True)
        live = [(g, v) for g, v in zip(pulled, vector, strict=True) if g.requires_grad]
        (along,) = torch.autograd.grad([g for g, _ in live], w, [v for _, v in live])
    return logits, along.detach().double()


def forward_reach(logits_fn: LogitsFn, params: Sequence[Tensor], vector: Sequence[Tensor]) -> float | None:
    """None where J v by double backward agrees with differences, else the displacement of the best difference.

    A kernel without second derivative may cut J v off without a word. Checked once for a set of parameters.
    """
    known = _REACHES.setdefault(params[0], {})
    key = tuple(map(id, params))
    if key not in known:
        coarse = max((parameter.dtype for parameter in params), key=lambda dtype: torch.finfo(dtype).eps)
        allowed = TOLERANCES.get(coarse, TOLERANCES[torch.float32])[1]
        found = [value_differences(logits_fn, params, vector, reach) for reach in REACHES]
        if not any(bool(one.any()) for one in found):
            return None  # J v = 0 shows nothing
        try:
            _, exact = _by_double_backward(logits_fn, params, vector)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            exact = torch.zeros_like(found[0])
        if min(float((one - exact).norm() / one.norm()) for one in found) <= allowed:
            known[key] = None
        else:
            gaps = [float((one - other).norm() / one.norm()) for one, other in pairwise(found)]
            known[key] = REACHES[gaps.index(min(gaps))]
    reach: float | None = known[key]
    return reach


_REACHES = WeakIdKeyDictionary()


def micro_batches(logits_fn: LogitsFn | Sequence[LogitsFn], batch: TokenBatch | Sequence[TokenBatch]) -> MicroBatches:
    """The pairs; raises ValueError unless there are as many functions as batches."""
    functions = (logits_fn,) if callable(logits_fn) else tuple(logits_fn)
    batches = (batch,) if isinstance(batch, TokenBatch) else tuple(batch)
    if not functions or len(functions) != len(batches):
        raise ValueError(
            f"logits_fn, batch: {len(functions)} functions for {len(batches)} batches; one for each micro-batch."
        )
    return tuple(zip(functions, batches, strict=True))
