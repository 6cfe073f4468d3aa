"""The Hessian of a loss of which only autograd knows the derivatives: products by double backward, ends by Lanczos."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lcogeom.geometry.batched_lanczos import batched_lanczos
from lcogeom.geometry.hessian import ExtremeEigenvectors, require_dense
from lcogeom.geometry.softmax import blocks

STEPS = 200
TOLERANCE = 1e-8  # residual over the largest |eigenvalue| at which an end counts as found


@dataclass(frozen=True, eq=False)
class AutogradHessian:
    """N symmetric matrices V x V with the methods of `LogitHessian`; `exact` is False.

    The ends of the spectrum are Ritz values: the lowest may be too high, the highest too low, by at most about their
    residual (`extreme_eigenvectors().residuals`). The inertia is counted from dense matrices, so for V <= 4096 only.
    """

    logits: Tensor
    """(N, V), any floating dtype; derivatives are taken in float64."""
    loss: Callable[[Tensor, slice], Tensor]
    """(logits (n, V) float64, rows) -> loss of those tokens (n,); token i may depend on its own row only."""

    exact = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, V, V)."""
        tokens, vocab = self.logits.shape
        return tokens, vocab, vocab

    def __matmul__(self, x: Tensor) -> Tensor:
        """H x, token by token. x: (N, V). Returns (N, V) float64."""
        if x.shape != self.logits.shape:
            raise ValueError(f"x: shape {tuple(x.shape)}, but this Hessian acts on {tuple(self.logits.shape)}.")
        return torch.cat([self._matvec(rows)(x[rows].double()) for rows in self._blocks()])

    def quadratic(self, x: Tensor) -> Tensor:
        """x^T H x, (N,) float64. x: (N, V)."""
        return (x.double() * (self @ x)).sum(1)

    def dense(self) -> Tensor:
        """The matrices themselves, (N, V, V) float64, by V products. Raises ValueError for V > 4096."""
        tokens, vocab, _ = self.shape
        require_dense(tokens, vocab)
        unit = torch.eye(vocab, dtype=torch.float64, device=self.logits.device)
        parts = []
        for rows in self._blocks():
            matvec = self._matvec(rows)
            columns = [matvec(row.expand(rows.stop - rows.start, vocab)) for row in unit]
            parts.append(torch.stack(columns, dim=2))
        full = torch.cat(parts)
        return (full + full.transpose(1, 2)) / 2

    def diagonal(self) -> Tensor:
        """The diagonals, (N, V) float64. Raises ValueError for V > 4096."""
        return self.dense().diagonal(dim1=1, dim2=2)

    def trace(self) -> Tensor:
        """Sum of the eigenvalues, (N,) float64. Raises ValueError for V > 4096."""
        return self.diagonal().sum(1)

    def negative_count(self) -> Tensor:
        """Number of eigenvalues below -1e-12 of the largest, (N,) int64. Raises ValueError for V > 4096."""
        values = torch.linalg.eigvalsh(self.dense())
        return (values < -1e-12 * values.abs().amax(1, keepdim=True)).sum(1)

    def eigenvalue_range(self) -> tuple[Tensor, Tensor]:
        """(lowest, highest) Ritz value, (N,) float64 each; warns where Lanczos did not converge."""
        found = self._extremes
        missed = int((found.residuals > TOLERANCE).any(1).sum())
        if missed:
            warnings.warn(
                f"eigenvalue_range: {missed} of {len(found.lowest)} tokens did not converge in {STEPS} Lanczos steps; "
                f"the largest relative residual is {found.residuals.max():.1e}.",
                stacklevel=2,
            )
        return found.lowest, found.highest

    def extreme_eigenvectors(self) -> ExtremeEigenvectors:
        """Both ends with their vectors and residuals."""
        return self._extremes

    def is_convex(self) -> Tensor:
        """Whether the lowest Ritz value is above -1e-8 of the largest, (N,) bool: to the accuracy of Lanczos."""
        low, high = self.eigenvalue_range()
        return low >= -TOLERANCE * torch.maximum(low.abs(), high.abs())

    @cached_property
    def _extremes(self) -> ExtremeEigenvectors:
        parts = []
        for rows in self._blocks():
            shape = (rows.stop - rows.start, self.shape[1])
            rng = torch.Generator().manual_seed(0)
            start = torch.randn(shape, generator=rng, dtype=torch.float64).to(self.logits.device)
            parts.append(batched_lanczos(self._matvec(rows), start, steps=STEPS, tolerance=TOLERANCE))
        values, vectors, residuals = (torch.cat(part) for part in zip(*parts, strict=True))
        scale = values.abs().amax(1, keepdim=True)
        relative = torch.where(scale == 0, 0.0, residuals / scale)
        return ExtremeEigenvectors(values[:, 0], values[:, 1], vectors[:, 0], vectors[:, 1], relative)

    def _blocks(self) -> list[slice]:
        return list(blocks(self.logits.shape, self.logits.device))

    def _matvec(self, rows: slice) -> Callable[[Tensor], Tensor]:
        """x -> H x on some of the tokens; the graph of the gradient is built once."""
        with torch.enable_grad():
            z = self.logits[rows].detach().double().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(z, rows).sum(), z, create_graph=True)

        def product(x: Tensor) -> Tensor:
            if not gradient.requires_grad:
                return torch.zeros_like(x)
            (result,) = torch.autograd.grad(gradient, z, x, retain_graph=True, allow_unused=True)
            return torch.zeros_like(x) if result is None else result

        return product
