"""Where a causal LM's last hidden state comes from: in every forward pass, the tensor that its head makes logits of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from lcogeom.recording.errors import TapError
from lcogeom.recording.head import OutputHead

HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HEAD_TOLERANCE_LOW = 0.05  # bf16 and fp16 logits keep two to three digits

Watch = Callable[[Tensor, Tensor | None, bool], Callable[[], None]]
"""(hidden states (B, T', d), input ids (B, T) or None, whether others of the same pass are watched already) -> what
takes the watch off."""


def hidden_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that may return the last hidden state, the innermost first; empty where none is known.

    They are the base model, and the decoder or language model that it wraps. Bart's LM calls the inner one directly;
    Gemma 3's calls the outer one, which alone is given input_ids.
    """
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(base, torch.nn.Module) or base is model:
        inner = [child for child in model.children() if isinstance(child, transformers.PreTrainedModel)]
        if len(inner) != 1:
            return []
        base = inner[0]  # Llama 4: the prefix is the multimodal model's
    decoder = base.get_decoder() if isinstance(base, transformers.PreTrainedModel) else base
    return [base] if decoder is base or not isinstance(decoder, torch.nn.Module) else [decoder, base]


class LastHidden:
    """Hands every forward pass's last hidden state to `watch`.

    That is the base model's output: every training path computes it, with a fused loss too. Where the first pass with
    logits shows that they are not the head's image of it (BERT's has a dense layer and a norm in between), it is the
    tensor that enters the output embedding instead, which no fused loss calls.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        head: OutputHead,
        modules: list[torch.nn.Module],
        watch: Watch,
        *,
        paused: Callable[[], bool],
        required: bool,
    ) -> None:
        """modules: from `hidden_modules`, at least one; required: a head that is not understood raises TapError."""
        self.known = True
        """Whether the logits are the head's image of the tensors handed to `watch`, as far as passes so far tell."""
        self._required = required
        self._head, self._watch, self._paused = head, watch, paused
        self._model, self._inner = model, modules[0]
        self._checked = self._at_head = self._inside = False  # _inside the model's own forward
        self._ids: Tensor | None = None
        self._hidden: Tensor | None = None
        self._entering: Tensor | None = None
        self._forget = self._forget_entering = _nothing
        self._handles = [model.register_forward_hook(self._finished)]
        self._handles += [m.register_forward_pre_hook(self._called, with_kwargs=True) for m in [model, *modules]]
        self._handles += [m.register_forward_hook(self._returned) for m in modules]
        self._head_handle = head.module.register_forward_pre_hook(self._enters)

    def remove(self) -> None:
        """Take every hook off."""
        for handle in [*self._handles, self._head_handle]:
            handle.remove()

    def _called(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = input_ids(args, kwargs)
        if ids is not None:
            self._ids = ids  # an outer module's stay, where the inner one is given embeddings
        if module is self._model:
            self._inside = True
        if module is self._inner:
            self._hidden = None

    def _returned(self, _: object, __: object, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else output)
        if self._paused() or not isinstance(hidden, Tensor) or hidden is self._hidden:
            return
        again = self._hidden is not None  # the inner module's, which this one has transformed
        if again:
            self._forget()
        self._hidden = hidden
        if not self._at_head:
            self._forget = self._watch(hidden, self._ids, again)

    def _enters(self, _: object, args: tuple[Any, ...]) -> None:
        if self._paused() or not args or not (self._inside or self._at_head):
            return
        self._entering = args[0]
        self._forget_entering = self._watch(args[0], self._ids, not self._at_head)

    def _finished(self, _: object, __: object, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if not self._paused() and not self._checked and self._hidden is not None:
            if isinstance(logits, Tensor):
                self._check(self._hidden, logits.detach())
            else:
                self._forget_entering()
        self._inside = False
        self._hidden = self._entering = self._ids = None
        self._forget = self._forget_entering = _nothing

    def _check(self, hidden: Tensor, logits: Tensor) -> None:
        """Once: the logits must be what the head makes of the hidden state, or f' would be recovered wrongly."""
        head = self._head.gathered()
        gap = head_gap(head, hidden.detach(), logits)
        tolerance = head_tolerance(logits)
        self._checked = not math.isnan(gap)  # logits that are not finite say nothing
        if not gap > tolerance:
            self._forget_entering()
            if self._checked:
                self._head_handle.remove()
            return
        entering = self._entering
        self._forget()
        fits = entering is not None and entering.shape[:-1] == logits.shape[:-1]
        if entering is not None and fits and not head_gap(head, entering.detach(), logits) > tolerance:
            self._at_head = True
            return
        self._forget_entering()
        self.known = False
        self.remove()
        if self._required:
            raise TapError(
                f"the logits are not the output head applied to the last hidden state (relative difference {gap:.1e}): "
                "the model transforms them in a way this recorder does not know. Use tap='logits'."
            )


def head_gap(head: OutputHead, hidden: Tensor, logits: Tensor) -> float:
    """Largest difference at the last position of head(hidden) and the logits, relative to the logits' spread.

    Args:
        hidden: (B, T, d).
        logits: (B, T, V).

    Returns:
        NaN where the logits are not finite, infinity where the shapes do not fit.
    """
    if hidden.ndim != 3 or hidden.shape[-1] != head.module.weight.shape[1]:  # type: ignore[index]
        return math.inf
    with torch.no_grad():
        found, wanted = head.logits(hidden[:, -1]).double(), logits[:, -1].double()
        if found.shape != wanted.shape:
            return math.inf
        scale = (wanted.max(1).values - wanted.median(1).values).abs().mean() + 1e-6
        gap = (found - wanted).abs().max() / scale
        return float(torch.where(torch.isfinite(wanted).all(), gap, math.nan))


def head_tolerance(logits: Tensor) -> float:
    """What `head_gap` may be, by the precision that the logits were computed in.

    Accelerate hands out logits of autocast as float32, with the digits of the lower precision.
    """
    if any(torch.equal(logits, logits.to(low).to(logits.dtype)) for low in (torch.bfloat16, torch.float16)):
        return HEAD_TOLERANCE_LOW
    return HEAD_TOLERANCE.get(logits.dtype, HEAD_TOLERANCE_LOW)


def input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The token ids that a module is called with, None where it is given embeddings."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None


def _nothing() -> None:
    pass
