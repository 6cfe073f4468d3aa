"""A linear sketch: a vector of any length in `size` numbers that keep its inner products with others.

The concatenated tensors are cut into blocks of `length` consecutive elements. Block b is multiplied by fixed signs tau
(one for each place in a block), rotated by s_b, multiplied by a sign, and added to the others:

    buffer[(i + s_b) mod length] += sign_b tau_i x[b, i]

At the end the `length` places are dealt at random to the `size` numbers, equally many to each, and added up. So two
elements meet with probability 1 / size or a little less, as in a count sketch (Charikar, Chen and Farach-Colton 2002),
but a block costs one sequential pass instead of a hash of every element. `length` is what passes fastest.
Rotations are drawn without replacement among `length` blocks, a group: were two blocks rotated alike, tau would cancel
between them, and vectors that repeat themselves would double the variance. The next group has a tau of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SIZE = 16384
"""64 KiB of float32: cosines to 0.008."""
BLOCK = 2**15  # elements of a block, at least: buffer, tau and block stay in the cache, no second thread is woken up
FEW = 64  # blocks; their sums lose in float32 at most six times what rounding has cost float32 weights already
PIECE, GPU_PIECE = 2**18, 2**21  # elements copied at once where a copy is needed; on a GPU few launches count more


def sketch(tensors: Sequence[Tensor] | Tensor, size: int = SIZE, seed: int = 0) -> Tensor:
    """A fixed-seed linear sketch of the concatenation of some tensors, for inner products and cosines.

    sketch(a x + b y) = a sketch(x) + b sketch(y) up to rounding. Which number an element goes to, and with which sign,
    depends on its place in the concatenation, `size` and `seed` alone: not on the device, the precision, nor on where
    one tensor ends. So sketches of gradients, steps and weights of one model are comparable, whenever they were taken.

    Error, over seeds: the inner product of two sketches is unbiased with

        variance <= (|x|^2 |y|^2 + <x, y>^2) / (size - 1)   (up to terms in 1 / size^2),

    and the cosine of two sketches has a standard error of at most (1 - cos^2) / sqrt(size), up to terms in 1 / size:
    0.008 for 16384 numbers (`sketch_cosines`). Dividing by exact norms instead would make it sqrt(1 + cos^2) /
    sqrt(size), which is larger.

    Args:
        tensors: one or more, of any shape, floating point; sparse tensors are refused. Any of them may lie on another
            device than the first.
        size: how many numbers to keep.
        seed: of signs and rotations, in [0, 2^64).

    Returns:
        (size,) float32 on the first tensor's device. Beside it a few MiB are allocated (on a GPU 50), never a copy of
        the tensors, contiguous or not.

    Raises:
        ValueError: no tensor, or a `size` or `seed` out of range.
        TypeError: something that is not a floating-point, dense tensor.
    """
    given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not given:
        raise ValueError("tensors: there are none; give at least one.")
    total: LinearSketch | None = None
    start = 0
    for place, tensor in enumerate(given):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            kind = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"tensors: number {place} is {kind}; must be a dense floating-point tensor.")
        total = total or LinearSketch(size, seed, tensor.device)
        total.add(tensor, start)
        start += tensor.numel()
    assert total is not None
    return total.result()


class LinearSketch:
    """A sketch that is added up from stretches of a vector, in any order. Waits for no device.

    On the CPU it remembers where each stretch goes: one that is cleared and used again costs little but the arithmetic.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        few: torch.dtype = torch.float32,
    ) -> None:
        """dtype: in which it is added up. Weights that change by a rounding of themselves need float64.

        few: in which a few blocks are: float32 costs half, and is enough for what comes in float32 or less.
        """
        size, seed = operator.index(size), operator.index(seed)
        if size < 2:
            raise ValueError(f"size: {size}; must be at least 2.")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: {seed}; must be in [0, 2^64).")
        self._size, self._seed, self._device = size, seed, torch.device(device)
        self._length = size * -(-BLOCK // size)
        self._piece = max(self._length, PIECE if self._device.type == "cpu" else GPU_PIECE)
        self._sum = torch.empty(2 * self._length, dtype=dtype, device=device)  # rotated blocks run over the end
        self._plans: dict[tuple[int, int], list[_Plan]] = {}
        direct = few == dtype or self._device.type != "cpu"
        self._few = self._sum if direct else torch.empty(2 * self._length, dtype=few, device=device)
        # In halves: whole, they would wake up a second thread.
        self._halves, self._few_halves = self._sum.split(self._length), self._few.split(self._length)
        self._blocks = 0  # added up in `few`
        self.clear()

    def clear(self) -> None:
        """Begin again with zeros."""
        torch._foreach_zero_(self._halves)
        if self._few is not self._sum:
            torch._foreach_zero_(self._few_halves)
        self._blocks = 0

    def add(self, tensor: Tensor, start: int) -> None:
        """Add the elements [start, start + tensor.numel()) of the vector."""
        add = self._add_blocks if self._device.type == "cpu" else self._add_indexed
        for values in _flat_parts(tensor.detach(), self._piece):
            add(values.to(self._device), start)
            start += values.numel()

    def result(self) -> Tensor:
        """(size,)."""
        self._settle()
        places = _deal(self._length, self._seed, self._device)
        return torch.add(*self._halves).index_select(0, places).view(-1, self._size).sum(0)

    def _add_blocks(self, values: Tensor, start: int) -> None:
        """All blocks in one call: it needs no GIL."""
        stretch, most = (start, values.numel()), self._length * (self._length if self._few is self._sum else FEW)
        if stretch not in self._plans:
            self._plans[stretch] = [self._plan(*some) for some in self._within_groups(*stretch, most)]
        for plan in self._plans[stretch]:
            pieces = values[plan.first : plan.last].split_with_sizes(plan.lengths)
            torch._foreach_addcmul_(plan.into, pieces, plan.taus, plan.signs)
            self._blocks += len(pieces)
            if self._blocks >= FEW:
                self._settle()

    def _settle(self) -> None:
        if self._few is self._sum or not self._blocks:
            return
        torch._foreach_add_(self._halves, self._few_halves)
        torch._foreach_zero_(self._few_halves)
        self._blocks = 0

    def _plan(self, first: int, last: int, group: int, place: int) -> _Plan:
        """For the elements [first, last) of a tensor, which begin at that place of that group."""
        size, count = self._length, last - first
        block, inside = divmod(place, size)
        lengths = [min(size - inside, count)]
        lengths += [size] * ((count - lengths[0]) // size)
        if rest := count - sum(lengths):
            lengths.append(rest)
        _, *drawn = _draws(size, self._seed, group)
        starts, signs = (some[block : block + len(lengths)].tolist() for some in drawn)
        starts[0] += inside
        into = [self._few[begin : begin + length] for begin, length in zip(starts, lengths, strict=True)]
        tau = _draws(size, self._seed, group)[0]
        taus = [tau] * len(lengths)
        taus[-1] = tau[: lengths[-1]]
        taus[0] = tau[inside : inside + lengths[0]]
        return _Plan(first, last, lengths, into, taus, signs)

    def _within_groups(self, start: int, count: int, most: int) -> Iterator[tuple[int, int, int, int]]:
        """(first, last, group, place in it) of parts of `count` elements, at most so many each."""
        first = 0
        while first < count:
            group, place = divmod(start + first, self._length**2)
            last = min(count, first + most, first + self._length**2 - place)
            yield first, last, group, place
            first = last

    def _add_indexed(self, values: Tensor, start: int) -> None:
        """The same by indices: on a GPU a call for each block costs more."""
        size, device = self._length, self._device
        for first, last, group, place in self._within_groups(start, values.numel(), self._piece):
            block, inside = divmod(place, size)
            blocks = -(-(inside + last - first) // size)
            tau, *drawn = _draws_on(size, self._seed, group, device)
            rotations, signs = (some[block : block + blocks, None] for some in drawn)
            signed = torch.zeros(blocks, size, dtype=self._sum.dtype, device=device)
            signed.view(-1)[inside : inside + last - first] = values[first:last]
            signed *= tau * signs
            source = torch.arange(size, device=device).sub(rotations).remainder_(size)  # (blocks, size)
            self._sum[:size] += signed.gather(1, source).sum(0)


@dataclass(frozen=True, eq=False)
class _Plan:
    """Where the blocks of the elements [first, last) of a tensor go."""

    first: int
    last: int
    lengths: list[int]
    into: list[Tensor]
    taus: list[Tensor]
    signs: list[int]


def _flat_parts(tensor: Tensor, most: int) -> Iterator[Tensor]:
    """The elements in order as flat tensors: views where the tensor is contiguous, else copies of at most `most`."""
    if tensor.is_contiguous() or tensor.numel() <= most:
        yield tensor.reshape(-1)
    elif tensor[0].numel() > most:
        for row in tensor:
            yield from _flat_parts(row, most)
    else:
        for rows in tensor.split(max(1, most // tensor[0].numel())):
            yield rows.reshape(-1)


@lru_cache(maxsize=64)
def _draws(length: int, seed: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one group, (length,) each: tau, float32; rotation of each block, a permutation, int64; its sign, int64."""
    words = _words(3 * length, seed, group).reshape(3, length)
    tau, signs = ((some >> np.uint64(63)).astype(np.int64) * 2 - 1 for some in words[::2])
    return torch.from_numpy(tau.astype(np.float32)), _permutation(words[1]), torch.from_numpy(signs)


@lru_cache(maxsize=64)
def _draws_on(length: int, seed: int, group: int, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(drawn.to(device) for drawn in _draws(length, seed, group))


@lru_cache(maxsize=64)
def _deal(length: int, seed: int, device: torch.device) -> Tensor:
    """(length,) int64: the place in a block that is added to number `k mod size`, for each k."""
    return _permutation(_words(length, seed, stream=2**64 - 1)).to(device)  # a stream that no group reaches


def _words(count: int, seed: int, stream: int) -> np.ndarray:
    # NumPy promises that the raw words of a bit generator never change; its samplers, and torch's, may.
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(count)


def _permutation(words: np.ndarray) -> Tensor:
    return torch.from_numpy(np.argsort(words, kind="stable"))


def standard_error(cosine: np.ndarray, size: int) -> np.ndarray:
    """Of the cosine of two sketches: (1 - cos^2) / sqrt(size), at the cosine found."""
    return (1 - np.square(cosine)) / math.sqrt(size)
