"""The density of a large symmetric operator's eigenvalues from products alone: stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.geometry.krylov import KrylovBasis, Matvec, require_operator

POINTS = 513
WIDTH = 0.01  # of the range of the nodes
MARGIN = 4  # widths that a grid reaches beyond the outermost nodes
PROBES = ("rademacher", "gaussian")


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """Where the eigenvalues of H lie, as P probes saw it; tensors are float64 on the CPU.

    Probe v, a unit vector, sees the measure sum_i (v . x_i)^2 delta(y - y_i) over the eigenpairs, of which `nodes` and
    `weights` are the Gauss quadrature; its mean over random v is the distribution of the eigenvalues. Standard errors
    are over probes: NaN of a single one, and rather short of few probes where few eigenvalues dominate. Beside them
    stands what the quadrature leaves open, as bounds.
    """

    size: int
    nodes: Tensor
    """(P, M), ascending for each probe."""
    weights: Tensor
    """(P, M), >= 0, sum 1 for each probe; 0 where a probe needed fewer than M nodes."""
    exact: Tensor
    """(P,) bool: the probe's Krylov space was invariant, its nodes are eigenvalues and its measure is known exactly."""
    grid: Tensor
    """(G,), in the unit of the eigenvalues."""
    width: float
    """Standard deviation of the Gaussian that smooths `density`, in the same unit."""

    @property
    def density(self) -> tuple[Tensor, Tensor]:
        """(share of eigenvalues per unit, convolved with the Gaussian; its standard error), (G,) each, on the grid."""
        return _over_probes(torch.stack([self._smoothed(probe) for probe in range(len(self.nodes))]))

    def cumulative(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The share of the eigenvalues <= x; no smoothing is in it.

        At x between two neighbouring nodes a probe's measure may differ from the quadrature's by their two weights, not
        more (Chebyshev, Markov and Stieltjes): `lowest` and `highest` are what that leaves, meaned over the probes.

        Args:
            x: (G,).

        Returns:
            (share, its standard error, lowest, highest), (G,) each.
        """
        x = x.to(self.nodes)
        below = (self.nodes[:, None] <= x[:, None]).sum(2)  # (P, G): nodes up to x
        sums = torch.cat([torch.zeros(len(self.nodes), 1, dtype=torch.float64), self.weights.cumsum(1)], dim=1)
        slack = (~self.exact).long()[:, None]
        low = sums.gather(1, (below - slack).clamp(min=0))
        high = sums.gather(1, (below + slack).clamp(max=self.nodes.shape[1]))
        share, error = _over_probes(sums.gather(1, below))
        return share, error, low.mean(0), high.mean(0)

    def mean(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """(mean of a function over the eigenvalues, trace(f(H)) / size; its standard error).

        function: (P, M) -> (P, M), elementwise. Polynomials of degree up to 2 M - 1 meet no quadrature error:
        `mean(lambda y: y)` is trace / size, `mean(torch.square)` the squared Frobenius norm / size.
        """
        value, error = _over_probes((self.weights * function(self.nodes)).sum(1))
        return float(value), float(error)

    def on(self, grid: Tensor, width: float) -> SpectralDensity:
        """The same, smoothed with another width on another grid; needs no product."""
        if not 0 < width < float("inf"):
            raise ValueError(f"width: {width}; must be a finite number > 0.")
        return SpectralDensity(self.size, self.nodes, self.weights, self.exact, grid.to(self.nodes), float(width))

    def _smoothed(self, probe: int) -> Tensor:
        distance = (self.grid[:, None] - self.nodes[probe]) / self.width  # (G, M)
        return (self.weights[probe] * torch.exp(-distance.square() / 2)).sum(1) / (self.width * (2 * torch.pi) ** 0.5)


def spectral_density(
    matvec: Matvec,
    size: int,
    *,
    probes: int = 8,
    steps: int = 64,
    kind: str = "rademacher",
    grid: Tensor | None = None,
    width: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> SpectralDensity:
    """The distribution of the eigenvalues of a symmetric operator, with standard errors.

    Stochastic Lanczos quadrature (Lin, Saad and Yang, SIAM Review 58, 2016; Ghorbani, Krishnan and Xiao, 2019), every
    basis fully reorthogonalised, so that no eigenvalue is counted twice. Errors fall as 1 / sqrt(probes * size);
    details are resolved to about the range / steps.

    Time: probes * steps products. Memory: one probe's basis, steps * size numbers of `dtype`.

    Args:
        matvec: x (size,) -> H x (size,), both of `dtype` on `device`, H symmetric and the same in every call.
        size: number of rows of H.
        probes: random vectors; at least 2 for error bars.
        steps: nodes for each.
        kind: `rademacher` (signs) or `gaussian` (normalised: uniform on the sphere). Both are unbiased; on a diagonal
            matrix signs have no error at all.
        grid: (G,), where to take the density; None: 513 points over all nodes and 4 widths beyond.
        width: of the Gaussian that smooths it; None: 1 % of the range of the nodes.
        dtype: float32 or float64, of the basis.
        seed: of the probes; the global generators are left as they are.

    Raises:
        ValueError: arguments out of range; a product of the wrong shape or device, or with a NaN or an infinity; an
            operator that is visibly not symmetric (1 % of its size, in the directions explored).
        TypeError: matvec returns no tensor.
    """
    require_operator(size, steps, dtype)
    if probes < 1:
        raise ValueError(f"probes: {probes}; must be at least 1, and 2 for error bars.")
    if kind not in PROBES:
        raise ValueError(f"kind: {kind!r}; must be 'rademacher' or 'gaussian'.")

    rng = torch.Generator().manual_seed(seed)
    nodes = torch.zeros(probes, min(steps, size), dtype=torch.float64)
    weights, exact = torch.zeros_like(nodes), torch.zeros(probes, dtype=torch.bool)
    for probe in range(probes):
        if kind == "rademacher":
            start = torch.randint(2, (size,), generator=rng).to(dtype) * 2 - 1
        else:
            start = torch.randn(size, generator=rng, dtype=dtype)
        basis = KrylovBasis(matvec, size, steps, dtype=dtype, device=device)
        basis.begin(start)
        while basis.open and not basis.full:
            basis.extend(basis.newest)
        values, shapes, _ = basis.ritz()
        found = len(values)
        nodes[probe, :found], nodes[probe, found:] = values, values[-1]
        weights[probe, :found] = shapes[0].square()
        exact[probe] = not basis.open

    low, high = float(nodes.min()), float(nodes.max())
    if width is None:
        width = WIDTH * (high - low or abs(high) or 1.0)
    if grid is None:
        grid = torch.linspace(low - MARGIN * width, high + MARGIN * width, POINTS, dtype=torch.float64)
    return SpectralDensity(size, nodes, weights, exact, grid, width).on(grid, width)


def _over_probes(values: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, standard error of the mean) over the first dimension."""
    count = len(values)
    spread = values.std(0) if count > 1 else torch.full_like(values[0], torch.nan)
    return values.mean(0), spread / count**0.5
