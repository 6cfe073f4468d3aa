"""How far an update moved the policy: KL(pi_before || pi_after) from the logits of the same tokens before and after it.

With y = z_after - z_before up to a constant, x = y - E_p[y] and p = pi_before,

    KL(p || p') = log E_p[e^y] - E_p[y] = log(1 + E_p[e^x - 1 - x])

and e^x - 1 - x >= 0, so nothing cancels, however small the KL: the sum p (log p - log p') loses every digit of a KL
below 1e-16, this form none of them. The constant is y at the likeliest id, whose x is then -E of the others: exact
where that id has all the mass but 1e-26.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.geometry.softmax import blocks, require_finite

NEAR = 0.5  # below it e^x - 1 - x is summed as a series, whose TERMS terms leave 1e-17 of it
TERMS = 14


@dataclass(frozen=True, eq=False)
class UpdateKl:
    """KL(pi_before || pi_after) of one update in nats, float64."""

    token: Tensor
    """Each token's, (N,); 0 where the mask is off."""
    sequence_ids: Tensor | None
    """The completions in ascending order, (S,); None: no sequences were given."""
    sequence_sum: Tensor | None
    """Sum over the kept tokens of each completion, (S,)."""
    sequence_mean: Tensor | None
    """Their mean, (S,); 0 of a completion without a kept token."""
    total: Tensor
    """Sum over all kept tokens, a number."""
    mean: Tensor
    """Their mean, a number."""


def token_kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(softmax(before) || softmax(after)) of each token over the whole vocabulary, (N,) float64, in nats.

    Relative error: a few rounding units times max(1, |shift| / |y|), the shift being what all logits of a token moved
    by together and y what they moved by apart; of float32 logits the differences are exact and so is y. Works block by
    block: never holds N x V beside its arguments. Not differentiable.

    Args:
        before, after: logits of the same tokens, (N, V) each, any floating dtype. Masked ids: a large negative number
            in both.

    Raises:
        ValueError: shapes that differ or are not (N, V), a NaN or an infinity.
    """
    if before.ndim != 2 or before.shape != after.shape:
        raise ValueError(
            f"before, after: shapes {tuple(before.shape)} and {tuple(after.shape)}; both must be (N, V), logits of the "
            "same tokens before and after the update."
        )
    if before.device != after.device:
        raise ValueError(f"before, after: on {before.device} and {after.device}; move both to one device.")
    require_finite(before, "before")
    require_finite(after, "after")
    with torch.no_grad():
        result = torch.empty(len(before), dtype=torch.float64, device=before.device)
        for rows in blocks(before.shape, before.device):
            result[rows] = _kl(before[rows].double(), after[rows].double())
    return result


def update_kl(
    before: Tensor, after: Tensor, *, mask: Tensor | None = None, sequences: Tensor | None = None
) -> UpdateKl:
    """`token_kl` with its sums and means over completions and over the batch.

    Args:
        before, after: as in `token_kl`.
        mask: which tokens count, (N,); None: all.
        sequences: which completion each token belongs to, (N,) integer.

    Raises:
        ValueError: as `token_kl`; a mask or sequences of another length.
    """
    values = token_kl(before, after)
    for name, given in (("mask", mask), ("sequences", sequences)):
        if given is not None and given.shape != values.shape:
            raise ValueError(f"{name}: shape {tuple(given.shape)}; must be ({len(values)},), one entry for each token.")
    keep = torch.ones_like(values) if mask is None else mask.bool().double()
    values = values * keep
    ids = sums = means = None
    if sequences is not None:
        ids, place = sequences.unique(return_inverse=True)
        zero = values.new_zeros(len(ids))
        sums = zero.index_add(0, place, values)
        means = sums / zero.index_add(0, place, keep).clamp(min=1)
    return UpdateKl(values, ids, sums, means, values.sum(), values.sum() / keep.sum().clamp(min=1))


def _kl(z: Tensor, after: Tensor) -> Tensor:
    """The KL of each row, (n,), from float64 logits (n, V)."""
    logp = torch.log_softmax(z, dim=1)
    p = logp.exp()
    x = after - z
    x = x - x.gather(1, z.argmax(1, keepdim=True))
    x -= (p * x).sum(1, keepdim=True)
    near = x.abs() <= NEAR
    series = _excess_series(torch.where(near, x, 0.0))
    # Where x is large, p e^x = e^(log p + x) neither overflows where p is tiny nor loses what p underflows to.
    rest = torch.where(x > 1, (logp + x).exp() - p * (1 + x), p * (torch.expm1(x.clamp(max=1)) - x))
    kl = torch.log1p(torch.where(near, p * series, rest).sum(1))
    far = ~(kl < 1)  # e^x may have overflowed; here the plain form has all its digits
    return torch.where(far, torch.logsumexp(logp + x, dim=1), kl) if bool(far.any()) else kl


def _excess_series(x: Tensor) -> Tensor:
    """e^x - 1 - x = x^2 (1/2 + x/6 + x^2/24 + ...), for |x| <= NEAR."""
    total = torch.full_like(x, 1 / math.factorial(TERMS + 1))
    for order in range(TERMS, 1, -1):
        total.mul_(x).add_(1 / math.factorial(order))
    return total.mul_(x).mul_(x)
