"""Q^T diag(w) Q + diag(m) with Q = I - 1 p^T: the form that every logit Hessian takes (method.md, 2.1 to 2.4).

Q x = x - (p.x) 1 takes from x what the softmax does not see. In this form

    S = Q^T diag(p) Q,     u u^T = Q^T (e_a e_a^T) Q,
    the Hessian of sum_j p_j c_j with c held fixed = Q^T diag(p (c - p.c)) Q,

so Hessians add by adding their w; m is what a loss of the raw logits contributes. On all coordinates it is
diag(w + m) plus rank two,

    diag(w + m) - p w^T - w p^T + sum(w) p p^T,

and by Sylvester's law the eigenvalues below y are counted in O(V): with g = w + m - y,

    #{eigenvalues < y} = #{g < 0} + #negative eigenvalues of M(y) - 1,

    M(y) = [ -sum p^2 / g          sum p (m - y) / g ]
           [  sum p (m - y) / g    sum w (m - y) / g ].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
TINY = 1e-290
BISECTIONS = 1100  # of the exponent, then of the mantissa: about 65 are enough unless an end underflows


@dataclass(frozen=True, eq=False)
class ProjectedDiagonal:
    """A block of n such matrices, V x V each, float64."""

    probs: Tensor
    """p, (n, V)."""
    weights: Tensor
    """w, (n, V)."""
    signs: Tensor
    """w / p, (n, V): keeps the sign of w where p underflows."""
    ridge: Tensor | None
    """m, (n, V); None: 0."""
    heavy: Tensor
    """argmax p, (n, 1)."""
    complement: Tensor
    """1 - max p as the sum of the others, (n, 1)."""

    def negated(self) -> ProjectedDiagonal:
        """Minus the matrices."""
        ridge = None if self.ridge is None else -self.ridge
        return replace(self, weights=-self.weights, signs=-self.signs, ridge=ridge)

    def project(self, x: Tensor) -> Tensor:
        """Q x, (n, V); taken relative to the heaviest coordinate, whose digits p.x would lose on saturated tokens."""
        x = x - x.gather(1, self.heavy)
        return x - (self.probs * x).sum(1, keepdim=True)

    def matvec(self, x: Tensor) -> Tensor:
        """The product with x, (n, V)."""
        seen = self.weights * self.project(x)
        top = seen.gather(1, self.heavy)
        rest = seen.scatter(1, self.heavy, 0.0).sum(1, keepdim=True)
        product = seen - self.probs * (top + rest)
        heaviest = top * self.complement - self.probs.gather(1, self.heavy) * rest
        product.scatter_(1, self.heavy, heaviest)
        return product if self.ridge is None else product + self.ridge * x

    def quadratic(self, x: Tensor) -> Tensor:
        """x^T H x, (n,)."""
        value = (self.weights * self.project(x).square()).sum(1)
        return value if self.ridge is None else value + (self.ridge * x.square()).sum(1)

    def diagonal(self) -> Tensor:
        """(n, V)."""
        top = self.weights.gather(1, self.heavy)
        rest = self.weights.scatter(1, self.heavy, 0.0).sum(1, keepdim=True)
        plain = self.weights * (1 - 2 * self.probs) + self.probs.square() * (top + rest)
        heaviest = top * self.complement.square() + self.probs.gather(1, self.heavy).square() * rest
        plain.scatter_(1, self.heavy, heaviest)
        return plain if self.ridge is None else plain + self.ridge

    def dense(self) -> Tensor:
        """(n, V, V), symmetric."""
        p, w = self.probs, self.weights
        cross = p[:, :, None] * w[:, None, :]
        full = p[:, :, None] * p[:, None, :] * w.sum(1)[:, None, None] - cross - cross.transpose(1, 2)
        # The row of the heaviest coordinate cancels in that form: -p_j w_0 (1 - p_0) - p_0 (w_j - p_j sum of the rest).
        rest = w.scatter(1, self.heavy, 0.0)
        row = -p * w.gather(1, self.heavy) * self.complement
        row -= p.gather(1, self.heavy) * (rest - p * rest.sum(1, keepdim=True))
        index = self.heavy[:, :, None]
        full.scatter_(1, index.expand(-1, 1, p.shape[1]), row[:, None, :])
        full.scatter_(2, index.expand(-1, p.shape[1], 1), row[:, :, None])
        full.diagonal(dim1=1, dim2=2).copy_(self.diagonal())
        return full

    def negative_count(self) -> Tensor:
        """Number of negative eigenvalues, (n,) int64."""
        if self.ridge is not None:
            return self.count_below(torch.full_like(self.complement, -TINY))
        # M(0) on the complement of 1: the sign of sum p^2 / w; a zero among the w leaves just their own signs.
        total = torch.where(self.probs > 0, self.probs / self.signs, 0.0).sum(1)
        zero = ((self.signs == 0) & (self.probs > 0)).any(1)
        return (self.signs < 0).sum(1) - (~zero & ~(total > 0)).long()

    def count_below(self, y: Tensor) -> Tensor:
        """Number of eigenvalues below y, (n,) int64. y: (n, 1)."""
        _, core, below = self._resolvent(y)
        a, b, c = core
        return below + (a < 0).long() + (c - b * (b / a) < 0).long() - 1

    def lowest(self) -> Tensor:
        """The lowest eigenvalue, (n,), by bisection on the inertia; 0 where it underflows."""
        bend = self.weights.clamp(max=0.0) * (1 - 2 * self.probs + self.probs.square().sum(1, keepdim=True))
        bound = -bend.sum(1, keepdim=True)  # w_i (e_i - p)(e_i - p)^T, summed over the negative w_i
        rayleigh = self.diagonal().min(dim=1, keepdim=True).values
        negative = (self.negative_count() > 0)[:, None]
        if self.ridge is not None:
            bound = bound - self.ridge.min(dim=1, keepdim=True).values.clamp(max=0.0)
        # y = side * s with s > 0; s is bracketed, and `count > 0` holds on one side of it.
        side = torch.where(negative, -1.0, 1.0).double()
        near = torch.where(negative, (-rayleigh).clamp(min=TINY) * (1 - 4 * EPS), TINY)
        far = torch.where(negative, bound * (1 + 4 * EPS) + TINY, rayleigh.clamp(min=TINY) * (1 + 4 * EPS))
        far = torch.maximum(far, near)
        if self.ridge is None:
            near, far = torch.where(negative, near, 0.0), torch.where(negative, far, 0.0)
        for _ in range(BISECTIONS):
            if bool((far - near <= 2 * EPS * near).all()):
                break
            middle = torch.where(far > 16 * near, (near * far).sqrt(), (near + far) / 2)
            reached = (self.count_below(side * middle) > 0)[:, None]  # the lowest eigenvalue lies below side * middle
            outward = reached == negative
            near, far = torch.where(outward, middle, near), torch.where(outward, far, middle)
        found = side * (near + far) / 2
        return torch.where(found.abs() <= 4 * TINY, 0.0, found).squeeze(1)

    def solve(self, y: Tensor, right: Tensor) -> Tensor:
        """(H - y)^-1 right, (n, V), by the Woodbury identity. y: (n, 1), no eigenvalue. right: (n, V)."""
        inverse, (a, b, c), _ = self._resolvent(y)
        part = right * inverse
        first, second = (self.probs * part).sum(1), (self.weights * part).sum(1)
        determinant = a * c - b * b
        one = ((c * first - b * second) / determinant)[:, None]
        two = ((a * second - b * first) / determinant)[:, None]
        return part + inverse * (self.probs * one + self.weights * two)

    def _resolvent(self, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        """(1 / g, the three entries of M(y), #{g < 0})."""
        ridge = 0.0 if self.ridge is None else self.ridge
        gap = self.weights + ridge - y
        gap = torch.where(gap == 0, TINY, gap)
        inverse = 1 / gap
        scaled = self.probs * inverse
        a = -(self.probs * scaled).sum(1)
        if self.ridge is None:
            b, c = -y.squeeze(1) * scaled.sum(1), -y.squeeze(1) * (self.weights * inverse).sum(1)
        else:
            b, c = (scaled * (self.ridge - y)).sum(1), (self.weights * inverse * (self.ridge - y)).sum(1)
        return inverse, (torch.where(a == 0, TINY, a), b, c), (gap < 0).sum(1)
