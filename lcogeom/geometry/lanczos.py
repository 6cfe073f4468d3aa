"""Extreme eigenvalues of one large symmetric operator from products alone: Lanczos, fully reorthogonalised."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.geometry.krylov import KrylovBasis, Matvec, norm, require_operator

LOWEST, HIGHEST = 1, -1  # the sign that makes an end the smallest value
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
    """bool: the residual is at most tolerance * scale, and no further copy of a repeated, more extreme eigenvalue can
    have been missed. Values that differ by less than tolerance * scale are not told apart."""
    scale: float
    """Largest |eigenvalue| found: ||H|| from below."""
    tolerance: float
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
    tolerance: float = 1e-4,
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
    complete = False
    while not complete and not basis.full:
        complete = _explore(basis, torch.randn(size, generator=rng, dtype=dtype), ends, k, tolerance)
    complete = complete or basis.count == size

    every, shapes, parts = basis.ritz()
    blocks = [_outermost(end, k, basis.count).sort().values for end in ends]
    places = torch.cat(blocks)
    tips = torch.cat([block == _outermost(end, 1, basis.count) for end, block in zip(ends, blocks, strict=True)])
    found, residuals = [], []
    for place in places.tolist():
        x = shapes[:, place].to(basis.vectors) @ basis.vectors[: basis.count]
        x = x / x.norm()
        residuals.append(norm(basis.product(x) - float(every[place]) * x))
        found += [x] if vectors else []
    measured = torch.tensor(residuals, dtype=torch.float64)
    scale = float(every.abs().max())
    result = ExtremeEigenvalues(
        values=every[places],
        residuals=measured,
        converged=(measured <= tolerance * scale) & (tips | complete),
        scale=scale,
        tolerance=tolerance,
        steps=basis.count,
        vectors=torch.stack(found) if vectors else None,
    )
    if not result.converged.all():
        warnings.warn(_complaint(result, _bounds(every, parts)[places]), stacklevel=2)
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
        values, _, parts = basis.ritz()
        small = tolerance * float(values.abs().max())
        places = [_outermost(end, k, len(values)) for end in ends]
        inner = [end * float(values[at[-1]]) for end, at in zip(ends, places, strict=True)]
        if first and not tips:
            tips = _known_tips(basis, first, ends, inner, small)
        wanted = torch.zeros(len(values), dtype=torch.bool)
        wanted[torch.cat(places)] = True
        missed = wanted & (_bounds(values, parts) > small)
        if (tips or not first) and len(values) >= k and not missed.any():
            return k == 1 or (first > 0 and all(tip >= edge - small for tip, edge in zip(tips, inner, strict=True)))
        if basis.full or not basis.open:
            return False
        last = basis.newest
        if (tips or not first) and missed.any():  # the chain that holds them back most
            last = max(parts, key=lambda chain: float(parts[chain][missed].max()))
        for _ in range(max(1, basis.count // 10)):  # looking at every step would cost steps^4
            basis.extend(last)
            last = basis.newest
            if basis.full or last not in basis.open:
                break


def _known_tips(basis: KrylovBasis, first: int, ends: tuple[int, ...], inner: list[float], small: float) -> list[float]:
    """end * the outermost value of the newest chain alone, at each end; nothing until each is known to `small`, or ten
    times better than its distance from `inner`."""
    values, _, parts = basis.ritz(first)
    tips, bounds = [], _bounds(values, parts)
    for end, edge in zip(ends, inner, strict=True):
        place = _outermost(end, 1, len(values))
        tip = end * float(values[place])
        if float(bounds[place]) > max(small, (tip - edge) / 10):
            return []
        tips.append(tip)
    return tips


def _outermost(end: int, k: int, count: int) -> Tensor:
    """Places of the k outermost of `count` ascending values, from the tip inwards."""
    return torch.arange(count)[:k] if end == LOWEST else torch.arange(count).flip(0)[:k]


def _bounds(values: Tensor, parts: dict[int, Tensor]) -> Tensor:
    return torch.stack([torch.zeros_like(values), *parts.values()]).sum(0)


def _complaint(result: ExtremeEigenvalues, bounds: Tensor) -> str:
    """bounds: of the residuals, as the basis promises them."""
    missed, limit = ~result.converged, result.tolerance * result.scale
    pairs = zip(result.values[missed].tolist(), result.residuals[missed].tolist(), strict=True)
    listed = ", ".join(f"{value:.4g} (residual {gap:.1e})" for value, gap in pairs)
    if (missed & (bounds > limit)).any():
        remedy = "Raise steps (a product and a vector of memory each), or tolerance."
    elif (missed & (result.residuals > limit)).any():
        remedy = "The products are rounded more coarsely than that: compute in float64, or raise tolerance."
    else:
        remedy = "Further copies of a repeated eigenvalue could not be ruled out: raise steps."
    return (
        f"extreme_eigenvalues: {int(missed.sum())} of {len(missed)} values did not converge in {result.steps} steps: "
        f"{listed}; asked for: {limit:.1e} (tolerance {result.tolerance:g} of {result.scale:.4g}). {remedy}"
    )
