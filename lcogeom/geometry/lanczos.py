"""Extreme eigenvalues of one large symmetric operator from products alone: Lanczos, fully reorthogonalised."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.geometry.krylov import KrylovBasis, Matvec, norm, require_operator

LOWEST, HIGHEST = 1, -1  # the sign that makes an end the smallest value
UNLIKELY = 0.0125  # a unit vector at random has a part below this / sqrt(size) along a given direction 1 time in 100
ENDS = {"both": (LOWEST, HIGHEST), "lowest": (LOWEST,), "highest": (HIGHEST,)}


@dataclass(frozen=True, eq=False)
class ExtremeEigenvalues:
    """Eigenvalues at the ends of a spectrum; tensors are float64 on the CPU unless said otherwise."""

    values: Tensor
    """The k lowest, then the k highest (or one of the two), each ascending and with multiplicity."""
    residuals: Tensor
    """||H x - y x|| of the unit vector x found for each value y, by a product of its own: whatever went wrong on the
    way, an eigenvalue of H lies within this distance of y, and the rounding of a product. In the unit of the values."""
    converged: Tensor
    """bool: the residual is at most tolerance * scale, also when weighed with the number of eigenvalues that the value
    may stand for (see `unseen`), and a search for copies of the values outside it has ended. Values that differ by less
    than tolerance * scale are not told apart."""
    scale: float
    """Largest |eigenvalue| found: ||H|| from below."""
    tolerance: float
    unseen: tuple[float, ...]
    """For each end asked for: with probability 0.99 over the start vector q no eigenvalue lies farther than this beyond
    the outermost value, rounding aside. An eigenvector e beyond (y, x) has |y_e - y| <= residual |q . x| / |q . e|: a
    value with a large |q . x| stands for a crowd of eigenvalues, some of them perhaps much farther out than its
    residual."""
    steps: int
    """Vectors in the basis, a product each; every value took one more for its residual."""
    vectors: Tensor | None
    """Unit eigenvectors as rows, in the order of `values`, (values, size), of the dtype and on the device asked for;
    None unless asked for."""


def extreme_eigenvalues(
    matvec: Matvec,
    size: int,
    *,
    k: int = 1,
    which: str = "both",
    steps: int = 100,
    tolerance: float = 1e-5,
    vectors: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> ExtremeEigenvalues:
    """The k lowest and the k highest eigenvalues of a symmetric operator, with residuals that were measured.

    Krylov spaces of random vectors, every vector orthogonalised twice against all others (Golub and Van Loan, Matrix
    Computations, 10.3); the projected operator is diagonalised in float64. With k > 1 further random vectors,
    orthogonal to all before, look for copies of repeated eigenvalues until they find none.

    Time: steps + the number of values products, and steps^2 size multiplications. Memory: the basis, steps * size
    numbers of `dtype`, taken at once (100 steps at 135 million parameters in float32: 54 GB).

    Args:
        matvec: x (size,) -> H x (size,), both of `dtype` on `device`, H symmetric and the same in every call: a
            model's Hessian over all its parameters or those of one layer, without dropout.
        size: number of rows of H.
        k: how many at each end; at most `size`.
        which: `both`, `lowest` or `highest`.
        steps: most vectors in the basis.
        tolerance: residual, relative to the largest |eigenvalue|, at which a value counts as converged. Products in
            float32 rarely allow less than 1e-6.
        dtype: float32 or float64, of the basis.
        seed: of the random vectors; the global generators are left as they are.

    Warns:
        UserWarning: something asked for did not converge; the result says which.

    Raises:
        ValueError: arguments out of range; a product of the wrong shape or device, or with a NaN or an infinity; an
            operator that is visibly not symmetric (1 % of its size, in the directions explored).
        TypeError: matvec returns no tensor.
    """
    require_operator(size, steps, dtype)
    if which not in ENDS:
        raise ValueError(f"which: {which!r}; must be 'both', 'lowest' or 'highest'.")
    ends = ENDS[which]
    if not 1 <= k <= size:
        raise ValueError(f"k: {k}; must be between 1 and the operator's size, {size}.")
    if steps < min(size, k * len(ends)):
        raise ValueError(f"steps: {steps} cannot give {k * len(ends)} values; take several times as many.")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: {tolerance}; must lie between 0 and 1.")

    basis = KrylovBasis(matvec, size, steps, dtype=dtype, device=device)
    rng = torch.Generator().manual_seed(seed)
    complete, unseen = False, (0.0,) * len(ends)
    while not complete and not basis.full:
        complete = _explore(basis, torch.randn(size, generator=rng, dtype=dtype), ends, k, tolerance)
        if len(basis.starts) == 1 and basis.count < size:
            doubt = _doubts(basis)[1] / UNLIKELY
            unseen = tuple(float(doubt[0 if end == LOWEST else -1]) for end in ends)
    complete = complete or basis.count == size

    every, shapes, _ = basis.ritz()
    doubts = _doubts(basis)[1]
    wanted = _wanted(ends, k, basis.count)
    tips = torch.cat([torch.arange(k) == (0 if end == LOWEST else k - 1) for end in ends])
    found, residuals = [], []
    for place in wanted:
        x = shapes[:, place].to(basis.vectors) @ basis.vectors[: basis.count]
        x = x / x.norm()
        residuals.append(norm(basis.product(x) - float(every[place]) * x))
        found += [x] if vectors else []
    measured = torch.tensor(residuals, dtype=torch.float64)
    scale = float(every.abs().max())
    limit = tolerance * scale
    result = ExtremeEigenvalues(
        values=every[wanted],
        residuals=measured,
        converged=(measured <= limit) & (doubts[wanted] <= limit) & (tips | complete),
        scale=scale,
        tolerance=tolerance,
        unseen=unseen,
        steps=basis.count,
        vectors=torch.stack(found) if vectors else None,
    )
    if not result.converged.all():
        warnings.warn(_complaint(result, doubts[wanted]), stacklevel=2)
    return result


def _explore(basis: KrylovBasis, start: Tensor, ends: tuple[int, ...], k: int, tolerance: float) -> bool:
    """Add a chain, until it knows its own ends (unless it is the first) and all that is wanted has converged.

    start: (size,).

    Returns:
        Whether the values are complete: the chain, orthogonal to all before, found nothing beyond them.
    """
    first = basis.count
    basis.begin(start)
    tips: list[float] = []  # end * the outermost value of the chain alone, once known; none of the first chain
    while True:
        values, doubts, parts = _doubts(basis)
        small = tolerance * float(values.abs().max())
        edges = [end * float(values[:k][-1] if end == LOWEST else values[-k:][0]) for end in ends]
        if first and not tips:
            tips = _known_tips(basis, first, ends, edges, small)
        missed = torch.zeros(basis.count, dtype=torch.bool)
        missed[_wanted(ends, k, basis.count)] = True
        missed &= doubts > small
        if (tips or not first) and basis.count >= k and not missed.any():
            return k == 1 or (first > 0 and all(tip >= edge - small for tip, edge in zip(tips, edges, strict=True)))
        if basis.full or not basis.open:
            return False
        last = basis.newest
        if ((tips or not first) and missed.any()) or last not in basis.open:  # the chain that holds them back most
            last = max(parts, key=lambda chain: float((parts[chain] * missed).max()))
        for _ in range(max(1, basis.count // 10)):  # looking at every step would cost steps^4
            basis.extend(last)
            last = basis.newest
            if basis.full or last not in basis.open:
                break


def _known_tips(basis: KrylovBasis, first: int, ends: tuple[int, ...], edges: list[float], small: float) -> list[float]:
    """end * the outermost value of the newest chain alone, at each end; nothing until each is known to `small`, or ten
    times better than its distance from `edges`."""
    values, doubts, _ = _doubts(basis, first)
    tips = []
    for end, edge in zip(ends, edges, strict=True):
        place = 0 if end == LOWEST else -1
        tip = end * float(values[place])
        if float(doubts[place]) > max(small, (tip - edge) / 10):
            return []
        tips.append(tip)
    return tips


def _doubts(basis: KrylovBasis, first: int = 0) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """(values, bounds of their residuals times sqrt(crowd), and each open chain's part in that), as `KrylovBasis.ritz`.

    crowd: how many eigenvalues a value stands for, size (q . x)^2 of the start vectors q, at least 1. The polynomial p
    that makes x = p(H) q vanishes at all other values, so beyond the outermost one it grows: the part of x along an
    eigenvector e there is at least |q . e| / |q . x|, and |q . e| is about 1 / sqrt(size).
    """
    values, shapes, parts = basis.ritz(first)
    starts = [start - first for start in basis.starts if start >= first]
    crowd = (basis.size * shapes[starts].square().amax(0)).clamp(min=1).sqrt()
    parts = {last: crowd * part for last, part in parts.items()}
    return values, torch.stack([torch.zeros_like(values), *parts.values()]).sum(0), parts


def _wanted(ends: tuple[int, ...], k: int, count: int) -> list[int]:
    """Places of the k outermost of `count` ascending values at each end, ascending; fewer where count < k."""
    places = {LOWEST: [*range(min(k, count))], HIGHEST: [*range(max(0, count - k), count)]}
    return [place for end in ends for place in places[end]]


def _complaint(result: ExtremeEigenvalues, doubts: Tensor) -> str:
    """doubts: of the values in the result, as `_doubts` gives them."""
    missed, limit = ~result.converged, result.tolerance * result.scale
    pairs = zip(result.values[missed].tolist(), result.residuals[missed].tolist(), strict=True)
    listed = ", ".join(f"{value:.4g} (residual {gap:.1e})" for value, gap in pairs)
    if (missed & (doubts > limit)).any():
        remedy = "Raise steps (a product and a vector of memory each), or tolerance."
    elif (missed & (result.residuals > limit)).any():
        remedy = "The products are rounded more coarsely than that: compute in float64, or raise tolerance."
    else:
        remedy = "Others farther out, or copies of a repeated one, could not be ruled out: raise steps."
    return (
        f"extreme_eigenvalues: {int(missed.sum())} of {len(missed)} values did not converge in {result.steps} steps: "
        f"{listed}; asked for: {limit:.1e} (tolerance {result.tolerance:g} of {result.scale:.4g}). {remedy}"
    )
