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

from lcogeom.objectives import TokenBatch
from lcogeom.recording.base_model import hidden_modules, input_ids
from lcogeom.recording.batch import BatchRecord
from lcogeom.recording.head import OutputHead

LARGE_BYTES = 2**24  # a (B, 1, T, T) mask or the old logits of a large vocabulary: a window of them would fill memory
OPEN = 64  # forward passes whose backward pass has not come; those of an evaluation never do
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class ModelParts:
    """A causal LM and how it is called."""

    model: torch.nn.Module
    head: OutputHead | None
    """From its hidden states to the logits; None where there are several."""
    temperature: float
    """Logits are divided by it before the softmax."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(eq=False)
class ForwardPass:
    """One call of the model and what batch() said of it."""

    module: str
    """Whose forward was called, by its name in the model: "" is the model, another makes hidden states for `head`."""
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
    """Keeps every forward pass with gradients until its backward pass comes. No device sync.

    Kept are the arguments of the model; where it returns no logits, or a fused loss calls only what makes the hidden
    states, the arguments of that module.
    """

    def __init__(self, parts: ModelParts, paused: Callable[[], bool]) -> None:
        model = self._model = parts.model
        self._device, self._paused = parts.device.type, paused
        names = {id(module): name for name, module in model.named_modules()}
        inner = [module for module in hidden_modules(model) if id(module) in names]
        self._names = {id(module): names[id(module)] for module in [model, *inner]}
        self._arguments = {id(m): list(inspect.signature(m.forward).parameters) for m in [model, *inner]}
        self._open: deque[ForwardPass] = deque(maxlen=OPEN)
        self._outer: ForwardPass | None = None
        self._inner: ForwardPass | None = None
        self._alone: torch.nn.Module | None = None  # what a fused loss calls; modules within it are not passes
        disable = torch.compiler.disable  # they read the generators, which a graph cannot hold
        entered, called, left = disable(self._entered), disable(self._called), disable(self._left)
        self._handles = [model.register_forward_pre_hook(entered, with_kwargs=True)]
        self._handles += [module.register_forward_pre_hook(called, with_kwargs=True) for module in inner]
        self._handles.append(model.register_forward_hook(left))

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

    def _entered(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._outer = self._inner = None
        if torch.is_grad_enabled() and not self._paused():
            self._outer = self._record(model, args, kwargs)

    def _called(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or self._paused():
            return
        if self._outer is not None:
            self._inner = self._inner or self._record(module, args, kwargs)
        elif self._alone is None or self._alone is module:
            self._alone = module
            self._open.append(self._record(module, args, kwargs))

    def _left(self, _: object, __: object, output: Any) -> None:
        outer, inner = self._outer, self._inner
        self._outer = self._inner = None
        if outer is None:
            return
        one = outer if inner is None or isinstance(getattr(output, "logits", None), Tensor) else inner
        one.seen, one.rng = outer.seen, outer.rng
        labels, loss = outer.inputs.get("labels"), getattr(output, "loss", None)
        if labels is not None and isinstance(loss, Tensor) and not loss.ndim:
            one.inputs["labels"], one.loss = labels, loss.detach()
        self._open.append(one)

    def _record(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardPass:
        inputs: dict[str, Tensor] = {}
        options: dict[str, Any] = {}
        left_out: dict[str, str] = {}
        for name, value in [*zip(self._arguments[id(module)], args, strict=False), *kwargs.items()]:
            if isinstance(value, Tensor):
                keep(name, value, inputs, left_out)
            elif isinstance(value, PLAIN):
                options[name] = value
            else:
                left_out[name] = f"a {type(value).__name__}"
        on = torch.is_autocast_enabled(self._device)
        return ForwardPass(
            module=self._names[id(module)],
            inputs=inputs,
            options=options,
            left_out=left_out,
            training=self._model.training,
            other_mode=tuple(n for n, m in self._model.named_modules() if m.training != self._model.training),
            autocast=torch.get_autocast_dtype(self._device) if on else None,
            rng=random_states(self._device),
            seen=input_ids(args, kwargs),
        )


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
    rows = sequence, place - 1 - ids.shape[1]
    if one.module:
        inputs.pop("labels", None)
        output = parts.model.get_submodule(one.module)(**inputs, **options)
        hidden: Any = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else output)
        if parts.head is None:
            raise ValueError("model: it has several LM heads; only a pass through its own forward can run again.")
        logits = parts.head.logits(hidden[rows])
    else:
        logits = parts.model(**inputs, **options).logits[rows]
    return sequence, place, logits if parts.temperature == 1 else logits / parts.temperature


def tokens_again(parts: ModelParts, one: ForwardPass) -> tuple[Tensor, Tensor, Tensor, TokenBatch]:
    """The same without gradients, in the state recorded.

    Returns:
        sequence, place, logits (M, V), and what batch() said of the tokens: their actions at least.
    """
    with torch.no_grad(), as_it_was(parts, one):
        sequence, place, logits = run_again(parts, one)
    ids = one.inputs["input_ids"] if one.batch is None else one.batch.input_ids
    actions = ids.to(place.device)[sequence, place]
    said = None
    if one.batch is not None:
        said = one.batch.rows(sequence, place, torch.arange(len(place), device=place.device), actions)
    return sequence, place, logits, said or TokenBatch(actions)


def _set_random_states(states: dict[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state.cpu())
        else:
            torch.get_device_module(device).set_rng_state(state.cpu())
