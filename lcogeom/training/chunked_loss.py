"""Losses of the logits from hidden states, a block of tokens at a time: [tokens, V] is never held, nor its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lcogeom.objectives import Objective, TokenBatch
from lcogeom.recording.head import OutputHead
from lcogeom.training.old_policy import tokens_in_block

OfLogits = Callable[[Tensor, slice], Tensor]
"""(logits (m, V) of some consecutive tokens, which ones of all) -> (m,) or (m, n)."""


def chunked_loss(
    minimised: Objective,
    hidden: Tensor,
    head: OutputHead,
    batch: TokenBatch,
    *,
    old_logits: Callable[[slice], Tensor] | None = None,
    temperature: float = 1.0,
    tokens: int | None = None,
) -> Tensor:
    """`minimised.loss(head.logits(hidden) / temperature, batch)`, with the same gradients, in blocks of tokens.

    Logits are made once in the forward pass and once more in the backward pass.

    Args:
        minimised: an objective of which each token's loss depends on that token alone: no importance weights of whole
            completions, no prefixes, no pairs. Those read `batch.sequences` or `batch.pairs`, which are kept from it.
        hidden: what the head sees at each token, (M, d).
        head: from `lcogeom.recording.head.output_head`.
        batch: of the M tokens, without old logits.
        old_logits: those of some consecutive tokens, (m, V), undivided: `OldPolicy.blocks(rows, mask)`. None: the
            current ones, which are the old ones on the first update on a rollout.
        tokens: in one block; None: 2^22 / V, on a GPU 2^26 / V.

    Returns:
        (M,), as the objective's loss.

    Raises:
        ValueError: old logits in `batch`, or what the objective raises.
    """
    if batch.old_logits is not None:
        raise ValueError("batch: it holds old_logits, [tokens, V]; pass old_logits=OldPolicy.blocks(...) instead.")
    alone = replace(batch, sequences=None, pairs=None)

    def of_logits(logits: Tensor, some: slice) -> Tensor:
        old = logits.detach() if old_logits is None else old_logits(some) / temperature
        return minimised.loss(logits, replace(alone[some], old_logits=old))

    return in_blocks(of_logits, hidden, head, temperature=temperature, tokens=tokens)


def in_blocks(
    of_logits: OfLogits, hidden: Tensor, head: OutputHead, *, temperature: float = 1.0, tokens: int | None = None
) -> Tensor:
    """A function of each token's logits, divided by the temperature; differentiable in `hidden` and the head's weight.

    Other arguments: as `chunked_loss`. Returns (M,) or (M, n), what the function gives.
    """
    head = _held(head)
    step = tokens or tokens_in_block(head.vocabulary, hidden.device)

    def block(piece: Tensor, some: slice) -> Tensor:
        logits = head.logits(piece)
        return of_logits(logits if temperature == 1.0 else logits / temperature, some)

    pieces = []
    for start in range(0, max(len(hidden), 1), step):
        some = slice(start, start + step)
        if torch.is_grad_enabled():
            pieces.append(checkpoint(block, hidden[some], some, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(block(hidden[some], some))
    return torch.cat(pieces)


def _held(head: OutputHead) -> OutputHead:
    """The same tensors in a module of our own: FSDP2 may put others in the model's place before the backward pass."""
    held = torch.nn.Module()
    for name in ("weight", "bias"):
        tensor = getattr(head.module, name, None)
        setattr(held, name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
    return replace(head, module=held)
