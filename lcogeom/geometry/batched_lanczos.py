"""Extreme eigenpairs of many symmetric matrices at once, from products alone: Lanczos, fully reorthogonalised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcogeom.geometry.krylov import orthogonalised


def batched_lanczos(
    matvec: Callable[[Tensor], Tensor], start: Tensor, *, steps: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Both ends of n spectra.

    Args:
        matvec: (n, V) -> (n, V), row i through matrix i.
        start: (n, V) float64, no zero row.
        steps: most products to take; V of them give the whole spectrum.
        tolerance: stop where both residuals of every matrix fall below it, relative to its largest |eigenvalue|.

    Returns:
        (eigenvalues (n, 2), lowest first; unit eigenvectors (n, 2, V); residuals ||H x - y x|| (n, 2)).
    """
    size = start.shape[1]
    steps = min(steps, size)
    basis = [start / start.norm(dim=1, keepdim=True)]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for step in range(steps):
        product = matvec(basis[-1])
        alphas.append((product * basis[-1]).sum(1))
        held = torch.stack(basis, dim=1)  # (n, step + 1, V)
        product, _ = orthogonalised(product, held)
        beta = product.norm(dim=1)
        values, shapes = _ritz(alphas, betas)
        scale = values.abs().amax(1).clamp(min=1e-300)
        # What is left of the Krylov space at rounding level is noise: the space is invariant, its ends are exact.
        beta = torch.where(beta <= 1e-14 * scale, 0.0, beta)
        residuals = beta[:, None] * shapes[:, -1, [0, -1]].abs()
        done = bool((residuals <= tolerance * scale[:, None]).all()) and step >= min(size, 8) - 1
        if done or step == steps - 1:
            break
        betas.append(beta)
        basis.append(torch.where(beta[:, None] > 0, product / beta.clamp(min=1e-300)[:, None], _fresh(held, step + 1)))
    vectors = torch.einsum("nkv,nke->nev", held, shapes[:, :, [0, -1]])
    return values[:, [0, -1]], vectors / vectors.norm(dim=2, keepdim=True), residuals


def _ritz(alphas: list[Tensor], betas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of the tridiagonal matrices."""
    projected = torch.diag_embed(torch.stack(alphas, dim=1))
    if betas:
        off = torch.diag_embed(torch.stack(betas, dim=1), offset=1)
        projected = projected + off + off.transpose(1, 2)
    values, shapes = torch.linalg.eigh(projected)
    return values, shapes


def _fresh(held: Tensor, seed: int) -> Tensor:
    """Unit vectors orthogonal to the basis, where it spans an invariant space. seed: not that of the start."""
    rng = torch.Generator().manual_seed(seed)
    vector = torch.randn(held[:, 0].shape, generator=rng, dtype=held.dtype).to(held.device)
    vector, _ = orthogonalised(vector, held)
    return vector / vector.norm(dim=1, keepdim=True)
