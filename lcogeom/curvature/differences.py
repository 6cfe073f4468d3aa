"""Differences along a vector: of gradients, for Hessians, and of logits, for Jacobians."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lcogeom.curvature.parameters import assign, held, norm

DEFAULT_REACH = 1e-3


def gradient_differences(
    losses: Sequence[Callable[[], Tensor]], params: Sequence[Tensor], vector: Sequence[Tensor], reach: float
) -> list[Tensor]:
    """(g(theta + h v) - g(theta - h v)) / 2h with h |v| = reach |theta|, a list shaped like params.

    The parameters are moved in place and get their values back to the bit.
    """
    shift = _shift(params, vector, reach)
    if shift == 0:
        return [torch.zeros_like(parameter) for parameter in params]
    with held(params) as start:
        _move(params, start, vector, shift)
        ahead = total_gradient(losses, params)
        _move(params, start, vector, -shift)
        behind = total_gradient(losses, params)
    return [(a - b).div_(2 * shift) for a, b in zip(ahead, behind, strict=True)]


def value_differences(
    function: Callable[[], Tensor], params: Sequence[Tensor], vector: Sequence[Tensor], reach: float
) -> Tensor:
    """(f(theta + h v) - f(theta - h v)) / 2h, like f's value, float64."""
    shift = _shift(params, vector, reach)
    with torch.no_grad(), held(params) as start:
        if shift == 0:
            return torch.zeros_like(function().double())
        _move(params, start, vector, shift)
        ahead = function().double()
        _move(params, start, vector, -shift)
        return (ahead - function().double()).div_(2 * shift)


def total_gradient(losses: Sequence[Callable[[], Tensor]], params: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of the sum of the losses, one at a time; a list shaped like params."""
    total: list[Tensor] | None = None
    for loss_fn in losses:
        part = _gradient(loss_fn, params)
        total = part if total is None else [a.add_(b) for a, b in zip(total, part, strict=True)]
    assert total is not None
    return total


def _gradient(loss_fn: Callable[[], Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        found: Sequence[Tensor | None] = (None,)
        try:
            found = torch.autograd.grad(loss_fn(), params, allow_unused=True)
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise
        reached = [gradient.detach() for gradient in found if gradient is not None]
        if len(reached) == len(params):
            return reached
        # Not reached, or hidden by reentrant checkpointing, which grad() does not see through: backward() tells. The
        # .grad found there is put back.
        kept = [parameter.grad for parameter in params]
        try:
            for parameter in params:
                parameter.grad = None
            loss_fn().backward()
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        finally:
            for parameter, gradient in zip(params, kept, strict=True):
                parameter.grad = gradient


def _shift(params: Sequence[Tensor], vector: Sequence[Tensor], reach: float) -> float:
    length = norm(vector)
    return 0.0 if length == 0 else reach * (norm(params) or 1.0) / length


def _move(params: Sequence[Tensor], start: Sequence[Tensor], vector: Sequence[Tensor], shift: float) -> None:
    assign(params, start)
    with torch.no_grad():
        for parameter, direction in zip(params, vector, strict=True):
            parameter.add_(direction, alpha=shift)
