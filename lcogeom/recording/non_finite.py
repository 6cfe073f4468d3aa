"""Which tensor of an update was the first that is not finite: its passes run again with a hook on every module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lcogeom.objectives import Objective
from lcogeom.recording.passes import ForwardPass, ModelParts, as_it_was, run_again
from lcogeom.recording.ranks import local
from lcogeom.runs.black_box import NonFinite


def first_non_finite(
    parts: ModelParts, passes: Sequence[ForwardPass], objective: Objective | None
) -> tuple[NonFinite | None, str]:
    """Run passes again, with the weights that the model has now, until a tensor is not finite.

    Parameters, buffers, gradients, modes and random numbers are left as they were. Waits for the device.

    Returns:
        (what was found, how it was found or why nothing was).
    """
    note = "every pass of the update ran again without a non-finite value"
    for part, one in enumerate(passes):
        try:
            with as_it_was(parts, one), _without_checkpointing(parts.model):
                found, missing = _search(parts, one, objective, part)
        except Exception as error:  # user's modules run here: whatever they raise must not stop the training
            return None, f"pass {part} could not run again: {type(error).__name__}: {error}"
        if found is not None:
            return found, "the update's passes ran again, with its weights from before the step"
        note = missing or note
    return None, note


def kind_of(tensor: Tensor) -> str | None:
    """'nan', 'inf' or 'nan and inf'; None where all is finite. Waits for the device."""
    kinds = [name for name, bad in (("nan", tensor.isnan()), ("inf", tensor.isinf())) if bool(bad.any())]
    return " and ".join(kinds) or None


def describe(what: str, name: str, tensor: Tensor, part: int | None) -> NonFinite | None:
    """The finding for a tensor; None where it is finite."""
    tensor = local(tensor.detach())  # of a sharded one, what this process holds: it asks alone
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return None
    share = float((~torch.isfinite(tensor)).double().mean())
    return NonFinite(what, name, kind_of(tensor) or "nan", share, part)


def _search(
    parts: ModelParts, one: ForwardPass, objective: Objective | None, part: int
) -> tuple[NonFinite | None, str]:
    """(what one pass shows, what could not be looked at)."""
    parameters = [(name, p) for name, p in parts.model.named_parameters() if p.requires_grad]
    with torch.enable_grad(), _Watch(parts.model, part) as watch:
        sequence, place, logits = run_again(parts, one)
        found = watch.first or describe("logits", "of the completion tokens", logits, part)
        if found is not None:
            return found, ""
        if objective is None or one.batch is None:
            return None, "the forward pass is finite; without objective and batch() the loss cannot run again"
        everything = torch.arange(len(place), device=place.device)
        batch = one.batch.rows(sequence, place, everything, one.batch.input_ids.to(place.device)[sequence, place])
        assert batch is not None
        losses = objective.loss(logits, batch)
        if (found := describe("loss", "", losses, part)) is not None:
            row = int((~torch.isfinite(losses)).nonzero()[0])
            start = int(place[sequence == sequence[row]].min())
            name = f"sequence {int(sequence[row])}, position {int(place[row]) - start}, token {int(batch.actions[row])}"
            return replace(found, name=name), ""
        gradients = torch.autograd.grad(losses.mean(), [p for _, p in parameters], allow_unused=True)
    named = reversed(list(zip(parameters, gradients, strict=True)))
    bad = (describe("gradient", name, gradient, part) for (name, _), gradient in named if gradient is not None)
    found = watch.first or next((one for one in bad if one is not None), None)
    return found, (
        "the pass and its gradient are finite under the objective named at attach(): the non-finite value comes from "
        "the loop's own loss, from loss scaling, or from a sum over passes"
    )


class _Watch:
    """Hooks on every module for one forward and backward pass."""

    def __init__(self, model: torch.nn.Module, part: int) -> None:
        self.first: NonFinite | None = None
        self._part = part
        self._handles = [
            module.register_forward_hook(self._after(name or type(model).__name__))
            for name, module in model.named_modules()
        ]

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _after(self, name: str) -> Any:
        def hook(module: torch.nn.Module, _: object, output: Any) -> None:
            for tensor in _tensors(output):
                if self.first is None and (found := describe("output", name, tensor, self._part)) is not None:
                    weights = (
                        describe("weight", f"{name}.{own}", weight, self._part)
                        for own, weight in module.named_parameters(recurse=False)
                    )
                    self.first = next((weight for weight in weights if weight is not None), found)
                if tensor.requires_grad:
                    tensor.register_hook(self._arrived(name))

        return hook

    def _arrived(self, name: str) -> Any:
        def hook(gradient: Tensor) -> None:
            if self.first is None:
                self.first = describe("gradient", f"output of {name}", gradient, self._part)

        return hook


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a module's output: alone, in a tuple, or in a transformers output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (value for value in output.values() if isinstance(value, Tensor))
    elif isinstance(output, (tuple, list)):
        yield from (value for value in output if isinstance(value, Tensor))


@contextmanager
def _without_checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """The reentrant kind of gradient checkpointing knows no torch.autograd.grad."""
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]
