"""Where a gradient is read: at the last hidden state, or at the logits.

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

from lcogeom.recording.base_model import LastHidden, input_ids
from lcogeom.recording.errors import TapError
from lcogeom.recording.head import OutputHead

OnBackward = Callable[[Tensor, Tensor, Tensor | None], None]
"""(values (B, T', d or V), their gradient, input ids (B, T) or None)."""


@dataclass
class Tap:
    """One tap on a model. `forwards` counts the passes with gradients that it saw; none while `paused`."""

    kind: str
    forwards: int
    remove: Callable[[], None]
    paused: bool = False


def hidden_tap(model: torch.nn.Module, head: OutputHead, on_backward: OnBackward) -> Tap:
    """Read the base model's last hidden state: every training path computes it, with a fused loss too."""

    def watch(hidden: Tensor, ids: Tensor | None) -> Callable[[], None]:
        handle = _watch(hidden, ids, on_backward, "hidden states")
        tap.forwards += handle is not None

        def forget() -> None:
            if handle is not None:
                handle.remove()
                tap.forwards -= 1

        return forget

    last = LastHidden(model, head, watch, lambda: tap.paused)
    tap = Tap("hidden", 0, last.remove)
    return tap


def logits_tap(model: torch.nn.Module, on_backward: OnBackward) -> Tap:
    """Read the logits of the model's output: the whole gradient, for any loss; needs a path that builds them."""

    def after_model(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        logits = getattr(output, "logits", None)
        if tap.paused or not isinstance(logits, Tensor):
            return
        tap.forwards += _watch(logits, input_ids(args, kwargs), on_backward, "logits") is not None

    handle = model.register_forward_hook(after_model, with_kwargs=True)
    tap = Tap("logits", 0, handle.remove)
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
            "A fused loss never builds them. Use tap='hidden'."
        )
    return (
        "no gradient reached the recorder in this update: the model's forward never ran with gradients through the "
        "hooks. Hooks registered after torch.compile never fire: call lcogeom.attach(model, ...) first, then "
        "torch.compile(model). Is this the model that is being trained?"
    )


def _watch(tensor: Tensor, ids: Tensor | None, on_backward: OnBackward, what: str) -> RemovableHandle | None:
    """Hand the tensor's gradient to on_backward once it comes; None where none will."""
    if not tensor.requires_grad:
        return None
    values, version = tensor.detach(), tensor._version

    def arrived(gradient: Tensor) -> None:
        if values._version != version:
            raise TapError(
                f"the {what} were changed in place between the forward pass and the backward pass (logits.div_(T), "
                "or a fused cross entropy), so the recorder cannot read them. "
                + ("Use tap='hidden'." if what == "logits" else "Work on a clone.")
            )
        on_backward(values, gradient, ids)

    handle: RemovableHandle = tensor.register_hook(arrived)
    return handle
