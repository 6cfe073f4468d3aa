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


def gathered_poles(values: Tensor, nearest: Tensor) -> Poles:
    """The poles `values`, (n, V) >= 0, for evaluations at |y| >= `nearest`, (n,) only. Overwrites `values`."""
    unit = (nearest / REACH).clamp(min=1e-300)
    if values.shape[1] < WORTHWHILE or values.device.type != "cpu":
        return Poles(values, unit, values.new_zeros(len(values), ORDER))
    parts = [_sorted_out(row, bound) for row, bound in zip(values, unit.tolist(), strict=True)]
    heads = torch.nn.utils.rnn.pad_sequence([head for head, _ in parts], batch_first=True)
    return Poles(heads, unit, torch.stack([powers for _, powers in parts]))


def _sorted_out(values: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """(the poles above `unit` (K,), the power sums of the rest (ORDER,)) of one token. Overwrites `values`, (V,)."""
    whole = len(values) // CHUNK * CHUNK
    table, rest = values[:whole].view(-1, CHUNK), values[whole:].clone()
    # Comparing every value would cost more than all power sums.
    picked = table.index_select(0, (table.amax(1) > unit).nonzero().squeeze(1))
    head = picked[picked > unit]
    one = values[:whole].mul_(1 / unit).clamp_(max=1.0)
    two = one * one
    three, four = two * one, two * two
    pairs = ((one, one), (one, two), (two, two), (two, three), (three, three), (three, four), (four, four))
    powers = torch.stack([one.sum(), *(torch.dot(a, b) for a, b in pairs)])
    # Clamping left a 1 of each pole of the head, whose own terms are larger than what rounds here.
    return torch.cat([head, rest]), powers - len(head)


def stacked_poles(parts: list[Poles]) -> Poles:
    """The poles of several blocks of tokens as one."""
    width = max(part.head.shape[1] for part in parts)
    heads = [torch.nn.functional.pad(part.head, (0, width - part.head.shape[1])) for part in parts]
    return Poles(torch.cat(heads), torch.cat([part.unit for part in parts]), torch.cat([part.powers for part in parts]))
