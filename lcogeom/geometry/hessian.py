"""The Hessian of a loss in the logits, for a batch of tokens, without ever forming V x V."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.geometry.convexity import negative_count
from lcogeom.geometry.projected import EPS, ProjectedDiagonal
from lcogeom.geometry.softmax import TokenDistribution, blocks, distributions, token_distribution
from lcogeom.geometry.spectrum import action_eigenvalue_range

DENSE_LIMIT = 4096
OFFSET = 2e-10  # of the shift of the inverse iteration from its eigenvalue
Cost = Callable[[Tensor, slice], Tensor]
"""(logits (n, V) float64, rows) -> c (n, V), up to a constant per row: that of the tokens `rows`."""


@dataclass(frozen=True, eq=False)
class ExtremeEigenvectors:
    """Both ends of each token's spectrum with their eigenvectors."""

    lowest: Tensor
    highest: Tensor
    """Eigenvalues, (N,)."""
    lowest_vectors: Tensor
    highest_vectors: Tensor
    """Unit eigenvectors, (N, V); of a repeated eigenvalue one of them, with residuals up to 1e-10."""
    residuals: Tensor
    """||H x - y x|| / max |eigenvalue| at the lowest and the highest end, (N, 2)."""


@dataclass(frozen=True, eq=False)
class LogitHessian:
    """N symmetric matrices V x V, one for each token, float64 (method.md, 2.1 to 2.4):

        fisher S + action u u^T + (Hessian of sum_j p_j c_j at fixed c) + diag(ridge)

    Holds the caller's logits and a few numbers per token; the softmax is taken again, block by block, by every method,
    each of which costs O(V) per token. Hessians of the same logits add, and scale by a number.
    """

    logits: Tensor
    """(N, V), any floating dtype; not copied."""
    actions: Tensor
    """a, (N,) integer."""
    fisher: Tensor
    """Weight of S, (N,) float64; -f' for an action objective."""
    action: Tensor
    """Weight of u u^T, (N,) float64; f'' for an action objective."""
    cost: Cost | None = None
    """c; None: no such term."""
    ridge: tuple[Tensor, Tensor] | None = None
    """(ids (N, K), values (N, K)) of the diagonal in the raw logits; repeated ids add up."""

    exact = True
    """Eigenvalues and inertia are those of the matrices, to rounding."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, V, V)."""
        tokens, vocab = self.logits.shape
        return tokens, vocab, vocab

    def __add__(self, other: LogitHessian) -> LogitHessian:
        if not isinstance(other, LogitHessian):
            return NotImplemented
        if self.logits is not other.logits and not torch.equal(self.logits, other.logits):
            raise ValueError("+: the two Hessians belong to different logits; build both from the same.")
        if not torch.equal(self.actions, other.actions):
            raise ValueError("+: the two Hessians belong to different actions; build both from the same batch.")
        first, second = self.cost, other.cost
        cost = first or second
        if first is not None and second is not None:
            cost = lambda z, rows: first(z, rows) + second(z, rows)  # noqa: E731
        ridge = self.ridge or other.ridge
        if self.ridge is not None and other.ridge is not None:
            ids, values = zip(self.ridge, other.ridge, strict=True)
            ridge = torch.cat(ids, dim=1), torch.cat(values, dim=1)
        fisher, action = self.fisher + other.fisher, self.action + other.action
        return LogitHessian(self.logits, self.actions, fisher, action, cost, ridge)

    def __mul__(self, factor: float) -> LogitHessian:
        cost = self.cost
        scaled = None if cost is None else (lambda z, rows: factor * cost(z, rows))
        ridge = None if self.ridge is None else (self.ridge[0], factor * self.ridge[1])
        return LogitHessian(self.logits, self.actions, factor * self.fisher, factor * self.action, scaled, ridge)

    __rmul__ = __mul__

    def __matmul__(self, x: Tensor) -> Tensor:
        """H x, token by token. x: (N, V), any floating dtype. Returns (N, V) float64."""
        self._require_like(x)
        result = torch.empty(x.shape, dtype=torch.float64, device=x.device)
        for rows, block in self._blocks():
            result[rows] = block.matvec(x[rows].double())
        return result

    def quadratic(self, x: Tensor) -> Tensor:
        """x^T H x, (N,) float64. x: (N, V)."""
        self._require_like(x)
        return self._filled(lambda rows, block: block.quadratic(x[rows].double()))

    def diagonal(self) -> Tensor:
        """The diagonals, (N, V) float64."""
        result = torch.empty(self.logits.shape, dtype=torch.float64, device=self.logits.device)
        for rows, block in self._blocks():
            result[rows] = block.diagonal()
        return result

    def trace(self) -> Tensor:
        """Sum of the eigenvalues, (N,) float64."""
        return self._filled(lambda _, block: block.diagonal().sum(1))

    def dense(self) -> Tensor:
        """The matrices themselves, (N, V, V) float64, symmetric.

        Raises:
            ValueError: V > 4096.
        """
        tokens, vocab, _ = self.shape
        require_dense(tokens, vocab)
        return torch.cat([block.dense() for _, block in self._blocks()])

    def negative_count(self) -> Tensor:
        """Number of negative eigenvalues, (N,) int64, exact."""
        if self._is_action:
            odds = torch.empty_like(self.fisher)
            for rows, some in distributions(self.logits, self.actions):
                odds[rows] = some.odds_against()
            return negative_count(-self.fisher, self.action, odds, self.shape[1])
        if self._is_diagonal:
            return torch.cat([(block < 0).sum(1) for block in self._ridges()])
        return self._filled(lambda _, block: block.negative_count()).long()

    def eigenvalue_range(self) -> tuple[Tensor, Tensor]:
        """(lowest, highest) eigenvalue, (N,) float64 each, exact to rounding.

        By one secular equation where S and u u^T are all there is, else by bisection on the inertia.
        """
        if self._is_action:
            return action_eigenvalue_range(self.logits, self.actions, -self.fisher, self.action)
        if self._is_diagonal:
            ends = [(block.min(dim=1).values, block.max(dim=1).values) for block in self._ridges()]
            return torch.cat([low for low, _ in ends]), torch.cat([high for _, high in ends])
        low, high = torch.empty_like(self.fisher), torch.empty_like(self.fisher)
        for rows, block in self._blocks():
            low[rows], high[rows] = block.lowest(), -block.negated().lowest()
        return low, high

    def extreme_eigenvectors(self) -> ExtremeEigenvectors:
        """Both extreme eigenpairs, by inverse iteration at the eigenvalues of `eigenvalue_range`; see `residuals`."""
        low, high = self.eigenvalue_range()
        size = torch.maximum(low.abs(), high.abs())
        vectors: list[tuple[Tensor, Tensor]] = []
        residuals: list[tuple[Tensor, Tensor]] = []
        for rows, block in self._blocks():
            ends = [_eigenvector(block, end[rows], size[rows]) for end in (low, high)]
            vectors.append((ends[0][0], ends[1][0]))
            residuals.append((ends[0][1], ends[1][1]))
        return ExtremeEigenvectors(
            low,
            high,
            torch.cat([first for first, _ in vectors]),
            torch.cat([second for _, second in vectors]),
            torch.cat([torch.stack(pair, dim=1) for pair in residuals]),
        )

    def is_convex(self) -> Tensor:
        """Whether the matrix is positive semi-definite, (N,) bool, exact."""
        return self.negative_count() == 0

    @property
    def _is_action(self) -> bool:
        return self.cost is None and self.ridge is None

    @property
    def _is_diagonal(self) -> bool:
        return self.cost is None and not bool((self.fisher != 0).any()) and not bool((self.action != 0).any())

    def _require_like(self, x: Tensor) -> None:
        if x.shape != self.logits.shape:
            raise ValueError(f"x: shape {tuple(x.shape)}, but this Hessian acts on {tuple(self.logits.shape)}.")

    def _ridges(self) -> Iterator[Tensor]:
        for rows in blocks(self.logits.shape, self.logits.device):
            ridge = self._ridge(rows)
            assert ridge is not None
            yield ridge

    def _ridge(self, rows: slice) -> Tensor | None:
        if self.ridge is None:
            return None
        ids, values = self.ridge[0][rows], self.ridge[1][rows].double()
        return values.new_zeros(len(ids), self.shape[1]).scatter_add_(1, ids, values)

    def _filled(self, function: Callable[[slice, ProjectedDiagonal], Tensor]) -> Tensor:
        """One number per token, (N,) float64, block by block."""
        result = torch.empty_like(self.fisher)
        for rows, block in self._blocks():
            result[rows] = function(rows, block).double()
        return result

    def _blocks(self) -> Iterator[tuple[slice, ProjectedDiagonal]]:
        for rows in blocks(self.logits.shape, self.logits.device):
            z = self.logits[rows].detach().double()
            some = token_distribution(z, self.actions[rows])
            c = None if self.cost is None else self.cost(z, rows)
            yield rows, _projected(some, self.fisher[rows], self.action[rows], c, self._ridge(rows))


def require_dense(tokens: int, vocab: int) -> None:
    """Raise ValueError where N matrices of V x V are more than anyone means to hold."""
    if vocab > DENSE_LIMIT:
        raise ValueError(
            f"dense: {tokens} matrices of {vocab} x {vocab} would take {tokens * vocab**2 * 8 / 2**30:.1f} GiB; "
            f"dense() stops at V = {DENSE_LIMIT}. Use H @ x, quadratic, diagonal, trace or negative_count."
        )


def _projected(
    some: TokenDistribution, fisher: Tensor, action: Tensor, cost: Tensor | None, ridge: Tensor | None
) -> ProjectedDiagonal:
    """w = p (fisher + c - p.c) + action e_a."""
    probs, chosen = some.probs, some.actions[:, None]
    heavy = probs.argmax(dim=1, keepdim=True)
    complement = probs.scatter(1, heavy, 0.0).sum(1, keepdim=True)
    signs = fisher[:, None].expand_as(probs)
    signs = signs.clone() if cost is None else signs + centred(probs, heavy, cost)
    weights = probs * signs
    pi, plain = probs.gather(1, chosen), signs.gather(1, chosen)
    # p_a (fisher + c_a) + action, which cancels near p_a = 1 for PPO
    at_action = torch.where(
        pi < 0.5, pi * plain + action[:, None], (plain + action[:, None]) - plain * some.complement[:, None]
    )
    signs.scatter_(1, chosen, torch.where(action[:, None] == 0, plain, at_action / pi))
    weights.scatter_(1, chosen, at_action)
    return ProjectedDiagonal(probs, weights, signs, ridge, heavy, complement)


def centred(probs: Tensor, heavy: Tensor, cost: Tensor) -> Tensor:
    """c - p.c, (n, V), relative to the heaviest coordinate: accurate on saturated tokens."""
    cost = cost - cost.gather(1, heavy)
    return cost - (probs * cost).sum(1, keepdim=True)


def _eigenvector(block: ProjectedDiagonal, value: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """(unit eigenvector (n, V), residual / size (n,)) at an eigenvalue, (n,)."""
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(block.probs.shape, generator=rng, dtype=torch.float64)  # drawn on the CPU on every device
    x = start.to(block.probs.device)
    y = value[:, None]
    # Each solution shrinks what lies outside the eigenspace by OFFSET over the relative distance of the next
    # eigenvalue; a smaller offset would leave fewer digits to the solve where the eigenvalue is repeated.
    least = torch.minimum(64 * EPS * size[:, None], 1e-3 * y.abs())  # what the largest entries round to
    offset = torch.where(y == 0, OFFSET * size[:, None], torch.maximum(OFFSET * y.abs(), least))
    shift = y - offset.clamp(min=1e-280)
    for _ in range(8):
        right = x
        x = block.solve(shift, right)
        x = x + block.solve(shift, right - (block.matvec(x) - shift * x))  # refined: near a pole the solve loses digits
        x = x / x.abs().amax(1, keepdim=True).clamp(min=1e-280)
        x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-280)
    if block.ridge is None:
        if x.shape[1] == 2:  # kappa [[1, -1], [-1, 1]]
            x = x.new_tensor([[1.0, -1.0]]).expand_as(x) / 2**0.5
        flat = (y == 0) & (size[:, None] >= 0)
        x = torch.where(flat, x.new_full((), x.shape[1] ** -0.5), x)
    residual = (block.matvec(x) - y * x).norm(dim=1) / size.clamp(min=1e-280)
    return x, torch.where(size == 0, 0.0, residual)


def action_hessian(logits: Tensor, actions: Tensor, d1: Tensor, d2: Tensor) -> LogitHessian:
    """f'' u u^T - f' S for action objectives (method.md, 2.1). d1 = f', d2 = f'', each (N,).

    The Fisher matrix S itself is `d1 = -1, d2 = 0`.
    """
    return LogitHessian(logits.detach(), actions.long(), -d1.double(), d2.double())


def diagonal_hessian(logits: Tensor, actions: Tensor, ids: Tensor, values: Tensor) -> LogitHessian:
    """A diagonal Hessian: `values` (N, K) at the coordinates `ids` (N, K), 0 elsewhere."""
    zero = torch.zeros(len(actions), dtype=torch.float64, device=logits.device)
    return LogitHessian(logits.detach(), actions.long(), zero, zero, ridge=(ids.long(), values.double()))
