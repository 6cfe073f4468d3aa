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

from lcogeom.recording.head import OutputHead

KINDS = ("auto", "hidden", "logits", "log_probs")

HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HEAD_TOLERANCE_LOW = 0.05  # bf16 and fp16 logits keep two to three digits


class TapError(RuntimeError):
    """The recorder saw nothing, or not what it needs; the message says why and what to do."""


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


def tap_model(model: torch.nn.Module, head: OutputHead, kind: str, on_backward: OnBackward) -> Tap:
    """Put the hooks of one kind of tap on a model.

    'hidden' reads the base model's last hidden state: every training path computes it, with a fused loss too.
    'logits' reads the logits of the model's output: the whole gradient, for any loss; needs a path that builds them.
    'log_probs' reads what TRL's fused head returns: f' of every token at once, but not whether the loss has others.
    'auto' reads the logits where the loss hangs on them, else the last hidden state.

    Raises:
        TapError: a hidden-state tap on a model without a base model.
    """
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(base, torch.nn.Module) or base is model:
        if kind == "hidden":
            raise TapError(f"{type(model).__name__} has no base model to read hidden states from. Use tap='logits'.")
        base = None
    last: list[Tensor] = []
    taken: dict[str, bool] = {}  # of the latest forward pass: whether a gradient came at the logits
    checked = False

    def after_base(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal taken
        if tap.paused:
            return
        hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        last[:] = [hidden.detach()]
        taken = now = {"logits": False}
        watched = _watch(
            hidden,
            lambda values, gradient, ids: (
                None if now["logits"] else on_backward(Sighting("hidden", values, gradient, ids))
            ),
            _input_ids(args, kwargs),
            lambda: _refuse("hidden states", "Work on a clone."),
        )
        tap.forwards += watched

    def after_model(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal checked
        logits = getattr(output, "logits", None)
        if kind != "logits" and not checked and last and isinstance(logits, Tensor):
            checked = True
            _check_head(head, last[0], logits.detach())
        last.clear()
        if tap.paused or kind == "hidden":
            return
        ids = _input_ids(args, kwargs)
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
            if base is None or kind == "logits":
                _refuse("logits", "Use tap='hidden'.")

        watched = _watch(logits, arrived, ids, overwritten)
        tap.forwards += watched and (kind == "logits" or base is None)

    handles = [model.register_forward_hook(after_model, with_kwargs=True)]
    if base is not None and kind in ("auto", "hidden"):
        handles.append(base.register_forward_hook(after_base, with_kwargs=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    tap = Tap(kind, 0, remove)
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
) -> bool:
    """Hand over (values, gradient, ids) when the backward pass comes by; `overwritten()` if the values are gone."""
    if not tensor.requires_grad:
        return False
    values, version = tensor.detach(), tensor._version

    def arrived(gradient: Tensor) -> None:
        if values._version != version:
            overwritten()
        else:
            on_gradient(values, gradient, ids)

    tensor.register_hook(arrived)
    return True


def _watch_log_probs(output: Any, ids: Tensor | None, on_backward: OnBackward) -> bool:
    log_probs = getattr(output, "log_probs", None)
    if not isinstance(log_probs, Tensor):
        return False
    beside = {
        name: value.detach()
        for name in ("entropy", "log_sum_sq_probs")
        if isinstance(value := getattr(output, name, None), Tensor)
    }
    return _watch(
        log_probs,
        lambda values, gradient, ids: on_backward(Sighting("log_probs", values, gradient, ids, **beside)),
        ids,
        lambda: _refuse("log-probabilities", "Work on a clone, or use tap='hidden'."),
    )


def _refuse(what: str, remedy: str) -> None:
    raise TapError(
        f"the {what} were changed in place between the forward pass and the backward pass (logits.div_(T), "
        f"or a fused cross entropy), so the recorder cannot read them. {remedy}"
    )


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None


def _check_head(head: OutputHead, hidden: Tensor, logits: Tensor) -> None:
    """Once per attach: the logits must be what the head makes of the hidden state, or f' would be recovered wrongly."""
    with torch.no_grad():
        found = head.gathered().logits(hidden[:, -1]).double()
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
