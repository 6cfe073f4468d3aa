"""The rollout policy's logits at its own completion tokens, while a rollout is trained on, without holding [tokens, V].

LCO's target is built from the rollout policy's logits (method.md, 2.3). Kept as they are, they would take V numbers a
token. What is kept instead: the last hidden states, d numbers a token, with one copy of the output head where training
moves it; or, as in the authors' code, the k largest logits (systems.md 1.2 and 18.3 [CODE]).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lcogeom.recording.base_model import LastHidden, head_gap, head_tolerance, hidden_modules
from lcogeom.recording.errors import TapError
from lcogeom.recording.head import OutputHead, output_head
from lcogeom.recording.unwrap import require_plain_head, unwrap_model
from lcogeom.training.rollout import Sequences

ELSEWHERE = -100.0  # the authors' logit of every token outside the top k
CPU_BLOCK, GPU_BLOCK = 2**22, 2**26  # logits worked on together: 16 and 256 MiB in float32


class Kept(Protocol):
    """What stands for the old logits of M tokens."""

    def logits(self, places: Tensor) -> Tensor:
        """Of some of the tokens: (m,) int64 -> (m, V)."""

    def gathered(self) -> Kept:
        """The same with a whole head, where FSDP2 shards it: a collective call."""

    @property
    def nbytes(self) -> int:
        """Memory held for it, beside the model's own."""


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """The head's input at each token, and the head as it was."""

    states: Tensor
    """(M, d), in the dtype in which the model computed them."""
    head: OutputHead
    copied: bool
    """Whether the head is a copy; the model's own serves where training does not move it."""

    @torch.no_grad()
    def logits(self, places: Tensor) -> Tensor:
        return self.head.gathered().logits(self.states[places])

    def gathered(self) -> HiddenStates:
        return replace(self, head=self.head.gathered())

    @property
    def nbytes(self) -> int:
        return _nbytes(self.states) + sum(_nbytes(buffer) for buffer in self.head.module.buffers() if self.copied)


@dataclass(frozen=True, eq=False)
class TopLogits:
    """The k largest logits of each token, rounded to float16; -100 everywhere else."""

    values: Tensor
    """(M, k) float16."""
    ids: Tensor
    """(M, k) int32."""
    vocabulary: int

    def logits(self, places: Tensor) -> Tensor:
        values, ids = self.values[places], self.ids[places].long()
        return values.new_full((len(values), self.vocabulary), ELSEWHERE).scatter_(1, ids, values)

    def gathered(self) -> TopLogits:
        return self

    @property
    def nbytes(self) -> int:
        return _nbytes(self.values) + _nbytes(self.ids)


@dataclass(frozen=True, eq=False)
class OldPolicy:
    """The policy that sampled B sequences, at their M completion tokens."""

    action_mask: Tensor
    """(B, T) bool, of the sequences it was kept for."""
    old_logprobs: Tensor
    """(B, T) float32: log-probability of each completion token; 0 elsewhere."""
    kept: Kept

    def logits(self, rows: Tensor, action_mask: Tensor) -> Tensor:
        """Old logits of some of the completion tokens, without gradient.

        With FSDP2 every process must call it equally often: the head is gathered each time.

        Args:
            rows: which sequences, (R,) int64.
            action_mask: which of their tokens, (R, T) bool; trailing columns may have been cut off.

        Returns:
            (M', V) in the order of `action_mask.nonzero()`; in the head's dtype, or in float16 from the top k.

        Raises:
            ValueError: shapes that do not fit, or a token that is no completion token of the rollout.
        """
        return self.kept.logits(self._places(rows, action_mask))

    def blocks(self, rows: Tensor, action_mask: Tensor) -> Callable[[slice], Tensor]:
        """The same block by block, for `chunked_loss`: (some of the M' tokens) -> (m, V). The head is gathered once."""
        places, kept = self._places(rows, action_mask), self.kept.gathered()
        return lambda some: kept.logits(places[some])

    def _places(self, rows: Tensor, action_mask: Tensor) -> Tensor:
        """Among the tokens kept, (M',)."""
        width = self.action_mask.shape[1]
        if action_mask.ndim != 2 or len(action_mask) != len(rows) or action_mask.shape[1] > width:
            raise ValueError(
                f"action_mask: shape {tuple(action_mask.shape)}; must be ({len(rows)}, {width}), one row for each of "
                "the sequences in `rows`."
            )
        counted = self.action_mask.flatten().cumsum(0).view_as(self.action_mask) - 1
        places = counted.where(self.action_mask, -1)[rows, : action_mask.shape[1]][action_mask.bool()]
        if (places < 0).any():
            raise ValueError(
                f"action_mask: {int((places < 0).sum())} of its tokens are no completion tokens of the rollout whose "
                "policy was kept. Check `rows`, or keep the old policy of this rollout."
            )
        return places

    @property
    def nbytes(self) -> int:
        """Memory held on this process for as long as it lives, beside the model's own."""
        return self.kept.nbytes + _nbytes(self.action_mask) + _nbytes(self.old_logprobs)


@torch.no_grad()
def keep_old_policy(
    model: torch.nn.Module,
    sequences: Sequences,
    *,
    form: Literal["hidden", "topk"] = "hidden",
    k: int = 5,
    rows_per_pass: int = 8,
    temperature: float = 1.0,
) -> OldPolicy:
    """Keep what gives the model's logits at the completion tokens of a rollout back, after it has been trained further.

    One forward pass, in eval mode (no dropout, as when sampling), that leaves the model and the random generators as
    they were. Logits are held for at most 2^22 / V tokens at once (on a GPU 2^26 / V).

    Args:
        model: a causal LM, bare or in DDP, FSDP2 or PEFT. Under autocast, call this and `OldPolicy.logits` under the
            same autocast as the training forward.
        sequences: the rollout.
        form: "hidden" keeps hidden states: old logits come back to rounding. "topk" keeps the k largest logits in
            float16, with -100 elsewhere [systems.md 1.2, CODE]: a truncated old policy. A sampled token outside the
            top k gets the logit -100 too, so that LCO-KLD cannot raise it, and the targets of LCO-MSE and LCO-LCH at
            it lie near -100.
        rows_per_pass: sequences in one forward pass; with FSDP2 the same for every process.
        temperature: that `old_logprobs` are of, the one sampled with. Old logits are never divided by it.

    Raises:
        ValueError: an unknown form, a k, rows_per_pass or temperature out of range, or a completion token in the first
            column, which no logits predict.
        TypeError: no Hugging Face causal LM, or a wrapper or an adapter on the head that hides it.
        TapError: the model's logits are not its output head applied to its last hidden state.
    """
    if form not in ("hidden", "topk"):
        raise ValueError(f"form: {form!r}; must be 'hidden' or 'topk'.")
    if rows_per_pass < 1 or not temperature > 0:
        raise ValueError(f"rows_per_pass, temperature: {rows_per_pass}, {temperature}; must be at least 1, above 0.")
    inner = unwrap_model(model)
    require_plain_head(inner)
    live = output_head(inner)
    if live is None:
        raise TypeError(f"model: {type(inner).__name__} has several output heads, so its logits are not of one policy.")
    if hasattr(live.module.weight, "ds_id"):
        raise TypeError(
            "model: DeepSpeed ZeRO-3 takes the head's weight apart, and old logits cannot be made of its parts. Shard "
            "with ZeRO-2 or FSDP2, or update once on each rollout."
        )
    if not 1 <= k <= live.vocabulary:
        raise ValueError(f"k: {k}; must be between 1 and the vocabulary, {live.vocabulary}.")
    mask = sequences.action_mask.bool()
    if bool(mask[:, 0].any()):
        raise ValueError("sequences: a completion token in the first column, which no logits predict.")
    copied = form == "hidden" and head_moves(live)
    head = _as_it_is(live) if copied else live
    states = HiddenStates(_hidden_states(model, inner, live, sequences, rows_per_pass), head, copied)
    chosen = sequences.input_ids[mask]
    logprobs, top = [], []
    whole, rows = head.gathered(), tokens_in_block(head.vocabulary, chosen.device)
    for some in torch.arange(len(chosen), device=chosen.device).split(rows):
        logits = whole.logits(states.states[some])
        scaled = logits.float() / temperature
        logprobs.append(scaled.gather(1, chosen[some, None]).squeeze(1) - scaled.logsumexp(1))
        if form == "topk":
            top.append(logits.topk(k, dim=1))
    old = torch.zeros(mask.shape, device=mask.device)
    old[mask] = torch.cat(logprobs).clamp(max=0.0)
    if form == "hidden":
        return OldPolicy(mask, old, states)
    values, ids = (torch.cat([getattr(each, part) for each in top]) for part in ("values", "indices"))
    return OldPolicy(mask, old, TopLogits(values.half(), ids.int(), head.vocabulary))


def tokens_in_block(vocabulary: int, device: torch.device) -> int:
    """Of how many tokens logits are held at once."""
    return max(1, (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK) // vocabulary)


def _hidden_states(
    model: torch.nn.Module, inner: torch.nn.Module, head: OutputHead, sequences: Sequences, rows_per_pass: int
) -> Tensor:
    """What the head sees where it predicts the completion tokens, (M, d)."""
    modules = hidden_modules(inner)
    if not modules:
        raise TapError(f"model: no module of {type(inner).__name__} is known to return its last hidden state.")
    outer = model.module if isinstance(model, DistributedDataParallel) else model  # DDP would broadcast buffers
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(inner).forward).parameters else {}
    seen: dict[int, Tensor] = {}

    def watch(hidden: Tensor, _: Tensor | None, __: bool) -> Callable[[], None]:
        seen[id(hidden)] = hidden
        return lambda: _forget(seen, hidden)

    mask = sequences.action_mask.bool()
    states, filled = None, 0
    last = LastHidden(inner, head, modules, watch, paused=lambda: False, required=True)
    try:
        with eval_mode(outer):
            for rows in torch.arange(len(mask), device=mask.device).split(rows_per_pass):
                ids, attention, actions = sequences.input_ids[rows], sequences.attention_mask[rows], mask[rows, 1:]
                logits = outer(input_ids=ids, attention_mask=attention, use_cache=False, **options).logits
                hidden = seen.popitem()[1]
                if states is None:
                    require_image(head.gathered(), hidden, logits, ids)
                    states = hidden.new_empty(int(mask.sum()), hidden.shape[2])
                found = hidden[:, :-1][actions]
                states[filled : filled + len(found)] = found
                filled += len(found)
    finally:
        last.remove()
    assert states is not None
    return states


def require_image(head: OutputHead, hidden: Tensor, logits: Tensor, ids: Tensor) -> None:
    """Raise TapError unless logits (B, T', V) are what the head makes of hidden states (B, T, d), at the last position.

    LastHidden checks it as well, but not inside PEFT, which calls the model's forward past its hooks.
    """
    if hidden.shape[:2] != ids.shape or head_gap(head, hidden, logits) > head_tolerance(logits):
        raise TapError(
            "model: its logits are not its output head applied to its last hidden state, so they cannot be recomputed "
            "from hidden states. LCO's target='current' needs no old logits."
        )


def _forget(seen: dict[int, Tensor], hidden: Tensor) -> None:
    seen.pop(id(hidden), None)


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def head_moves(head: OutputHead) -> bool:
    """Whether training moves the head: it, or the embedding that it is tied to, is trainable."""
    parameters = (head.module.weight, getattr(head.module, "bias", None))
    return any(isinstance(each, Tensor) and each.requires_grad for each in parameters)


def _as_it_is(head: OutputHead) -> OutputHead:
    """A copy that stays, sharded where the head is."""
    copy = torch.nn.Module()
    for name in ("weight", "bias"):
        tensor = getattr(head.module, name, None)
        copy.register_buffer(name, tensor.detach().clone() if isinstance(tensor, Tensor) else None)
    return replace(head, module=copy)


def _nbytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()
