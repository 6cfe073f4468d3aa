"""The Hessian of a loss in the logits, for a batch of tokens, without ever forming V x V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lcogeom.geometry.convexity import negative_count
from lcogeom.geometry.softmax import TokenDistribution
from lcogeom.geometry.spectrum import action_eigenvalue_range

DENSE_LIMIT = 4096


@dataclass(frozen=True, eq=False)
class LogitHessian:
    """N symmetric matrices `diag(d) + U^T C U`, V x V each, float64 (method.md, 2.4).

    Every method costs O(V) per token. Where the loss does not change when a constant is added to the logits,
    H 1 = 0; products then first subtract from x its value at the heaviest coordinate and its mean, which changes
    nothing in exact arithmetic and keeps the digits that saturated tokens would lose.
    """

    diag: Tensor
    """d, (N, V)."""
    factors: Tensor
    """U, (N, k, V); k may be 0."""
    core: Tensor
    """C, (N, k, k), symmetric."""
    negatives: Tensor
    """Number of negative eigenvalues, (N,) int64, from the exact criterion of whoever built the matrix."""
    extremes: Callable[[], tuple[Tensor, Tensor]]
    """(lowest, highest) eigenvalue, (N,) each, computed when asked for."""
    shift_invariant: bool
    """Whether H 1 = 0."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, V, V)."""
        tokens, vocab = self.diag.shape
        return tokens, vocab, vocab

    def __matmul__(self, x: Tensor) -> Tensor:
        """H x, token by token. x: (N, V), any floating dtype. Returns (N, V) float64."""
        x = self._prepared(x)
        return self.diag * x + self._lift(self._project(x))

    def quadratic(self, x: Tensor) -> Tensor:
        """x^T H x, (N,) float64. x: (N, V)."""
        x = self._prepared(x)
        seen = self._project(x)
        return (self.diag * x.square()).sum(1) + torch.einsum("nk,nkl,nl->n", seen, self.core, seen)

    def diagonal(self) -> Tensor:
        """The diagonals, (N, V) float64."""
        plain = self.diag + torch.einsum("nkv,nkl,nlv->nv", self.factors, self.core, self.factors)
        if not self.shift_invariant:
            return plain
        # p_a - p_a^2 cancels when p_a is close to 1; the quadratic form of that one coordinate does not.
        anchor = self._anchor()
        unit = torch.zeros_like(self.diag).scatter_(1, anchor, 1.0)
        return plain.scatter(1, anchor, self.quadratic(unit)[:, None])

    def trace(self) -> Tensor:
        """Sum of the eigenvalues, (N,) float64."""
        return self.diagonal().sum(1)

    def dense(self) -> Tensor:
        """The matrices themselves, (N, V, V) float64, symmetric.

        Raises:
            ValueError: V > 4096.
        """
        tokens, vocab, _ = self.shape
        if vocab > DENSE_LIMIT:
            raise ValueError(
                f"dense: {tokens} matrices of {vocab} x {vocab} would take {tokens * vocab**2 * 8 / 2**30:.1f} GiB; "
                f"dense() stops at V = {DENSE_LIMIT}. Use H @ x, quadratic, diagonal, trace or negative_count."
            )
        full = torch.einsum("nkv,nkl,nlw->nvw", self.factors, self.core, self.factors)
        full = (full + full.transpose(1, 2)) / 2
        full.diagonal(dim1=1, dim2=2).copy_(self.diagonal())
        return full

    def negative_count(self) -> Tensor:
        """Number of negative eigenvalues, (N,) int64, exact."""
        return self.negatives

    def eigenvalue_range(self) -> tuple[Tensor, Tensor]:
        """(lowest, highest) eigenvalue, (N,) float64 each, exact to rounding: the root of one secular equation."""
        return self.extremes()

    def is_convex(self) -> Tensor:
        """Whether the matrix is positive semi-definite, (N,) bool, exact."""
        return self.negatives == 0

    def _prepared(self, x: Tensor) -> Tensor:
        if x.shape != self.diag.shape:
            raise ValueError(f"x: shape {tuple(x.shape)}, but this Hessian acts on {tuple(self.diag.shape)}.")
        x = x.to(self.diag.dtype)
        if not self.shift_invariant:
            return x
        x = x - x.gather(1, self._anchor())
        weight = self.diag.abs()
        mean = (weight * x).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return x - torch.nan_to_num(mean)

    def _anchor(self) -> Tensor:
        return self.diag.abs().argmax(dim=1, keepdim=True)  # (N, 1)

    def _project(self, x: Tensor) -> Tensor:
        return torch.einsum("nkv,nv->nk", self.factors, x)

    def _lift(self, seen: Tensor) -> Tensor:
        return torch.einsum("nkv,nkl,nl->nv", self.factors, self.core, seen)


def action_hessian(distribution: TokenDistribution, d1: Tensor, d2: Tensor) -> LogitHessian:
    """f'' u u^T - f' S for action objectives (method.md, 2.1). d1 = f', d2 = f'', each (N,).

    The Fisher matrix S itself is `d1 = -1, d2 = 0`.
    """
    d1, d2 = d1.double(), d2.double()
    probs = distribution.probs
    zero = torch.zeros_like(d1)
    return LogitHessian(
        diag=-d1[:, None] * probs,
        factors=torch.stack([distribution.direction(), probs], dim=1),
        core=torch.stack([torch.stack([d2, zero], dim=1), torch.stack([zero, d1], dim=1)], dim=1),
        negatives=negative_count(d1, d2, distribution.odds_against(), probs.shape[1]),
        extremes=partial(action_eigenvalue_range, distribution, d1, d2),
        shift_invariant=True,
    )


def diagonal_hessian(diag: Tensor) -> LogitHessian:
    """A diagonal Hessian. diag: (N, V)."""
    diag = diag.double()
    tokens, vocab = diag.shape
    return LogitHessian(
        diag=diag,
        factors=diag.new_zeros(tokens, 0, vocab),
        core=diag.new_zeros(tokens, 0, 0),
        negatives=(diag < 0).sum(1),
        extremes=lambda: (diag.min(dim=1).values, diag.max(dim=1).values),
        shift_invariant=False,
    )
