"""Two objectives on the batch of a recorded update: the same tokens and weights, two gradients and curvatures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lcogeom.curvature.differences import total_gradient
from lcogeom.curvature.gauss_newton import pushing_route
from lcogeom.objectives import Objective, TokenBatch
from lcogeom.objectives import objective as objective_by_name
from lcogeom.recording.gradients import layer_of
from lcogeom.recording.head import output_head
from lcogeom.recording.passes import ForwardPass, ModelParts, as_it_was, run_again, tokens_again
from lcogeom.recording.snapshot import recorded_pass
from lcogeom.runs.black_box import RecordedBatch


@dataclass(frozen=True)
class ObjectiveOnBatch:
    """The mean of one objective over the batch's completion tokens."""

    objective: str
    loss: float
    logit_grad_norm: float
    """Euclidean norm of its gradient in the logits, over all tokens."""
    grad_norm: float
    """Of its gradient in the model's trainable parameters."""
    layers: Mapping[str, float]
    """The same of each layer's part."""
    convex_share: float
    """Share of the tokens at which it is convex in the logits."""
    lowest: float
    """The lowest eigenvalue of its Hessian in the logits, over all tokens' matrices (without what couples tokens)."""
    highest: float
    gauss_newton: float
    """g^T J^T H_z J g / g^T g: curvature along its own gradient, as far as it comes through the logits."""


@dataclass(frozen=True)
class ObjectiveComparison:
    """What two objectives make of the same batch."""

    step: int
    tokens: int
    a: ObjectiveOnBatch
    b: ObjectiveOnBatch
    logit_cosine: float
    """Of the two gradients in the logits."""
    grad_cosine: float
    """Of the two gradients in the parameters."""
    layer_cosines: Mapping[str, float]
    opposed: float
    """Share of the tokens whose action's logit one pushes up and the other down."""
    notes: tuple[str, ...]


def compare_objectives(
    batches: RecordedBatch | Sequence[RecordedBatch],
    model: torch.nn.Module,
    a: str | Objective,
    b: str | Objective,
) -> ObjectiveComparison:
    """Take the gradients and curvatures of two objectives on one update's batch of the black box.

    Costs for each objective a gradient, a Jacobian-vector product and a few forward passes that choose how that is
    computed. Parameters, modes, buffers and random numbers of the model end as they were.

    Args:
        batches: one of `run.black_box()[-1].batches`, or all those of one update.
        model: a causal LM of the same architecture, with the weights to compare at (`BlackBoxEntry.load_weights`).
        a, b: registry names, or objectives. Where one needs old logits or old log-probabilities that were not
            recorded, those of the given weights stand in: exact on the first update on a rollout; `notes` says so.

    Raises:
        ValueError: batches of several updates; an objective lacks a field such as advantages; logits that are not
            finite; an input was left out of the record.
        TypeError: not a causal LM of transformers.
    """
    recorded = [batches] if isinstance(batches, RecordedBatch) else list(batches)
    steps = sorted({one.step for one in recorded})
    if len(steps) != 1:
        raise ValueError(f"batches: of updates {steps}; give those of one update.")
    objectives = [objective_by_name(one) if isinstance(one, str) else one for one in (a, b)]
    parts = ModelParts(model, output_head(model), recorded[0].temperature)
    passes = [recorded_pass(one) for one in recorded]
    found = [_tokens_of(parts, one) for one in passes]
    batch = _Batch(
        functions=[_logits_of(parts, one) for one in passes],
        logits=[logits for logits, _, _ in found],
        tokens=[tokens for _, tokens, _ in found],
        params={name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad},
    )
    if any(not bool(logits.isfinite().all()) for logits in batch.logits):
        raise ValueError("model: its logits on this batch are not finite; load the weights from before the update.")
    first, second = (_on_batch(objective, batch) for objective in objectives)
    pushes = [_at_actions(one.pulls, batch.tokens) for one in (first, second)]
    return ObjectiveComparison(
        step=steps[0],
        tokens=batch.count,
        a=first.numbers,
        b=second.numbers,
        logit_cosine=_cosine(first.pulls, second.pulls),
        grad_cosine=_cosine(list(first.gradient.values()), list(second.gradient.values())),
        layer_cosines={layer: _cosine(part, second.layers[layer]) for layer, part in first.layers.items()},
        opposed=float((pushes[0] * pushes[1] < 0).double().mean()),
        notes=tuple(dict.fromkeys(note for _, _, notes in found for note in notes)),
    )


@dataclass(frozen=True, eq=False)
class _Batch:
    """One update's passes under a model."""

    functions: list[Callable[[], Tensor]]
    """() -> (N, V), for each pass."""
    logits: list[Tensor]
    """What they give, float64."""
    tokens: list[TokenBatch]
    params: dict[str, Tensor]

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))


@dataclass(frozen=True, eq=False)
class _Found:
    """Numbers of one objective, and the gradients they are of."""

    numbers: ObjectiveOnBatch
    gradient: dict[str, Tensor]
    pulls: list[Tensor]
    """(N, V) of each pass: the gradient in the logits."""

    @property
    def layers(self) -> dict[str, list[Tensor]]:
        return _by_layer(self.gradient)


def _on_batch(objective: Objective, batch: _Batch) -> _Found:
    losses = [partial(_mean, objective, run, some, batch.count) for run, some in _pairs(batch)]
    params = list(batch.params.values())
    gradient = total_gradient(losses, params)
    pulls = [objective.gradient(z, some) / batch.count for z, some in zip(batch.logits, batch.tokens, strict=True)]
    size = _norm(gradient)
    direction = [part / size for part in gradient] if size else []
    along, convex, low, high = 0.0, 0, math.inf, -math.inf
    for (run, some), z in zip(_pairs(batch), batch.logits, strict=True):
        hessian = objective.hessian(z, some)
        lowest, highest = hessian.eigenvalue_range()
        convex += int(hessian.is_convex().sum())
        low, high = min(low, float(lowest.min())), max(high, float(highest.max()))
        if direction:
            _, moved = pushing_route(run, params, direction)(run, params, direction)
            along += float(objective.joint_hessian(z, some).quadratic(moved)) / batch.count
    named = dict(zip(batch.params, gradient, strict=True))
    loss = sum(float(objective.loss(z, some).sum()) for z, some in zip(batch.logits, batch.tokens, strict=True))
    numbers = ObjectiveOnBatch(
        objective=repr(objective),
        loss=loss / batch.count,
        logit_grad_norm=_norm(pulls),
        grad_norm=size,
        layers={layer: _norm(parts) for layer, parts in _by_layer(named).items()},
        convex_share=convex / batch.count,
        lowest=low,
        highest=high,
        gauss_newton=along,
    )
    return _Found(numbers, named, pulls)


def _pairs(batch: _Batch) -> list[tuple[Callable[[], Tensor], TokenBatch]]:
    return list(zip(batch.functions, batch.tokens, strict=True))


def _mean(objective: Objective, run: Callable[[], Tensor], tokens: TokenBatch, count: int) -> Tensor:
    return objective.loss(run(), tokens).sum() / count


def _by_layer(gradient: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    layers: dict[str, list[Tensor]] = {}
    for name, part in gradient.items():
        layers.setdefault(layer_of(name), []).append(part)
    return layers


def _logits_of(parts: ModelParts, one: ForwardPass) -> Callable[[], Tensor]:
    """() -> (N, V), the same at every call."""

    def run() -> Tensor:
        with as_it_was(parts, one):
            return run_again(parts, one)[2]

    return run


def _tokens_of(parts: ModelParts, one: ForwardPass) -> tuple[Tensor, TokenBatch, list[str]]:
    """(logits (N, V) float64, what batch() said of the completion tokens, what stands in for what it did not)."""
    sequence, _, logits, tokens = tokens_again(parts, one)
    tokens = replace(tokens, sequences=sequence)
    notes = []
    if tokens.old_logits is None:
        tokens = replace(tokens, old_logits=logits)
        notes.append("old logits were not recorded: those of the given weights stand in where an objective needs them")
    if tokens.old_logprobs is None:
        picked = torch.log_softmax(logits.float(), 1).gather(1, tokens.actions[:, None]).squeeze(1)
        tokens = replace(tokens, old_logprobs=picked)
        notes.append("old log-probabilities were not recorded: those of the given weights stand in, every ratio is 1")
    return logits.double(), tokens, notes


def _at_actions(pulls: Sequence[Tensor], batches: Sequence[TokenBatch]) -> Tensor:
    picked = [pull.gather(1, some.actions[:, None]).squeeze(1) for pull, some in zip(pulls, batches, strict=True)]
    return torch.cat(picked)


def _norm(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def _cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """NaN where one is 0."""
    size = _norm(one) * _norm(other)
    along = sum(float((x.double() * y.double()).sum()) for x, y in zip(one, other, strict=True))
    return along / size if size else math.nan
