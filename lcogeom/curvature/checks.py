"""Is a product really the Hessian's? Symmetry, and differences of gradients, along a direction of large curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.curvature.differences import DEFAULT_REACH, gradient_differences, total_gradient
from lcogeom.curvature.parameters import inner, norm, random_like

REACHES = (1e-3, 3e-3, 1e-2, 3e-4, 1e-4, 1e-5)  # displacement over |theta|, the likely ones first
# Allowed asymmetry, and distance from differences of gradients, by the coarsest dtype among the parameters. Llama keeps
# float32 norms in a float64 model; wrong routes are off by 30 % and more (layer_norm), or altogether.
TOLERANCES = {
    torch.float64: (1e-5, 0.01),
    torch.float32: (1e-4, 0.03),
    torch.bfloat16: (0.1, 0.3),
    torch.float16: (0.1, 0.3),
}


Product = Callable[[list[Tensor]], Sequence[Tensor]]


class RouteError(RuntimeError):
    """A way of computing Hessian-vector products that does not give the Hessian's."""

    def __init__(self, message: str, unusable: bool = False) -> None:
        super().__init__(message)
        self.unusable = unusable
        """Whether the loss itself cannot be used, so that no other route would help."""


@dataclass(frozen=True)
class RouteCheck:
    """What the self-check of a route found."""

    route: str
    asymmetry: float
    """|<Hr, Hr> - <r, H(Hr)>| / <Hr, Hr> at a random r."""
    disagreement: float
    """||Hv - differences|| / ||Hv|| along v = Hr, at the best displacement; of differences: of two displacements."""
    reach: float
    """That displacement, over the length of the parameters."""


def check_hvp(
    product: Product, loss_fn: Callable[[], Tensor], params: Sequence[Tensor], *, seed: int = 0
) -> RouteCheck:
    """Check a product against symmetry and against central differences of gradients.

    Costs four products and up to twelve gradients. Use it on a product of your own, too.

    Args:
        product: v -> H v, lists shaped like params.
        loss_fn: () -> scalar, whose Hessian it should be.
        params: the parameters.
        seed: of the random direction.

    Raises:
        RouteError: it is not symmetric, or not the Hessian; or the loss is not finite, or not the same twice.
    """
    route = str(getattr(product, "route", "the product"))
    eps, may_skew, may_differ = _require_usable(loss_fn, params)
    v = _response(product, random_like(params, seed), route)[0]
    hv = product(v)
    noise = 16 * eps * norm(total_gradient([loss_fn], params)) / (norm(params) or 1.0)
    best, at = math.inf, REACHES[0]
    for reach in REACHES:
        error = _distance(hv, gradient_differences([loss_fn], params, v, reach), noise / reach)
        if error < best:
            best, at = error, reach
        if error < may_differ / 10:
            break
    if not best <= may_differ:
        raise RouteError(
            f"{route}: it differs from differences of gradients by {best:.0%} at best (allowed: {may_differ:.0%}), so "
            "it is not this loss's Hessian. Fused losses, kernels without second derivative and torch.func.hessian or "
            "jacrev through layer_norm do this. Use route='finite-differences', or the unfused loss."
        )
    return RouteCheck(route, _asymmetry(product, params, seed, route, may_skew), best, at)


def check_differences(
    at_reach: Callable[[float], Product], loss_fn: Callable[[], Tensor], params: Sequence[Tensor], *, seed: int = 0
) -> RouteCheck:
    """The displacement at which differences of gradients agree best with those at the next one, and their symmetry.

    at_reach: displacement over |theta| -> product. Raises RouteError where none agree.
    """
    route = "finite-differences"
    eps, _, may_differ = _require_usable(loss_fn, params)
    v = _response(at_reach(DEFAULT_REACH), random_like(params, seed), route)[0]
    noise = 16 * eps * norm(total_gradient([loss_fn], params)) / (norm(params) or 1.0)
    ordered = sorted(REACHES, reverse=True)
    found = [at_reach(reach)(v) for reach in ordered]
    gaps = [_distance(a, b, noise / reach) for a, b, reach in zip(found, found[1:], ordered[1:], strict=False)]
    best = min(range(len(gaps)), key=gaps.__getitem__)
    if not gaps[best] <= may_differ:
        raise RouteError(
            f"{route}: differences over different lengths disagree by {gaps[best]:.0%} at best (allowed: "
            f"{may_differ:.0%}). The gradient is too noisy here; compute it in float32 or float64."
        )
    reach = ordered[best + 1]
    return RouteCheck(route, _asymmetry(at_reach(reach), params, seed, route, may_differ), gaps[best], reach)


def _require_usable(loss_fn: Callable[[], Tensor], params: Sequence[Tensor]) -> tuple[float, float, float]:
    """(eps of the coarsest parameter, its tolerances); raises RouteError for a loss that no route can differentiate."""
    first, again = float(_value(loss_fn)), float(_value(loss_fn))
    if not math.isfinite(first):
        raise RouteError(f"loss_fn: the loss is {first}; there is no curvature to measure.", unusable=True)
    coarse = max((parameter.dtype for parameter in params), key=lambda dtype: torch.finfo(dtype).eps)
    eps = torch.finfo(coarse).eps
    if abs(first - again) > 100 * eps * max(abs(first), 1e-3):
        raise RouteError(
            f"loss_fn: it gave {first:.9g} and then {again:.9g}. Switch dropout off: model.eval().",
            unusable=True,
        )
    return eps, *TOLERANCES.get(coarse, TOLERANCES[torch.float32])


def _response(product: Product, r: list[Tensor], route: str) -> tuple[list[Tensor], float]:
    """(H r / ||H r||, ||H r||): a direction in which the curvature is large; r itself where H r = 0."""
    hr = list(product(r))
    length = norm(hr)
    if not math.isfinite(length):
        raise RouteError(f"{route}: H v is not finite. Look for overflow in the model at these parameters.")
    return ([part / length for part in hr] if length > 0 else r), length


def _asymmetry(product: Product, params: Sequence[Tensor], seed: int, route: str, allowed: float) -> float:
    """|<Hr, Hr> - <r, H(Hr)>| / <Hr, Hr>; raises RouteError above `allowed`."""
    r = random_like(params, seed)
    v, length = _response(product, r, route)
    asymmetry = abs(inner(r, product(v)) - length) / length if length > 0 else 0.0
    if not asymmetry <= allowed:
        raise RouteError(
            f"{route}: <r, H w> and <w, H r> differ by {asymmetry:.1e} (allowed: {allowed:.0e}), so it is no Hessian. "
            "Is the loss the same at every call?"
        )
    return asymmetry


def _distance(a: Sequence[Tensor], b: Sequence[Tensor], noise: float) -> float:
    """||a - b|| relative to the larger; 0 where both are rounding noise, as a loss without curvature leaves it."""
    scale = max(norm(a), norm(b))
    return 0.0 if scale <= noise else norm([x - y for x, y in zip(a, b, strict=True)]) / scale


def _value(loss_fn: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        value = loss_fn()
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss_fn: it returned {what}; must return one number, such as a mean over tokens.")
    return value.detach()
