"""What is recorded of the softmax at some tokens, in one pass over their logits that writes nothing of their size.

With top' the largest logit but the action's, w_j = exp(z_j - top') for j != a, and W = sum w, everything follows from
W, sum w^2 and sum w (z - top'), without cancellation at saturated tokens (method.md, sections 1 and 2.1):

    log odds against a = log W + top' - z_a      log pi = -log(1 + odds)      entropy = H(pi) + (1 - pi) H(w / W)
    u = e_a - p = (1 - pi) s                     s = e_a - w / W
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.recording.candidates import Rows, rows_of

CPU_ELEMENTS, GPU_ELEMENTS = 2**21, 2**23  # logits worked on together: the buffers stay near the CPU
SMALLEST = 1e-37  # of what has an inverse in float32
PLAIN = 1e-9  # gradients above it leave residuals whose squares float32 holds
LOWEST = -1e4  # exp of it is 0: logits of -inf count as such, without NaN


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
    seen_rest: Tensor | None
    """|g - c s|^2, c = <g, s> / |s|^2: of what is left of them."""
    log_total: Tensor | None = None
    """log sum_j exp(z_j / temperature)."""
    seen_sum: Tensor | None = None
    """sum_j g_j."""

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
    logits: Rows | Tensor,
    actions: Tensor,
    seen: Rows | Tensor | None = None,
    others: Tensor | None = None,
    temperature: float = 1.0,
) -> SoftmaxSums:
    """The sums of some tokens, in float32 (float64 where the logits are): what they lose is less than logits' rounding.

    Args:
        logits: (N, V), any floating dtype. Rows with NaN or +inf give NaN; -inf stands for a probability of 0.
        actions: (N,) int64.
        seen: gradients with respect to the logits, (N, V).
        others: (N, V), filled with w / W where given: -s, but for its entry 0 at the action.
        temperature: the policy is softmax(logits / temperature).
    """
    count, width = logits.shape
    precise = torch.promote_types(logits.dtype, torch.float32)
    deep = min(count, max(1, (CPU_ELEMENTS if actions.device.type == "cpu" else GPU_ELEMENTS) // width))
    memory = _buffers(3 if seen is None else 4, deep, width, precise, actions.device)
    found: list[Tensor] = []
    for start in range(0, count, deep):
        rows = slice(start, min(start + deep, count))
        few = memory[:, : rows.stop - rows.start]
        gradient = None if seen is None else rows_of(seen, rows, few[3])
        z = rows_of(logits, rows, few[0])
        found.append(_of_rows(z, actions[rows, None], gradient, temperature, few[:3]))
        if others is not None:
            torch.div(few[1], found[-1][1, :, None].to(precise), out=others[rows])
    top, total, squares, weighted, chosen, along, rest, summed = torch.cat(found, 1)
    return SoftmaxSums(
        log_odds=total.log() + (top - chosen) / temperature,
        others_entropy=total.log() - weighted / total,
        others_squares=squares / total.square(),
        seen_along=None if seen is None else along,
        seen_rest=None if seen is None else rest,
        seen_sum=None if seen is None else summed,
        log_total=torch.logaddexp(total.log() + top / temperature, chosen / temperature),
    )


_kept = threading.local()


def _buffers(count: int, deep: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count, deep, width), for all blocks: fresh memory for each would cost as much as the arithmetic.

    On the CPU kept from one update to the next, by each thread: the first touch of 8,000 pages costs a tenth of it.
    """
    shape = (count, deep, width)
    held: Tensor | None = getattr(_kept, "memory", None)
    if device.type == "cpu" and held is not None and held.shape == shape and held.dtype == dtype:
        return held
    with torch.inference_mode(False):
        fresh = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        _kept.memory = fresh
    return fresh


def _of_rows(logits: Tensor, action: Tensor, seen: Tensor | None, temperature: float, memory: Tensor) -> Tensor:
    """(8, n) float64: top', sums of w, w^2 and w (z - top'), z_a, <g, s>, |g - c s|^2, sum g.

    memory: (3, n, V); its second part is left as w, 0 at the action.
    """
    z, w, product = memory
    chosen = logits.gather(1, action).double().squeeze(1)
    if logits.data_ptr() != z.data_ptr():
        z.copy_(logits)
    z.scatter_(1, action, -torch.inf)
    top = z.amax(1, keepdim=True)
    z -= top
    if temperature != 1:
        z /= temperature
    torch.exp(z.clamp_(min=LOWEST), out=w).scatter_(1, action, 0.0)
    total, length, weighted = (part.double() for part in (w.sum(1), _norm(w), _dot(w, z, product)))
    squares = length.square()
    plain = [top.squeeze(1).double(), total, squares, weighted, chosen]
    if seen is None:
        return torch.stack([*plain, total, total, total])

    at_action = seen.gather(1, action).double().squeeze(1)
    along = at_action - _dot(w, seen, product).double() / total
    slope = along / (1 + squares / total.square())
    unit = torch.maximum(at_action.abs(), along.abs())  # squares of small gradients underflow
    unit = torch.where(unit < SMALLEST, 1.0, unit)
    if seen.device.type == "cpu" and bool((unit > PLAIN).all()):  # elsewhere looking costs more than multiplying
        unit = torch.ones_like(unit)
        left = torch.addcmul(seen, w, (slope / total).to(z.dtype)[:, None], out=z)
    else:
        left = torch.mul(seen, (1 / unit).to(z.dtype)[:, None], out=z)
        left.addcmul_(w, (slope / total / unit).to(z.dtype)[:, None])
    left.scatter_(1, action, 0.0)
    rest = _norm(left).double().square() + ((at_action - slope) / unit).square()
    return torch.stack([*plain, along, rest * unit.square(), seen.sum(1).double()])


def _norm(a: Tensor) -> Tensor:
    """(n,): of each row."""
    return torch.linalg.vector_norm(a, dim=1)


def _dot(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """(n,): of each row."""
    return torch.mul(a, b, out=product).sum(1)
