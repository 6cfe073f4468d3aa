"""The Hessian of losses that couple tokens: a block for each token plus rank one for each group of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.geometry.hessian import LogitHessian
from lcogeom.geometry.softmax import distributions


@dataclass(frozen=True, eq=False)
class Link:
    """A loss phi(m) of m = sum_t c_t x_t over each group, x_t = log pi(a_t) or the action's raw logit.

    Adds phi'' V V^T with V = stack(c_t grad x_t), of which the blocks hold the part within each token already.
    """

    groups: Tensor
    """Which group each token belongs to, (N,) int64, in [0, G)."""
    coefficient: Tensor
    """c_t, (N,) float64."""
    bend: Tensor
    """phi'', (G,) float64."""
    raw: bool
    """Whether x_t is the raw logit."""


@dataclass(frozen=True, eq=False)
class JointHessian:
    """One symmetric matrix over all N tokens' logits, NV x NV, never formed."""

    blocks: LogitHessian
    """The V x V blocks on the diagonal."""
    links: tuple[Link, ...]

    def __matmul__(self, x: Tensor) -> Tensor:
        """H x. x: (N, V). Returns (N, V) float64."""
        product = self.blocks @ x
        for link in self.links:
            seen = link.coefficient * self._along(link, x)  # (N,)
            total = torch.zeros_like(link.bend).index_add_(0, link.groups, seen)[link.groups]
            push = link.bend[link.groups] * link.coefficient * (total - seen)
            if link.raw:
                product.scatter_add_(1, self.blocks.actions[:, None], push[:, None])
                continue
            for rows, some in distributions(self.blocks.logits, self.blocks.actions):
                product[rows] += push[rows, None] * some.direction()
        return product

    def quadratic(self, x: Tensor) -> Tensor:
        """x^T H x, a number (float64 tensor without dimensions). x: (N, V)."""
        return (x.double() * (self @ x)).sum()

    def dense(self) -> Tensor:
        """The matrix, (NV, NV) float64. For small cases.

        Raises:
            ValueError: N V > 4096.
        """
        tokens, vocab, _ = self.blocks.shape
        if tokens * vocab > 4096:
            raise ValueError(f"dense: {tokens * vocab} rows and columns; dense() stops at 4096. Use H @ x.")
        unit = torch.eye(tokens * vocab, dtype=torch.float64, device=self.blocks.logits.device)
        full = torch.stack([(self @ row.reshape(tokens, vocab)).reshape(-1) for row in unit])
        return (full + full.T) / 2

    def _along(self, link: Link, x: Tensor) -> Tensor:
        """grad x_t . x, (N,)."""
        if link.raw:
            return x.double().gather(1, self.blocks.actions[:, None]).squeeze(1)
        parts = []
        for rows, some in distributions(self.blocks.logits, self.blocks.actions):
            gap = x[rows].double() - x[rows].double().gather(1, some.actions[:, None])
            parts.append(-(some.probs * gap).sum(1))
        return torch.cat(parts)
