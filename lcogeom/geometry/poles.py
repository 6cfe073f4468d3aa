"""sum_i p_i / (p_i - y) over many small p_i: the likely tokens one by one, all others through their power sums.

For p <= y / REACH the geometric series p / (p - y) = -sum_k (p / y)^k, cut after ORDER terms, is exact to
REACH^-ORDER = 1e-17 of its first term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REACH = 128.0
ORDER = 8
CHUNK = 16
WORTHWHILE = 4096  # coordinates from which, on a CPU, sorting them out costs less than carrying them along

Columns = tuple[Tensor, Tensor, Tensor]
"""Rows (n, V) as tables (n, CHUNK, V // CHUNK), the largest of each column (n, V // CHUNK), and what is left over."""


@dataclass(frozen=True, eq=False)
class Poles:
    """The poles of n tokens."""

    head: Tensor
    """Those that enter one by one, (n, K), filled up with 0, which adds no term."""
    unit: Tensor
    """The largest pole that may be left to the power sums, (n,)."""
    powers: Tensor
    """sum (p / unit)^k over the rest, k = 1 .. ORDER, (n, ORDER)."""

    def rows(self, some: Tensor) -> Poles:
        """The same for some of the tokens."""
        return self if len(some) == len(self.unit) else Poles(self.head[some], self.unit[some], self.powers[some])

    def sums(self, y: Tensor, second: bool) -> tuple[Tensor, Tensor]:
        """(sum p / (p - y), sum p^2 / (p - y)), (n,) each; the latter is 0 unless `second`.

        y: (n,), no pole, and |y| >= REACH unit.
        """
        ratio = self.head / (self.head - y[:, None])
        x = self.unit / y
        tail = self.powers[:, ORDER - 1]
        for k in range(ORDER - 2, -1, -1):
            tail = torch.addcmul(self.powers[:, k], tail, x)
        one = ratio.sum(1) - tail * x
        if not second:
            return one, torch.zeros_like(one)
        # One term less than above, of a sum that is 1 / REACH of it.
        tail = self.powers[:, ORDER - 1]
        for k in range(ORDER - 2, 0, -1):
            tail = torch.addcmul(self.powers[:, k], tail, x)
        return one, (ratio * self.head).sum(1) - tail * x * self.unit

    def mass_at(self, pole: Tensor) -> Tensor:
        """Sum of the poles that equal `pole`, (n,)."""
        return torch.where(self.head == pole[:, None], self.head, 0.0).sum(1)


def sorted_columns(values: Tensor) -> Columns | None:
    """The rows of `values`, (n, V), by columns; None where these are not worth while."""
    if values.shape[1] < WORTHWHILE or values.device.type != "cpu":
        return None
    width = values.shape[1] // CHUNK
    table = values[:, : CHUNK * width].view(len(values), CHUNK, width)
    return table, table.amax(1), values[:, CHUNK * width :]


def two_largest(values: Tensor, columns: Columns | None) -> Tensor:
    """The two largest of each row of (n, V), (n, 2), in falling order."""
    if columns is None:
        return values.topk(2, dim=1).values
    table, tops, rest = columns
    where = tops.topk(2, dim=1).indices  # the columns that hold them
    kept = table.gather(2, where[:, None].expand(-1, CHUNK, -1)).flatten(1)
    return torch.cat([kept, rest], dim=1).topk(2, dim=1).values


def gathered_poles(values: Tensor, columns: Columns | None, scale: Tensor, nearest: Tensor) -> Poles:
    """The poles values * scale, for evaluations at |y| >= nearest only.

    Args:
        values: (n, V) >= 0, overwritten.
        columns: `sorted_columns` of them.
        scale: (n, 1).
        nearest: (n,).
    """
    unit = (nearest / REACH).clamp(min=1e-300)
    if columns is None:
        return Poles(values.mul_(scale), unit, values.new_zeros(len(values), ORDER))
    table, tops, rest = columns
    least = unit[:, None] / scale
    large = tops > least  # comparing every value would cost more than all power sums
    heads, powers = [], []
    for row, bound in enumerate(least.squeeze(1).tolist()):
        ids = large[row].nonzero().squeeze(1)
        picked = table[row].index_select(1, ids)
        taken = picked > bound
        heads.append(torch.cat([picked[taken], rest[row]]))
        table[row].index_copy_(1, ids, picked.masked_fill_(taken, 0.0))
        rest[row].zero_()
        powers.append(_power_sums(values[row].mul_(1 / bound)))
    head = torch.nn.utils.rnn.pad_sequence(heads, batch_first=True)
    return Poles(head.mul_(scale), unit, torch.stack(powers))


def _power_sums(x: Tensor) -> Tensor:
    """sum x^k for k = 1 .. ORDER, (ORDER,). x: (V,), overwritten."""
    # Two arrays at a time: more would not stay in the cache.
    y = x * x
    sums = [x.sum(), x.dot(x), x.dot(y), y.dot(y)]
    x.mul_(y)
    sums += [x.dot(y), x.dot(x)]
    y.mul_(y)
    return torch.stack([*sums, x.dot(y), y.dot(y)])


def stacked_poles(parts: list[Poles]) -> Poles:
    """The poles of several blocks of tokens as one."""
    width = max(part.head.shape[1] for part in parts)
    heads = [torch.nn.functional.pad(part.head, (0, width - part.head.shape[1])) for part in parts]
    return Poles(torch.cat(heads), torch.cat([part.unit for part in parts]), torch.cat([part.powers for part in parts]))
