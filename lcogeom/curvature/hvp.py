"""Products with the Hessian of a model's loss in its parameters, along routes that check themselves (method.md, 3).

Double backward is exact. It cannot pass through kernels that know no second derivative, and fused losses that compute
their gradient in the forward pass make it silently wrong; differences of gradients are right there. Each route is
checked once for a set of parameters, against symmetry and against differences (checks.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakIdKeyDictionary

from lcogeom.curvature.checks import RouteCheck, RouteError, check_differences, check_hvp
from lcogeom.curvature.differences import DEFAULT_REACH, gradient_differences
from lcogeom.curvature.parameters import modules_called, require_like, require_params

LossFn = Callable[[], Tensor]
DOUBLE_BACKWARD, DIFFERENCES = "double-backward", "finite-differences"


class ModelHessian:
    """The Hessian of a sum of losses in some parameters, as a product. Made by `model_hessian`.

    Call it with a list shaped like the parameters. It is taken where the parameters stand at the time of the call.
    """

    def __init__(
        self,
        losses: tuple[LossFn, ...],
        params: tuple[Tensor, ...],
        route: str,
        keep_graph: bool,
        reach: float = DEFAULT_REACH,
    ) -> None:
        self.params = params
        self.route = route
        """'double-backward' or 'finite-differences'."""
        self.check: RouteCheck | None = None
        """What the self-check found; None where it was left out."""
        self.reach = reach
        """Of 'finite-differences': the length of the displacement over that of the parameters."""
        self._losses = losses
        self._keep_graph = keep_graph
        self._graph: tuple[list[int], tuple[Tensor, ...]] | None = None
        self._padding: list[tuple[int, int]] | None = None

    @property
    def size(self) -> int:
        """Rows and columns of the matrix."""
        return sum(parameter.numel() for parameter in self.params)

    def __call__(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v, a list shaped like the parameters, in their dtypes."""
        vector = require_like("vector", vector, self.params)
        if self._padding is None:
            self._padding = padding_rows(self._losses[0], self.params)
        for place, row in self._padding:  # autograd gives them no gradient, so they are no coordinates of H
            vector[place] = vector[place].index_fill(0, torch.tensor([row], device=vector[place].device), 0.0)
        if self.route == DIFFERENCES:
            return gradient_differences(self._losses, self.params, vector, self.reach)
        return self._double_backward(vector)

    def release(self) -> None:
        """Let go of a kept graph."""
        self._graph = None

    def _double_backward(self, vector: list[Tensor]) -> list[Tensor]:
        total: list[Tensor] | None = None
        for loss_fn in self._losses:
            gradient = self._gradient(loss_fn)
            live = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
            if not live:
                continue
            graph = self._keep_graph
            part = torch.autograd.grad(
                [g for g, _ in live], self.params, [v for _, v in live], retain_graph=graph, materialize_grads=True
            )
            total = list(part) if total is None else [a.add_(b) for a, b in zip(total, part, strict=True)]
        return [torch.zeros_like(p) for p in self.params] if total is None else total

    def _gradient(self, loss_fn: LossFn) -> tuple[Tensor, ...]:
        """The gradient with its graph, a kept one where the parameters have not changed since."""
        versions = [parameter._version for parameter in self.params]
        if self._graph is not None and self._graph[0] == versions:
            return self._graph[1]
        with torch.enable_grad(), twice_differentiable():
            gradient = torch.autograd.grad(loss_fn(), self.params, create_graph=True, materialize_grads=True)
        if self._keep_graph:
            self._graph = versions, gradient
        return gradient


def model_hessian(
    loss_fn: LossFn | Sequence[LossFn],
    params: Sequence[Tensor],
    *,
    route: str = "auto",
    keep_graph: bool = False,
    check: bool = True,
) -> ModelHessian:
    """The Hessian of a model's loss in some of its parameters, ready for many products.

    Args:
        loss_fn: () -> scalar, the same value at every call (no dropout). A list of them, one for each micro-batch, is
            added up one at a time: memory is that of one.
        params: trainable parameters, each once; of one layer for that layer's block of H.
        route: "double-backward" (attention runs in its twice differentiable form), "finite-differences" of gradients
            along the vector, or "auto": the first, where it works and agrees with the second.
        keep_graph: keep the graph of the gradient between products, which saves the forward and first backward pass
            and costs their memory. One loss_fn and double backward only.
        check: whether the route must prove itself, once for these parameters.

    Raises:
        RouteError: no allowed route agrees with differences of gradients.
        TypeError, ValueError: an argument that cannot be used; the message names it.
    """
    params = require_params(params)
    losses = (loss_fn,) if callable(loss_fn) else tuple(loss_fn)
    if not losses:
        raise ValueError("loss_fn: an empty list; pass one function for each micro-batch.")
    if route not in ("auto", DOUBLE_BACKWARD, DIFFERENCES):
        raise ValueError(f"route: {route!r}; must be 'auto', {DOUBLE_BACKWARD!r} or {DIFFERENCES!r}.")
    if keep_graph and (len(losses) > 1 or route == DIFFERENCES):
        raise ValueError("keep_graph: only with a single loss_fn and double backward.")
    sharded = any(isinstance(parameter, DTensor) for parameter in params)
    if route == "auto" and (sharded or not check):
        route = DIFFERENCES if sharded else DOUBLE_BACKWARD
    if not check:
        return ModelHessian(losses, params, route, keep_graph)
    known = _checked(params).get(route)
    if known is None:
        known = _checked(params)[route] = _choose(losses, params, route)
    keep_graph = keep_graph and known.route == DOUBLE_BACKWARD
    chosen = ModelHessian(losses, params, known.route, keep_graph, known.reach)
    chosen.check = known
    return chosen


def hvp(
    loss_fn: LossFn | Sequence[LossFn], params: Sequence[Tensor], vector: Sequence[Tensor], *, route: str = "auto"
) -> list[Tensor]:
    """H v for the Hessian H of a model's loss in `params`: see `model_hessian`, which is for more than one product.

    Args:
        vector: shaped like params.

    Returns:
        A list shaped like params, in their dtypes.
    """
    return model_hessian(loss_fn, params, route=route)(vector)


def _choose(losses: tuple[LossFn, ...], params: tuple[Tensor, ...], route: str) -> RouteCheck:
    """The check of the first route that passes it, on the first micro-batch."""
    first = losses[0]
    refused = ""
    if route != DIFFERENCES:
        try:
            return check_hvp(ModelHessian((first,), params, DOUBLE_BACKWARD, False), first, params)
        except RouteError as error:
            if route != "auto" or error.unusable:
                raise
            refused = str(error)
        except RuntimeError as error:  # a kernel without second derivative, or checkpointing that forbids grad()
            if route != "auto" or isinstance(error, torch.OutOfMemoryError):
                raise
            refused = f"double backward failed: {str(error).splitlines()[0]}"
    found = check_differences(lambda reach: ModelHessian((first,), params, DIFFERENCES, False, reach), first, params)
    if refused:
        warnings.warn(f"hvp: differences of gradients are used, because {refused}", stacklevel=4)
    return found


_CHECKS = WeakIdKeyDictionary()


def _checked(params: tuple[Tensor, ...]) -> dict[str, RouteCheck]:
    """What is known of the routes for these parameters, by the route asked for. Dies with the first of them."""
    by_set = _CHECKS.setdefault(params[0], {})
    found: dict[str, RouteCheck] = by_set.setdefault(tuple(map(id, params)), {})
    return found


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by plain matrix products: the fused kernels know no second derivative, on the CPU neither."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def padding_rows(function: Callable[[], object], params: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(place in params, row) of the padding rows of the embeddings that `function` runs through."""
    return sorted(
        (place, module.padding_idx)
        for module in modules_called(function)
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None
        for place, parameter in enumerate(params)
        if parameter is module.weight
    )
