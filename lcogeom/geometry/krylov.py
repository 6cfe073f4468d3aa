"""An orthonormal basis grown by products with one symmetric operator, and the operator as it looks inside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]
"""x (size,) -> H x (size,), on x's device, H symmetric."""

ASYMMETRY = 1e-2  # of the operator's size: rounding of float32 products stays 100 times below
BREAKDOWN = 32  # rounding units of the operator's size: less than that left of a product is rounding, not direction


def orthogonalised(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """x without its part in the basis, and the coefficients of that part.

    Args:
        x: (..., V).
        basis: (..., K, V), orthonormal rows.

    Returns:
        (remainder (..., V), coefficients (..., K)).
    """
    remainder, total = x, x.new_zeros(basis.shape[:-1])
    for _ in range(2):  # once leaves what rounding put back
        coefficients = (basis @ remainder.unsqueeze(-1)).squeeze(-1)
        remainder = remainder - (coefficients.unsqueeze(-2) @ basis).squeeze(-2)
        total = total + coefficients
    return remainder, total


class KrylovBasis:
    """Chains of vectors, each begun with a vector of the caller's and extended by Lanczos.

    Every new vector is orthogonalised twice against all earlier ones, so none returns as a copy made by rounding (a
    "ghost"). Several chains hold what one cannot see: the further eigenvectors of a repeated eigenvalue. A chain is
    closed where its product lies inside the basis; an open one may be left for another and extended later.

    Memory: `steps` x size numbers of `dtype`, and a vector for each open chain.
    """

    def __init__(
        self, matvec: Matvec, size: int, steps: int, *, dtype: torch.dtype, device: str | torch.device
    ) -> None:
        self.matvec, self.size = matvec, size
        self.vectors = torch.empty(min(steps, size), size, dtype=dtype, device=device)
        self.count = 0
        self.norm = 0.0
        """Largest ||H q|| seen: a lower bound of ||H||."""
        self.open: dict[int, float] = {}
        """Last vector of each open chain -> norm of that part of its product which was outside the basis."""
        self.starts: list[int] = []
        """First vector of each chain."""
        self._rest: dict[int, Tensor] = {}  # these parts
        self._projected = torch.zeros(len(self.vectors), len(self.vectors), dtype=torch.float64)  # column j: of H q_j

    @property
    def full(self) -> bool:
        """No room for another vector."""
        return self.count == len(self.vectors)

    @property
    def newest(self) -> int:
        """The vector taken last."""
        return self.count - 1

    def begin(self, start: Tensor) -> None:
        """Begin a chain, with one product. start: (size,), not inside the basis. Raises as `extend`."""
        self.starts.append(self.count)
        vector = start.to(self.vectors)
        if self.count:
            vector, _ = orthogonalised(vector / norm(vector), self.vectors[: self.count])
        self._take(vector / norm(vector), after=None)

    def extend(self, last: int) -> None:
        """Take the next vector of the open chain that ends in `last`, with one product; or close it without.

        Raises:
            TypeError, ValueError: the product is no tensor of the right shape and device, or not finite; the operator
                turns out not to be symmetric.
        """
        rest = self._rest[last]
        if last != self.newest:
            rest, _ = orthogonalised(rest, self.vectors[: self.count])
            self._leave(last, rest)
        if last in self.open:
            self._take(rest / self.open[last], after=last)

    def _take(self, vector: Tensor, after: int | None) -> None:
        at = self.count
        self.vectors[at] = vector
        self.count = at + 1
        product = self.product(self.vectors[at])
        self.norm = max(self.norm, norm(product))
        rest, coefficients = orthogonalised(product, self.vectors[: self.count])
        self._projected[: self.count, at] = coefficients.to("cpu", torch.float64)
        self._require_symmetric(at, after)
        if after is not None:
            del self.open[after], self._rest[after]
        self._leave(at, rest)

    def _leave(self, last: int, rest: Tensor) -> None:
        """Note what a chain's next vector will be made of; close the chain where that is rounding."""
        self._rest[last], self.open[last] = rest, norm(rest)
        if self.open[last] <= BREAKDOWN * torch.finfo(rest.dtype).eps * self.norm:
            del self._rest[last], self.open[last]

    def product(self, x: Tensor) -> Tensor:
        """H x, checked. x: (size,), kept from the matvec's hands by a copy."""
        result = self.matvec(x.clone())
        if not isinstance(result, Tensor):
            raise TypeError(
                f"matvec: returned a {type(result).__name__}; it must return a tensor of shape ({self.size},)."
            )
        if result.shape != x.shape:
            raise ValueError(f"matvec: returned shape {tuple(result.shape)}; must be ({self.size},), as its argument.")
        if result.device != x.device:
            raise ValueError(f"matvec: returned a tensor on {result.device}; pass device={str(result.device)!r}.")
        if not torch.isfinite(result).all():
            raise ValueError(
                f"matvec: a product holds a NaN or an infinity ({int((~torch.isfinite(result)).sum())} of {self.size} "
                f"entries, product {self.count}). Check the loss and its gradient at these parameters first."
            )
        return result.detach().to(x.dtype)

    def ritz(self, first: int = 0) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Eigenpairs of the projected operator.

        Args:
            first: leave out the vectors before this one: then of the operator between their complement and itself.

        Returns:
            (values (m,) ascending, eigenvectors (m, m) as columns; and for each open chain its part (m,) in
            ||H x - y x||, which is at most the sum of the parts), float64 on the CPU.
        """
        upper = self._projected[first : self.count, first : self.count].triu()
        values, shapes = torch.linalg.eigh(upper + upper.triu(1).T)
        return (
            values,
            shapes,
            {last: left * shapes[last - first].abs() for last, left in self.open.items() if last >= first},
        )

    def _require_symmetric(self, at: int, after: int | None) -> None:
        """Compare q_i^T H q_j with q_j^T H q_i: known of i = `after`, else 0 unless i's chain was left for another."""
        known = torch.zeros(at, dtype=torch.float64)
        if after is not None:
            known[after] = self.open[after]
        gap = (self._projected[:at, at] - known).abs()
        gap[[last for last in self.open if last != after]] = 0.0
        if at and gap.max() > ASYMMETRY * self.norm:
            raise ValueError(
                f"matvec: not symmetric: u^T H v and v^T H u differ by {gap.max() / self.norm:.1e} of ||H||. The same "
                "loss, data and random numbers (dropout!) must enter every product; compute it in float32 or better."
            )


def require_operator(size: int, steps: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless a basis of so many vectors can be made."""
    for name, number in (("size", size), ("steps", steps)):
        if number < 1:
            raise ValueError(f"{name}: {number}; must be at least 1.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: {dtype}; must be torch.float32 or torch.float64.")


def norm(x: Tensor) -> float:
    """Euclidean norm, in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))
