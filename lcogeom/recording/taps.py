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

from lcogeom.recording.head import OutputHead

OnBackward = Callable[[Tensor, Tensor, Tensor | None], None]
"""(values (B, T', d or V), their gradient, input ids (B, T) or None)."""

HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HEAD_TOLERANCE_LOW = 0.05  # bf16 and fp16 logits keep two to three digits


class TapError(RuntimeError):
    """The recorder saw nothing, or not what it needs; the message says why and what to do."""


@dataclass
class Tap:
    """One tap on a model. `forwards` counts the passes with gradients that it saw; none while `paused`."""

    kind: str
    forwards: int
    remove: Callable[[], None]
    paused: bool = False


def hidden_tap(model: torch.nn.Module, head: OutputHead, on_backward: OnBackward) -> Tap:
    """Read the base model's last hidden state: every training path computes it, with a fused loss too."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(base, torch.nn.Module) or base is model:
        raise TapError(f"{type(model).__name__} has no base model to read hidden states from. Use tap='logits'.")
    last: list[Tensor] = []
    checked = False

    def after_base(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if tap.paused:
            return
        hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        last[:] = [hidden.detach()]
        if _watch(hidden, _input_ids(args, kwargs), on_backward, "hidden states"):
            tap.forwards += 1

    def after_model(_: object, __: object, output: Any) -> None:
        nonlocal checked
        logits = getattr(output, "logits", None)
        if not checked and last and isinstance(logits, Tensor):
            checked = True
            _check_head(head, last[0], logits.detach())
        last.clear()

    handles = [
        base.register_forward_hook(after_base, with_kwargs=True),
        model.register_forward_hook(after_model),
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    tap = Tap("hidden", 0, remove)
    return tap


def logits_tap(model: torch.nn.Module, on_backward: OnBackward) -> Tap:
    """Read the logits of the model's output: the whole gradient, for any loss; needs a path that builds them."""

    def after_model(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        logits = getattr(output, "logits", None)
        if tap.paused or not isinstance(logits, Tensor):
            return
        if _watch(logits, _input_ids(args, kwargs), on_backward, "logits"):
            tap.forwards += 1

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


def _watch(tensor: Tensor, ids: Tensor | None, on_backward: OnBackward, what: str) -> bool:
    if not tensor.requires_grad:
        return False
    values, version = tensor.detach(), tensor._version

    def arrived(gradient: Tensor) -> None:
        if values._version != version:
            raise TapError(
                f"the {what} were changed in place between the forward pass and the backward pass (logits.div_(T), "
                "or a fused cross entropy), so the recorder cannot read them. "
                + ("Use tap='hidden'." if what == "logits" else "Work on a clone.")
            )
        on_backward(values, gradient, ids)

    tensor.register_hook(arrived)
    return True


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None


def _check_head(head: OutputHead, hidden: Tensor, logits: Tensor) -> None:
    """Once per attach: the logits must be what the head makes of the hidden state, or f' would be recovered wrongly."""
    with torch.no_grad():
        found = head.logits(hidden[:, -1]).double()
        wanted = logits[:, -1].double()
        scale = (wanted.max(1).values - wanted.median(1).values).abs().mean() + 1e-6
        gap = float((found - wanted).abs().max() / scale)
    if not gap < _head_tolerance(logits) and torch.isfinite(wanted).all():
        raise TapError(
            f"the logits are not the output head applied to the last hidden state (relative difference {gap:.1e}): "
            "the model transforms them in a way this recorder does not know. Use tap='logits'."
        )


def _head_tolerance(logits: Tensor) -> float:
    """By the precision that the logits were computed in: Accelerate hands out autocast's as float32."""
    if any(torch.equal(logits, logits.to(low).to(logits.dtype)) for low in (torch.bfloat16, torch.float16)):
        return HEAD_TOLERANCE_LOW
    return HEAD_TOLERANCE.get(logits.dtype, HEAD_TOLERANCE_LOW)
