"""The forward passes of a run, kept so that they can run again: inputs, mode, autocast, random numbers."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lcogeom.recording.base_model import hidden_modules
from lcogeom.recording.batch import BatchRecord
from lcogeom.recording.head import OutputHead, output_head

LARGE_BYTES = 2**24  # a (B, 1, T, T) mask or the old logits of a large vocabulary: a window of them would fill memory
OPEN = 64  # forward passes whose backward pass has not come; those of an evaluation never do
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class ModelParts:
    """A causal LM and how it is called."""

    model: torch.nn.Module
    base: torch.nn.Module | None
    """Whose calls are recorded, because a fused loss may call nothing else; None: the model's own."""
    head: OutputHead | None
    """From the base's hidden states to the logits; there whenever `base` is."""
    temperature: float
    """Logits are divided by it before the softmax."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(eq=False)
class ForwardPass:
    """One call of the model and what batch() said of it."""

    module: str
    """Whose forward was called: 'base' (then `head` makes the logits) or 'model'."""
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    """Arguments that are no tensors."""
    left_out: dict[str, str]
    training: bool
    other_mode: tuple[str, ...]
    autocast: torch.dtype | None
    rng: dict[str, Tensor]
    """Device type -> state of its generator before the pass."""
    batch: BatchRecord | None = None
    loss: Tensor | None = None
    """0-d; as handed to batch(), else the model's own."""
    seen: Tensor | None = field(default=None, repr=False)
    """The very input_ids that the model was called with, until the backward pass has come."""


class PassWatcher:
    """Keeps every forward pass with gradients until its backward pass comes. No device sync."""

    def __init__(self, parts: ModelParts, paused: Callable[[], bool]) -> None:
        model = self._model = parts.model
        self._device, self._paused = parts.device.type, paused
        self._watched = model if parts.base is None else parts.base
        self._module = "model" if parts.base is None else "base"
        self._names = list(inspect.signature(self._watched.forward).parameters)
        self._open: deque[ForwardPass] = deque(maxlen=OPEN)
        self._latest: ForwardPass | None = None
        self._labels: Tensor | None = None
        disable = torch.compiler.disable  # they read the generators, which a graph cannot hold
        self._handles = [
            model.register_forward_pre_hook(disable(self._entered), with_kwargs=True),
            self._watched.register_forward_pre_hook(disable(self._called), with_kwargs=True),
            model.register_forward_hook(disable(self._left)),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self.forget()

    def forget(self) -> None:
        """Let go of the passes whose backward pass did not come."""
        self._open.clear()

    def arrived(self, ids: Tensor | None) -> ForwardPass | None:
        """The forward pass whose backward pass has come now; None if it was not seen."""
        if not self._open:
            return None
        found = next((one for one in reversed(self._open) if ids is not None and one.seen is ids), self._open[-1])
        self._open.remove(found)
        found.seen = None
        return found

    def _entered(self, _: object, __: object, kwargs: dict[str, Any]) -> None:
        self._latest = None
        self._labels = kwargs.get("labels")

    def _left(self, _: object, __: object, output: Any) -> None:
        """The model's own loss and the labels that it was made from."""
        one, labels = self._latest, self._labels
        self._latest = self._labels = None
        loss = getattr(output, "loss", None)
        if one is None or not isinstance(labels, Tensor) or not isinstance(loss, Tensor) or loss.ndim:
            return
        keep("labels", labels, one.inputs, one.left_out)
        one.loss = loss.detach()

    def _called(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or self._paused():
            return
        inputs: dict[str, Tensor] = {}
        options: dict[str, Any] = {}
        left_out: dict[str, str] = {}
        for name, value in [*zip(self._names, args, strict=False), *kwargs.items()]:
            if isinstance(value, Tensor):
                keep(name, value, inputs, left_out)
            elif isinstance(value, PLAIN):
                options[name] = value
            else:
                left_out[name] = f"a {type(value).__name__}"
        on = torch.is_autocast_enabled(self._device)
        seen = kwargs.get("input_ids", args[0] if args else None)
        self._latest = ForwardPass(
            module=self._module,
            inputs=inputs,
            options=options,
            left_out=left_out,
            training=self._model.training,
            other_mode=tuple(n for n, m in self._model.named_modules() if m.training != self._model.training),
            autocast=torch.get_autocast_dtype(self._device) if on else None,
            rng=random_states(self._device),
            seen=seen if isinstance(seen, Tensor) else None,
        )
        self._open.append(self._latest)


def model_parts(model: torch.nn.Module, temperature: float, *, whole: bool = False) -> ModelParts:
    """A causal LM taken apart at its last hidden state; as a whole where `whole`, or where that is not known."""
    head = output_head(model)
    modules = [] if whole or head is None else hidden_modules(model)
    return ModelParts(model, modules[-1] if modules else None, head, temperature)


def keep(name: str, tensor: Tensor, kept: dict[str, Tensor], left_out: dict[str, str]) -> None:
    """A copy, because loops reuse their input buffers; large tensors are left out, by name."""
    if tensor.numel() * tensor.element_size() > LARGE_BYTES:
        size = tensor.numel() * tensor.element_size() / 2**20
        left_out[name] = f"{size:.0f} MiB; the black box keeps up to {LARGE_BYTES // 2**20} MiB of one tensor"
    else:
        kept[name] = tensor.detach().clone(memory_format=torch.contiguous_format)


def keep_batch(batch: BatchRecord, left_out: dict[str, str]) -> BatchRecord:
    """The record with its own copies of the tensors."""
    own: dict[str, Tensor] = {}
    for name, value in {**batch.fields, "old_logits": batch.old_logits}.items():
        if value is not None:
            keep(name, value, own, left_out)
    copied = copy(batch)  # checked already
    copied.input_ids = batch.input_ids.clone()
    copied.mask = None if batch.mask is None else batch.mask.clone()
    copied.old_logits = own.pop("old_logits", None)
    copied.fields = own
    return copied


def random_states(device: str) -> dict[str, Tensor]:
    """Device type -> state of its default generator, of the CPU and of this device."""
    states = {"cpu": torch.get_rng_state()}
    if device not in ("cpu", "meta"):
        states[device] = torch.get_device_module(device).get_rng_state()
    return states


@contextmanager
def as_it_was(parts: ModelParts, one: ForwardPass) -> Iterator[None]:
    """The recorded mode, autocast and random numbers; afterwards everything is as it was before."""
    model, device = parts.model, parts.device.type
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    states = random_states(device)
    try:
        for name, module in model.named_modules():
            module.training = one.training != (name in one.other_mode)
        _set_random_states({name: state for name, state in one.rng.items() if name in states})
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(device, dtype=one.autocast, enabled=one.autocast is not None))
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # hooks put on later must fire
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        _set_random_states(states)


def run_again(parts: ModelParts, one: ForwardPass) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass again, inside `as_it_was`.

    Returns:
        sequence, place in the input, and logits (M, V) of its completion tokens, as they enter the softmax.

    Raises:
        ValueError: an input was left out, or nothing says which tokens are the completion.
    """
    for name, why in one.left_out.items():
        if name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"):
            raise ValueError(f"batch: {name} was not kept ({why}), so the pass cannot run again.")
    device = parts.device
    inputs = {name: value.to(device) for name, value in one.inputs.items()}
    ids, mask, labels = inputs.get("input_ids"), None, inputs.get("labels")
    if one.batch is not None:
        ids, mask = one.batch.input_ids.to(device), one.batch.mask
    elif labels is not None:
        mask = labels != -100
    if ids is None or mask is None:
        raise ValueError(
            "batch: nothing says which tokens are its completion; call probe.batch(..., action_mask=...) in the loop."
        )
    mask = mask.to(device).clone()
    mask[:, 0] = False  # no logits predict it
    sequence, place = mask.nonzero(as_tuple=True)
    options = {**one.options, **({"use_cache": False} if "use_cache" in one.options else {})}
    if one.module == "base":
        inputs.pop("labels", None)
        assert parts.base is not None
        output = parts.base(**inputs, **options)
        hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        assert parts.head is not None
        logits = parts.head.logits(hidden[sequence, place - 1 - ids.shape[1]])
    else:
        logits = parts.model(**inputs, **options).logits[sequence, place - 1 - ids.shape[1]]
    return sequence, place, logits if parts.temperature == 1 else logits / parts.temperature


def _set_random_states(states: dict[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state.cpu())
        else:
            torch.get_device_module(device).set_rng_state(state.cpu())
