"""Which tokens of an update are looked at, and how they are held until then."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from lcogeom.objectives import TokenBatch

THREADS_SHARE = 2**15  # elements from which on torch divides one copy among its threads


@dataclass(frozen=True, eq=False)
class Rows:
    """Some tokens' rows of what a tap saw, (B, T', d or V), not copied before they are needed."""

    source: Tensor
    sequence: Tensor
    place: Tensor
    """Of the M rows, int64."""

    def __getitem__(self, rows: Tensor | slice) -> Rows:
        return Rows(self.source, self.sequence[rows], self.place[rows])

    @property
    def shape(self) -> tuple[int, int]:
        """(M, d or V)."""
        return len(self.sequence), self.source.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def gather(self) -> Tensor:
        """(M, d or V)."""
        return self.source[self.sequence, self.place]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Completion tokens of one backward pass, still as the tap saw them."""

    values: Rows | Tensor
    """Hidden states (M, d) or logits (M, V)."""
    gradients: Rows | Tensor
    """Gradient of the loss with respect to `values`, in the units in which it was back-propagated."""
    sequence: Tensor
    position: Tensor
    actions: Tensor
    """(M,) int64 each."""
    weight: Tensor
    """(M,) float64: how many tokens each stands for."""
    factor: Tensor
    """(M,) float64: what the loss was multiplied by before it was back-propagated."""
    batch: TokenBatch | None
    """What batch() said of the same tokens."""

    def __getitem__(self, rows: Tensor) -> Candidates:
        present = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **{name: value[rows] for name, value in present.items()})

    def gathered(self) -> Candidates:
        """The same with rows of their own: what the tap saw can be let go."""
        return replace(self, values=own(self.values), gradients=own(self.gradients))


def own(rows: Rows | Tensor) -> Tensor:
    """The rows themselves, (M, d or V)."""
    return rows.gather() if isinstance(rows, Rows) else rows


def rows_of(values: Rows | Tensor, rows: slice, memory: Tensor) -> Tensor:
    """Some of the rows, (m, d or V): views of a tensor, else copied into `memory`, (m, d or V), as its dtype."""
    if isinstance(values, Tensor):
        return values[rows]
    if values.source.is_contiguous() and values.dtype == memory.dtype:
        place = values.sequence[rows] * values.source.shape[1] + values.place[rows]
        pieces = _pieces(memory.shape[1])
        within = torch.arange(pieces, device=place.device)
        torch.index_select(
            values.source.view(-1, memory.shape[1] // pieces),
            0,
            (place[:, None] * pieces + within).flatten(),
            out=memory.view(len(place) * pieces, -1),
        )
        return memory
    return memory.copy_(values[rows].gather())


@lru_cache
def _pieces(width: int) -> int:
    """Equal parts of a row that torch copies without sharing each out among threads, which takes three times as long;
    it shares out the parts then. 1 where a width has no few such parts."""
    return next((n for n in range(1, 65) if width % n == 0 and width // n < THREADS_SHARE), 1)


def choose(sizes: list[Tensor], budget: int, rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """At most `budget` tokens of several groups: half those of the largest size, half a uniform sample of the rest.

    The sampled ones stand for those left out as well, so weighted sums over the result are unbiased.

    Args:
        sizes: of the gradient at each token, (M_i,) for each group.

    Returns:
        For each group: (the rows kept, by what their weight grows).
    """
    counts = [len(size) for size in sizes]
    joined = torch.cat(sizes)
    growth = torch.ones(len(joined), dtype=torch.float64, device=joined.device)
    if len(joined) > budget:
        top = budget // 2
        order = joined.nan_to_num(nan=math.inf).argsort(descending=True)
        drawn = top + torch.randperm(len(joined) - top, generator=rng)[: budget - top]
        growth[order[top:]] = 0.0
        growth[order[drawn.to(order.device)]] = (len(joined) - top) / (budget - top)
    return [((part > 0).nonzero().squeeze(1), part[part > 0]) for part in growth.split(counts)]
