"""What is recorded of the softmax at some tokens, in one pass over their logits that writes nothing of their size.

With top' the largest logit but the action's, w_j = exp(z_j - top') for j != a, and W = sum w, everything follows from
W, sum w^2 and sum w (z - top'), without cancellation at saturated tokens (method.md, sections 1 and 2.1):

    log odds against a = log W + top' - z_a      log pi = -log(1 + odds)      entropy = H(pi) + (1 - pi) H(w / W)
    u = e_a - p = (1 - pi) s                     s = e_a - w / W
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_CHUNK = 24_576  # elements worked on together: 192 KiB in float64, and torch wakes up no second thread for so few
GPU_CHUNK = 2**23
LOG2_E = math.log2(math.e)
LOWEST = -1e4  # exp of it is 0 in float64: logits of -inf count as such, without NaN


@dataclass(frozen=True, eq=False)
class SoftmaxSums:
    """Of N tokens, float64, (N,) each."""

    log_odds: Tensor
    """log((1 - pi) / pi)."""
    others_entropy: Tensor
    """Of w / W: the policy given that it does not take a."""
    others_squares: Tensor
    """sum (w / W)^2."""
    seen_along: Tensor | None
    """<g, s> for the gradients g handed over."""
    seen_squares: Tensor | None
    """<g, g>."""

    def logprobs(self) -> Tensor:
        """log pi."""
        return -torch.logaddexp(self.log_odds, torch.zeros_like(self.log_odds))

    def complement(self) -> Tensor:
        """1 - pi."""
        return torch.sigmoid(self.log_odds)

    def entropy(self) -> Tensor:
        """Of the policy, in nats."""
        against = torch.logaddexp(-self.log_odds, torch.zeros_like(self.log_odds))  # -log(1 - pi)
        binary = self.complement() * against - self.logprobs().exp() * self.logprobs()
        return binary.where(binary.isfinite(), 0.0 * self.log_odds) + self.complement() * self.others_entropy

    def sum_sq_prob(self) -> Tensor:
        """sum_j p_j^2."""
        return self.logprobs().exp().square() + self.complement().square() * self.others_squares

    def direction_norm(self) -> Tensor:
        """|s|; that of u is `complement` times as large."""
        return (1 + self.others_squares).sqrt()


def softmax_sums(
    logits: Tensor, actions: Tensor, seen: Tensor | None = None, others: Tensor | None = None
) -> SoftmaxSums:
    """The sums of some tokens.

    Args:
        logits: (N, V), any floating dtype. Rows with NaN or +inf give NaN; -inf stands for a probability of 0.
        actions: (N,) int64.
        seen: gradients with respect to the logits, (N, V).
        others: (N, V), filled with w / W where given: -s, but for its entry 0 at the action.
    """
    count, width = logits.shape
    most = CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK
    deep = max(1, most // width)
    columns = [slice(column, min(column + most, width)) for column in range(0, width, most)]
    sums = torch.zeros(6, count, 1, dtype=torch.float64, device=logits.device)
    top, total, squares, weighted, along, seen_squares = sums
    top.fill_(-torch.inf)
    chosen = logits.gather(1, actions[:, None]).double()

    # Three buffers for all chunks: fresh memory for each would cost as much as the arithmetic.
    places = None if len(columns) == 1 else actions.tolist()  # rows are cut on the CPU only, and there one at a time
    memory = torch.empty(3, min(deep, count), min(most, width), dtype=torch.float64, device=logits.device)
    for start in range(0, count, deep):
        rows = slice(start, min(start + deep, count))
        place = None if places is None else places[start]
        for some in columns:
            z = logits[rows, some]
            if _holds(place, some):
                z = _without(z.clone(), actions[rows], place, some, -torch.inf)
            top[rows] = torch.maximum(top[rows], z.amax(1, keepdim=True).double())
        for some in columns:
            z, w, product = memory[:, : rows.stop - rows.start, : some.stop - some.start]
            z.copy_(logits[rows, some]).sub_(top[rows]).clamp_(min=LOWEST)
            _without(z, actions[rows], place, some, LOWEST)
            torch.mul(z, LOG2_E, out=w).exp2_()
            total[rows] += w.sum(1, keepdim=True)
            squares[rows] += _dot(w, w, product)
            weighted[rows] += _dot(w, z, product)
            if others is not None:
                others[rows, some] = w
            if seen is not None:
                g = z.copy_(seen[rows, some])
                along[rows] -= _dot(w, g, product)
                seen_squares[rows] += _dot(g, g, product)
        if others is not None:
            for some in columns:
                others[rows, some] /= total[rows]
    if seen is not None:
        along = along / total + seen.gather(1, actions[:, None]).double()
    return SoftmaxSums(
        log_odds=(total.log() + top - chosen).squeeze(1),
        others_entropy=(total.log() - weighted / total).squeeze(1),
        others_squares=(squares / total.square()).squeeze(1),
        seen_along=None if seen is None else along.squeeze(1),
        seen_squares=None if seen is None else seen_squares.squeeze(1),
    )


def _dot(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """(n, 1): of each row. torch.dot and torch.exp would wake up threads for chunks as short as these."""
    return torch.mul(a, b, out=product).sum(1, keepdim=True)


def _holds(place: int | None, columns: slice) -> bool:
    """Whether these columns hold the row's action; None: they are whole rows."""
    return place is None or columns.start <= place < columns.stop


def _without(z: Tensor, actions: Tensor, place: int | None, columns: slice, value: float) -> Tensor:
    """z with the value at each row's action, where that is one of these columns; in place."""
    if place is None:
        z.scatter_(1, actions[:, None], value)
    elif _holds(place, columns):
        z[0, place - columns.start] = value
    return z
