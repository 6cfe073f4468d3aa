"""The extreme eigenvalues of an action objective's logit Hessian, exact, in O(V) per token.

With rho = f'' / f' the Hessian f'' u u^T - f' S is -f' K, and on all coordinates

    K = diag(v) - v v^T / sum(v),     v_i = p_i,  v_a = pi - rho / (1 + rho),  sum(v) = 1 / (1 + rho).

(SFT: rho = 0. PPO: rho = 1, v = p - e_a / 2.) K has the null vector 1; every other eigenvalue y that is no v_i solves

    sum_i v_i / (v_i - y) = 0,

one term for each coordinate, none of which cancels on saturated tokens (design.md, section 5). Far outside the poles
the terms cancel each other instead, for |rho| is large there; with them taken out of the sum it reads

    1 / (1 + rho) = sum_i p_i (p_i - v_a) / (p_i - y),     i over the other coordinates,

which has the same zeros. Which interval between two poles holds the root sought follows from interlacing. The poles far
below it enter through their power sums (poles.py), so that an evaluation costs what the few likely tokens cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lcogeom.geometry.poles import Poles, gathered_poles, sorted_columns, stacked_poles, two_largest
from lcogeom.geometry.softmax import block_elements, blocks, distributions, split_softmax

EVALUATIONS = 120  # most that bisection alone needs; interpolation takes a tenth of it
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Brackets:
    """What the two searches need of each token beside the poles, (n,) each."""

    rho: Tensor
    shift: Tensor
    """(1 + rho) v_a."""
    own_pole: Tensor
    """v_a; infinite at rho = -1, where its term of the equation is 1."""
    length: Tensor
    """2 (1 - pi)^2 >= ||u||^2, which costs a pass over the vocabulary less."""
    first: Tensor
    second: Tensor
    """The two largest p_i of the other coordinates."""

    @property
    def below(self) -> Tensor:
        """Where a negative eigenvalue of K is to be found."""
        return (self.own_pole < 0) & (self.rho > -1)

    @property
    def above(self) -> Tensor:
        """Where the action's pole is negative, or infinite, and the highest root lies above all poles."""
        return self.rho <= -1

    def lower(self) -> Tensor:
        """The pole below the highest root."""
        own = self.own_pole
        between = torch.where(own >= self.first, self.first, torch.maximum(self.second, own))
        return torch.where(self.above, self.first, between)


def action_eigenvalue_range(logits: Tensor, actions: Tensor, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor]:
    """(lowest, highest) eigenvalue of f'' u u^T - f' S, (N,) float64 each.

    Args:
        logits: (N, V), finite.
        actions: (N,) int64.
        d1, d2: f' and f'', (N,) float64.
    """
    rho = torch.where(d1 == 0, 0.0, d2 / d1)
    if logits.shape[1] == 2:
        pi, rest = _two(logits, actions)
        # K is kappa [[1, -1], [-1, 1]], and u = (1 - pi) (1, -1).
        only = 2 * (pi - rho * rest) * rest
        low, high = only.clamp(max=0.0), only.clamp(min=0.0)
    else:
        found = [(_lowest(poles, some), _highest(poles, some)) for poles, some in _groups(logits, actions, rho)]
        low, high = (torch.cat(part) for part in zip(*found, strict=True))
    ends = torch.stack([-d1 * low, -d1 * high])
    bare = ((d1 == 0) & (d2 != 0)).nonzero().squeeze(1)  # without f' what is left is f'' u u^T
    if len(bare):
        lengths = [some.direction().square().sum(1) for _, some in distributions(logits[bare], actions[bare])]
        ends[:, bare] = torch.stack([torch.zeros_like(d2[bare]), d2[bare] * torch.cat(lengths)])
    return ends.min(dim=0).values, ends.max(dim=0).values


def _two(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """(p_a, 1 - p_a) of a vocabulary of two, (N,) each."""
    parts = [
        (some.probs.gather(1, some.actions[:, None]), some.complement) for _, some in distributions(logits, actions)
    ]
    return torch.cat([pi for pi, _ in parts]).squeeze(1), torch.cat([rest for _, rest in parts])


def _groups(logits: Tensor, actions: Tensor, rho: Tensor) -> Iterator[tuple[Poles, Brackets]]:
    """The tokens in order, as many at a time as keep their poles in the cache."""
    held: list[tuple[Poles, Brackets]] = []
    most = block_elements(logits.device)
    for rows in blocks(logits.shape, logits.device, times=4):
        new = _summary(logits[rows], actions[rows], rho[rows])
        width = max([new[0].head.shape[1], *(poles.head.shape[1] for poles, _ in held)])
        if held and width * sum(len(part.rho) for _, part in [*held, new]) > most:
            yield _joined(held)
            held = []
        held.append(new)
    yield _joined(held)


def _joined(held: list[tuple[Poles, Brackets]]) -> tuple[Poles, Brackets]:
    columns = {f.name: torch.cat([getattr(part, f.name) for _, part in held]) for f in fields(Brackets)}
    return stacked_poles([poles for poles, _ in held]), Brackets(**columns)


def _summary(logits: Tensor, actions: Tensor, rho: Tensor) -> tuple[Poles, Brackets]:
    others, chosen, rest, _ = split_softmax(logits, actions)  # at the action a pole at 0 with weight 0: no term
    columns = sorted_columns(others)
    scale = 1 / (chosen + rest)
    first, second = (two_largest(others, columns) * scale).unbind(1)  # equal to the poles they are, bit for bit
    pi, complement = (chosen * scale).squeeze(1), (rest * scale).squeeze(1)
    shift = pi - rho * complement
    brackets = Brackets(rho, shift, shift / (1 + rho), 2 * complement.square(), first, second)
    lower = brackets.lower()
    nearest = torch.where(brackets.below, torch.minimum(lower, -brackets.own_pole), lower)
    return gathered_poles(others, columns, scale, nearest), brackets


def _lowest(poles: Poles, some: Brackets) -> Tensor:
    """0, or the root below the action's pole where that is negative: y = -s, q / (s - q) = sum_i p_i / (p_i + s)."""
    found = torch.zeros_like(some.rho)
    below = some.below.nonzero().squeeze(1)
    if len(below) == 0:
        return found
    poles = poles.rows(below)
    q, total = -some.own_pole[below], 1 / (1 + some.rho[below])
    far = q > total
    any_far = bool(far.any())

    def secular(s: Tensor) -> Tensor:
        one, two = poles.sums(-s, any_far)
        near = (s - q) * one - q
        # The same function: sum_i p_i (s - q) / (p_i + s) - q = total - sum_i p_i (p_i + q) / (p_i + s).
        return torch.where(far, total - (two + q * one), near) if any_far else near

    high = torch.maximum((some.rho * some.length)[below], q)  # K >= -rho u u^T
    found[below] = -_root(secular, (q, -q), (high, secular(high)))
    return found


def _highest(poles: Poles, some: Brackets) -> Tensor:
    """The root between the two largest poles; above them all where rho < -1."""
    above, lower, rho = some.above, some.lower(), some.rho
    own = torch.where(above, -torch.inf, some.own_pole)
    largest = torch.maximum(some.first, own)
    bound = 0.5 + (-rho).clamp(min=0.0) * some.length  # K <= S + max(-rho, 0) u u^T; no eigenvalue of S exceeds 1/2
    pole_above = ~above & (largest <= bound)
    upper = torch.where(pole_above, largest, bound)
    inverse = (1 + rho) / some.shift  # 1 / v_a, 0 at rho = -1
    far = above & (some.shift > 1)
    any_far = bool(far.any())

    def secular(y: Tensor) -> Tensor:
        one, two = poles.sums(y, any_far)
        total = one + 1 / (1 - y * inverse)
        if any_far:
            total = torch.where(far, one - inverse * two + 1 / some.shift, total)
        # Times the distances to the poles at both ends, which takes them away and leaves the sign.
        return total * (y - lower) * torch.where(pole_above, upper - y, 1.0)

    reach = torch.where(pole_above, upper - lower, 1.0)
    mass = poles.mass_at(lower) + torch.where(own == lower, own, 0.0)
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
