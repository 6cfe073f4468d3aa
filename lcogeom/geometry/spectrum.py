"""The extreme eigenvalues of an action objective's logit Hessian, exact, in O(V) per token and evaluation.

With rho = f'' / f' the Hessian f'' u u^T - f' S is -f' K, and on all coordinates

    K = diag(v) - v v^T / sum(v),     v_i = p_i,  v_a = pi - rho / (1 + rho),  sum(v) = 1 / (1 + rho).

(SFT: rho = 0. PPO: rho = 1, v = p - e_a / 2.) K has the null vector 1; every other eigenvalue y that is no v_i solves

    sum_i v_i / (v_i - y) = 0,

one term for each coordinate, none of which cancels on saturated tokens (design.md, section 5). Which interval between
two poles holds the root sought follows from interlacing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcogeom.geometry.softmax import TokenDistribution

BLOCK_ELEMENTS = 2**17  # 1 MiB in float64, which stays in the cache over all evaluations
EVALUATIONS = 120  # most that bisection alone needs; interpolation takes a tenth of it
EPS = torch.finfo(torch.float64).eps


def action_eigenvalue_range(distribution: TokenDistribution, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor]:
    """(lowest, highest) eigenvalue of f'' u u^T - f' S, (N,) float64 each. d1 = f', d2 = f'', (N,)."""
    d1, d2 = d1.double(), d2.double()
    tokens, vocab = distribution.probs.shape
    step = max(1, BLOCK_ELEMENTS // vocab)
    parts = [
        _block_range(distribution.rows(slice(start, start + step)), d1[start : start + step], d2[start : start + step])
        for start in range(0, tokens, step)
    ]
    return torch.cat([low for low, _ in parts]), torch.cat([high for _, high in parts])


def _block_range(some: TokenDistribution, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor]:
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
    # (pi - rho (1 - pi)) / (1 + rho); infinite at rho = -1, where its term of the equation is 1.
    own_pole = (pi - rho * some.complement) / (1 + rho)
    if some.probs.shape[1] == 2:
        # K is kappa [[1, -1], [-1, 1]], and u = (1 - pi) (1, -1).
        only = 2 * (pi - rho * some.complement) * some.complement
        return only.clamp(max=0.0), only.clamp(min=0.0)
    others = some.probs.scatter(1, actions, 0.0)  # a pole at 0 with weight 0: no term
    top = others.topk(2, dim=1).values
    return _lowest(others, own_pole, rho, length), _highest(others, own_pole, rho, length, top)


def _lowest(others: Tensor, own_pole: Tensor, rho: Tensor, length: Tensor) -> Tensor:
    """0, or the root below the action's pole where that is negative: y = -s, q / (s - q) = sum_i p_i / (p_i + s)."""
    below = (own_pole < 0) & (rho > -1)
    if not below.any():
        return torch.zeros_like(own_pole)
    poles, q = others[below], -own_pole[below]

    def secular(s: Tensor) -> Tensor:
        return (s - q) * (poles / (poles + s[:, None])).sum(1) - q

    most = (rho * length)[below]  # K >= -rho u u^T
    found = torch.zeros_like(own_pole)
    found[below] = -_root(secular, q, torch.maximum(most, q))
    return found


def _highest(others: Tensor, own_pole: Tensor, rho: Tensor, length: Tensor, top: Tensor) -> Tensor:
    """The root between the two largest poles; above them all where rho < -1."""
    first, second = top.unbind(1)
    above = rho <= -1  # the action's pole is negative, or infinite
    own = torch.where(above, -torch.inf, own_pole)
    largest = torch.maximum(first, own)
    lower = torch.where(own >= first, first, torch.maximum(second, own))
    lower = torch.where(above, first, lower)
    bound = 0.5 + (-rho).clamp(min=0.0) * length  # K <= S + max(-rho, 0) u u^T, and no eigenvalue of S exceeds 1/2
    upper = torch.where(above, bound, torch.minimum(largest, bound))
    inverse = 1 / own_pole  # of the action's pole, 0 at rho = -1

    def secular(y: Tensor) -> Tensor:
        # Times (y - lower) (upper - y), which takes the poles at both ends away and leaves the sign.
        terms = others / (others - y[:, None])
        total = terms.sum(1) + 1 / (1 - y * inverse)
        return total * (y - lower) * torch.where(above, 1.0, upper - y)

    return torch.where(upper > lower, _root(secular, lower, upper), lower)


def _root(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The zero of a function that is negative right of `low` and positive left of `high`, one for each token.

    Bisection (of the exponent, where the ends lie far apart) made fast by the Illinois rule. The ends themselves are
    never evaluated: they may be poles.
    """
    low, high = low.clone(), high.clone()
    at_low, at_high = torch.full_like(low, torch.nan), torch.full_like(high, torch.nan)
    for evaluation in range(EVALUATIONS):
        if bool((high - low <= 2 * EPS * high).all()):
            break
        wide = (low > 0) & (high > 4 * low)
        point = torch.where(wide, low.sqrt() * high.sqrt(), low + (high - low) / 2)
        if evaluation % 3:
            chord = low - at_low * (high - low) / (at_high - at_low)
            point = torch.where(~wide & (chord > low) & (chord < high), chord, point)
        value = function(point)
        left, right = value < 0, value >= 0
        # Illinois: an end that stays twice counts half, so that the other one moves as well.
        at_high = torch.where(right, value, torch.where(left, at_high / 2, at_high))
        at_low = torch.where(left, value, torch.where(right, at_low / 2, at_low))
        low, high = torch.where(left, point, low), torch.where(right, point, high)
    return low + (high - low) / 2
