"""J v by forward-mode differentiation, for any function of a model's outputs: its parameters carry their tangents."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor

from lcogeom.curvature.parameters import modules_called

Owners = list[tuple["weakref.ref[torch.nn.Module]", str, int]]
"""(module, name of its parameter, place in params)."""


def pushed_by_forward_mode(
    function: Callable[[], Tensor], params: Sequence[Tensor], vector: Sequence[Tensor], owners: Owners
) -> tuple[Tensor, Tensor]:
    """(the function's value with its graph, J v without one).

    Raises:
        RuntimeError: an operation without forward derivative, or parameters that the function does not reach through
            the modules in `owners`.
    """
    with torch.enable_grad(), fwd.dual_level():
        with _carrying(params, vector, owners):
            found = function()
        value, along = fwd.unpack_dual(found)
        if along is None:
            raise RuntimeError("forward mode: the value does not depend on the modules' parameters.")
        return value, along.detach()


def owners_of(function: Callable[[], object], params: Sequence[Tensor]) -> Owners:
    """The modules that `function` runs through, and those inside them, which hold some of the parameters."""
    places = {id(parameter): place for place, parameter in enumerate(params)}
    inside = {id(inner): inner for module in modules_called(function) for inner in module.modules()}
    return [
        (weakref.ref(module), name, places[id(parameter)])
        for module in inside.values()
        for name, parameter in module._parameters.items()
        if id(parameter) in places
    ]


@contextmanager
def _carrying(params: Sequence[Tensor], vector: Sequence[Tensor], owners: Owners) -> Iterator[None]:
    """The modules hold parameters with tangents instead of plain ones."""
    duals = [fwd.make_dual(parameter, tangent) for parameter, tangent in zip(params, vector, strict=True)]
    held = [(module, name, place) for ref, name, place in owners if (module := ref()) is not None]
    try:
        for module, name, place in held:
            module._parameters[name] = duals[place]
        yield
    finally:
        for module, name, place in held:
            module._parameters[name] = params[place]  # type: ignore[assignment]
