"""The extreme eigenvalues of an action objective's logit Hessian, exact, in O(V) per token and evaluation.

With rho = f'' / f' the Hessian f'' u u^T - f' S is -f' K, and on all coordinates

    K = diag(v) - v v^T / sum(v),     v_i = p_i,  v_a = pi - rho / (1 + rho),  sum(v) = 1 / (1 + rho).

(SFT: rho = 0. PPO: rho = 1, v = p - e_a / 2.) K has the null vector 1; every other eigenvalue y that is no v_i solves

    sum_i v_i / (v_i - y) = 0,

one term for each coordinate, none of which cancels on saturated tokens (design.md, section 5). Far outside the poles
the terms cancel each other instead, for |rho| is large there; with them taken out of the sum it reads

    1 / (1 + rho) = sum_i p_i (p_i - v_a) / (p_i - y),     i over the other coordinates,

which has the same zeros. Which interval between two poles holds the root sought follows from interlacing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcogeom.geometry.softmax import TokenDistribution

EVALUATIONS = 120  # most that bisection alone needs; interpolation takes a tenth of it
EPS = torch.finfo(torch.float64).eps


def action_eigenvalue_range(some: TokenDistribution, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor]:
    """(lowest, highest) eigenvalue of f'' u u^T - f' S, (n,) float64 each, of a block of tokens.

    Args:
        d1, d2: f' and f'', (n,) float64.
    """
    length = some.direction().square().sum(1)  # ||u||^2
    rho = torch.where(d1 == 0, 0.0, d2 / d1)
    low, high = _range_of_k(some, rho, length)
    ends = torch.stack([-d1 * low, -d1 * high])
    # Without f' what is left is f'' u u^T.
    ends = torch.where(d1 == 0, torch.stack([torch.zeros_like(d2), d2 * length]), ends)
    return ends.min(dim=0).values, ends.max(dim=0).values


def _range_of_k(some: TokenDistribution, rho: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """(lowest, highest) eigenvalue of K = S - rho u u^T."""
    actions = some.actions[:, None]
    pi = some.probs.gather(1, actions).squeeze(1)
    shift = pi - rho * some.complement  # (1 + rho) v_a
    if some.probs.shape[1] == 2:
        # K is kappa [[1, -1], [-1, 1]], and u = (1 - pi) (1, -1).
        only = 2 * shift * some.complement
        return only.clamp(max=0.0), only.clamp(min=0.0)
    others = some.probs.scatter(1, actions, 0.0)  # a pole at 0 with weight 0: no term
    top = others.topk(2, dim=1).values
    return _lowest(others, shift, rho, length), _highest(others, shift, rho, length, top)


def _lowest(others: Tensor, shift: Tensor, rho: Tensor, length: Tensor) -> Tensor:
    """0, or the root below the action's pole where that is negative: y = -s, q / (s - q) = sum_i p_i / (p_i + s)."""
    own_pole = shift / (1 + rho)
    below = (own_pole < 0) & (rho > -1)
    if not below.any():
        return torch.zeros_like(own_pole)
    poles, q, total = others[below], -own_pole[below], 1 / (1 + rho[below])
    far = q > total
    # Both forms are the same function: sum_i p_i (s - q) / (p_i + s) - q = total - sum_i p_i (p_i + q) / (p_i + s).
    weights = torch.where(far[:, None], poles + q[:, None], 1.0) * poles

    def secular(s: Tensor) -> Tensor:
        terms = (weights / (poles + s[:, None])).sum(1)
        return torch.where(far, total - terms, (s - q) * terms - q)

    most = (rho * length)[below]  # K >= -rho u u^T
    found = torch.zeros_like(own_pole)
    high = torch.maximum(most, q)
    found[below] = -_root(secular, (q, -q), (high, secular(high)))
    return found


def _highest(others: Tensor, shift: Tensor, rho: Tensor, length: Tensor, top: Tensor) -> Tensor:
    """The root between the two largest poles; above them all where rho < -1."""
    own_pole = shift / (1 + rho)  # infinite at rho = -1, where its term of the equation is 1
    first, second = top.unbind(1)
    above = rho <= -1  # the action's pole is negative, or infinite
    own = torch.where(above, -torch.inf, own_pole)
    largest = torch.maximum(first, own)
    lower = torch.where(own >= first, first, torch.maximum(second, own))
    lower = torch.where(above, first, lower)
    bound = 0.5 + (-rho).clamp(min=0.0) * length  # K <= S + max(-rho, 0) u u^T, and no eigenvalue of S exceeds 1/2
    pole_above = ~above & (largest <= bound)
    upper = torch.where(pole_above, largest, bound)
    inverse = (1 + rho) / shift  # 1 / own_pole, 0 at rho = -1
    far = above & (shift > 1)
    weights = torch.where(far[:, None], 1 - others * inverse[:, None], 1.0) * others

    def secular(y: Tensor) -> Tensor:
        terms = (weights / (others - y[:, None])).sum(1)
        total = terms + torch.where(far, 1 / shift, 1 / (1 - y * inverse))
        # Times the distances to the poles at both ends, which takes them away and leaves the sign.
        return total * (y - lower) * torch.where(pole_above, upper - y, 1.0)

    reach = torch.where(pole_above, upper - lower, 1.0)
    mass = torch.where(others == lower[:, None], others, 0.0).sum(1) + torch.where(own == lower, own, 0.0)
    at_upper = torch.where(pole_above, upper * reach, secular(bound))
    return torch.where(upper > lower, _root(secular, (lower, -mass * reach), (upper, at_upper)), lower)


def _root(function: Callable[[Tensor], Tensor], low: tuple[Tensor, Tensor], high: tuple[Tensor, Tensor]) -> Tensor:
    """The zero between two points, one for each token, to the last digits.

    Chandrupatla's method: inverse quadratic interpolation where it is safe, bisection where it is not; of the exponent
    as long as the ends lie far apart.

    Args:
        function: (N,) -> (N,).
        low, high: (point, value there), (N,) each; value <= 0 at low and >= 0 at high, but for rounding: where it
            has the other sign, that end is the zero.
    """
    b, at_b = low[0], low[1].clamp(max=0.0)
    a, at_a = high[0], high[1].clamp(min=0.0)
    c, at_c = a, at_a
    for _ in range(EVALUATIONS):
        width = (b - a).abs()
        smallest = torch.minimum(a.abs(), b.abs())
        limit = 2 * EPS * torch.maximum(a.abs(), b.abs()) / width  # closer to an end than this changes nothing
        found = (limit >= 0.5) | (at_a == 0) | (at_b == 0) | width.isnan()
        if bool(found.all()):
            break
        xi, phi = (a - b) / (c - b), (at_a - at_b) / (at_c - at_b)
        safe = (phi.square() < xi) & ((1 - phi).square() < 1 - xi)
        quadratic = at_a / (at_b - at_a) * at_c / (at_b - at_c) + (c - a) / (b - a) * at_a / (at_c - at_a) * at_b / (
            at_c - at_b
        )
        share = torch.where(safe, quadratic, 0.5)
        share = torch.minimum(torch.maximum(share, limit), 1 - limit).where(limit < 0.5, 0.5)
        far = (smallest > 0) & (torch.maximum(a, b) > 16 * smallest)
        point = torch.where(far, (a * b).sqrt(), a + share * (b - a))
        value = function(point)
        stay = found | ((value < 0) == (at_a < 0))
        c, at_c = torch.where(stay, a, b), torch.where(stay, at_a, at_b)
        b, at_b = torch.where(stay, b, a), torch.where(stay, at_b, at_a)
        a, at_a = torch.where(found, a, point), torch.where(found, at_a, value)
    return torch.where(at_a.abs() < at_b.abs(), a, b)
