"""Where a gradient is read: at the last hidden state, the logits, or the log-probabilities that a fused head returns.

A tap is a forward hook that puts a hook on one output tensor; when the backward pass reaches that tensor, the tap
hands over its value, its gradient and the input ids. Nothing is returned to autograd, so nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lcogeom.recording.base_model import LastHidden, hidden_modules, input_ids
from lcogeom.recording.errors import TapError
from lcogeom.recording.head import OutputHead

KINDS = ("auto", "hidden", "logits", "log_probs")


@dataclass(frozen=True, eq=False)
class Sighting:
    """A backward pass has reached a tapped tensor."""

    kind: str
    """'hidden', 'logits' or 'log_probs'."""
    values: Tensor
    """(B, T', d), (B, T', V), or (B, T - 1)."""
    gradient: Tensor
    """Of the loss with respect to them."""
    ids: Tensor | None
    """The input ids (B, T) of the forward pass, where it was given any."""
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    """(B, T - 1), where the fused head computed them beside its log-probabilities."""


OnBackward = Callable[[Sighting], None]


@dataclass
class Tap:
    """The hooks on a model. `forwards` counts the passes with gradients that they saw; none while `paused`."""

    kind: str
    forwards: int
    remove: Callable[[], None]
    paused: bool = False


def tap_model(model: torch.nn.Module, head: OutputHead | None, kind: str, on_backward: OnBackward) -> Tap:
    """Put the hooks of one kind of tap on a model.

    'hidden' reads the base model's last hidden state: every training path computes it, with a fused loss too.
    'logits' reads the logits of the model's output: the whole gradient, for any loss; needs a path that builds them.
    'log_probs' reads what TRL's fused head returns: f' of every token at once, but not whether the loss has others.
    'auto' reads the logits where the loss hangs on them, else the last hidden state.

    Raises:
        TapError: a hidden-state tap on a model without a base model, or with several heads.
    """
    modules = [] if head is None else hidden_modules(model)
    if not modules and kind == "hidden":
        why = "no base model to read hidden states from"
        if head is None:
            why = "several LM heads on one hidden state, whose gradient therefore belongs to several tokens at once"
        raise TapError(f"{type(model).__name__} has {why}. Use tap='logits'.")
    last: LastHidden | None = None
    taken: dict[str, bool] = {}  # of the latest forward pass: whether a gradient came at the logits

    def watch_hidden(hidden: Tensor, ids: Tensor | None, again: bool) -> Callable[[], None]:
        nonlocal taken
        if not again:
            taken = {"logits": False}
        now, forgotten = taken, [False]  # compiled code may keep a hook that was taken off

        def arrived(values: Tensor, gradient: Tensor, ids: Tensor | None) -> None:
            if not now["logits"] and not forgotten[0]:
                on_backward(Sighting("hidden", values, gradient, ids))

        handle = _watch(hidden, arrived, ids, lambda: _refuse("hidden states", "Work on a clone."))
        tap.forwards += handle is not None

        def forget() -> None:
            forgotten[0] = True
            if handle is not None:
                handle.remove()
                tap.forwards -= 1

        return forget

    def after_model(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        logits = getattr(output, "logits", None)
        if tap.paused or kind == "hidden":
            return
        ids = input_ids(args, kwargs)
        if kind == "log_probs":
            tap.forwards += _watch_log_probs(output, ids, on_backward)
            return
        if not isinstance(logits, Tensor):
            return
        now = taken

        def arrived(values: Tensor, gradient: Tensor, ids: Tensor | None) -> None:
            now["logits"] = True
            on_backward(Sighting("logits", values, gradient, ids))

        def overwritten() -> None:
            if last is None or not last.known:
                _refuse("logits", "Use tap='hidden'.")

        watched = _watch(logits, arrived, ids, overwritten) is not None
        tap.forwards += watched and (last is None or not last.known)

    if head is not None and modules and kind in ("auto", "hidden"):  # before after_model, which shares its pass
        last = LastHidden(model, head, modules, watch_hidden, paused=lambda: tap.paused, required=kind == "hidden")
    handle = model.register_forward_hook(after_model, with_kwargs=True)

    def remove() -> None:
        handle.remove()
        if last is not None:
            last.remove()

    tap = Tap("logits" if kind == "auto" and last is None else kind, 0, remove)
    return tap


def silence(tap: Tap) -> str:
    """Why an update may have passed without the tap seeing a gradient, and what to do."""
    if tap.forwards:
        return (
            f"no gradient reached the recorder in this update, though the model ran forward {tap.forwards} "
            "time(s) with gradients: the loss does not depend on its output, or backward() was not called. "
            "Check what is minimised."
        )
    if tap.kind == "logits":
        return (
            "no gradient reached the recorder in this update: the model returned no logits that need a gradient. "
            "A fused loss never builds them: use tap='hidden', or compute the loss from the model's logits."
        )
    if tap.kind == "log_probs":
        return (
            "no gradient reached the recorder in this update: the model returned no `log_probs` that need a gradient. "
            "Only TRL's fused head returns them. Use tap='auto'."
        )
    return (
        "no gradient reached the recorder in this update: the model's forward never ran with gradients through the "
        "hooks. Hooks registered after torch.compile never fire: call lcogeom.attach(model, ...) first, then "
        "torch.compile(model). Is this the model that is being trained?"
    )


def _watch(
    tensor: Tensor,
    on_gradient: Callable[[Tensor, Tensor, Tensor | None], None],
    ids: Tensor | None,
    overwritten: Callable[[], None],
) -> RemovableHandle | None:
    """Hand over (values, gradient, ids) when the backward pass comes by; `overwritten()` if the values are gone."""
    if not tensor.requires_grad:
        return None
    values, version = tensor.detach(), tensor._version

    def arrived(gradient: Tensor) -> None:
        if values._version != version:
            overwritten()
        else:
            on_gradient(values, gradient, ids)

    handle: RemovableHandle = tensor.register_hook(arrived)
    return handle


def _watch_log_probs(output: Any, ids: Tensor | None, on_backward: OnBackward) -> bool:
    log_probs = getattr(output, "log_probs", None)
    if not isinstance(log_probs, Tensor):
        return False
    beside = {
        name: value.detach()
        for name in ("entropy", "log_sum_sq_probs")
        if isinstance(value := getattr(output, name, None), Tensor)
    }
    handle = _watch(
        log_probs,
        lambda values, gradient, ids: on_backward(Sighting("log_probs", values, gradient, ids, **beside)),
        ids,
        lambda: _refuse("log-probabilities", "Work on a clone, or use tap='hidden'."),
    )
    return handle is not None


def _refuse(what: str, remedy: str) -> None:
    raise TapError(
        f"the {what} were changed in place between the forward pass and the backward pass (logits.div_(T), "
        f"or a fused cross entropy), so the recorder cannot read them. {remedy}"
    )
