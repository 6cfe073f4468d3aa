"""Ways in which real loops call a model: padded, packed, checkpointed, under autocast, in several passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

import lcogeom as lg
from tests.small_models import Task, make_task

Model = transformers.PreTrainedModel


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass of a loop."""

    inputs: dict[str, Any]
    """As the model is called."""
    ids: Tensor
    mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    """(B, T) each."""
    old_logits: Tensor | None = None
    """(M, V), at the masked tokens."""

    def tokens(self) -> lg.TokenBatch:
        mask = self.mask
        return lg.TokenBatch(self.ids[mask], self.advantages[mask], self.old_logprobs[mask], old_logits=self.old_logits)

    def logits(self, model: Callable[..., Any]) -> Tensor:
        """(M, V), of the completion tokens."""
        every = model(**self.inputs).logits
        sequence, place = self.mask.nonzero(as_tuple=True)
        return every[sequence, place - 1 - self.ids.shape[1]]

    def tell(self, probe: lg.Probe, loss: Tensor | None) -> None:
        probe.batch(
            input_ids=self.ids,
            action_mask=self.mask,
            advantages=self.advantages,
            old_logprobs=self.old_logprobs,
            old_logits=self.old_logits,
            loss=loss,
        )


@dataclass(frozen=True, eq=False)
class Scene:
    """One way of training."""

    passes: Callable[[Task], list[Pass]]
    prepare: Callable[[Model], object] = lambda model: None
    running: Callable[[torch.device], Any] = lambda device: nullcontext()
    """Around forward passes and losses."""
    together: bool = False
    """One backward pass for all forward passes; else one each, divided by their number."""
    between: Callable[[Model, Pass], object] = lambda model, one: None
    """After each forward pass, before its backward pass."""
    low: bool = False
    """Whether logits have 8 bits only."""


def plain(task: Task) -> list[Pass]:
    return [_pass(task, {"input_ids": task.input_ids})]


def right_padding(task: Task) -> list[Pass]:
    """Rows of different lengths, padded with token 0."""
    lengths = task.mask.shape[1] - torch.arange(len(task.mask), device=task.mask.device) % 3
    attention = (torch.arange(task.mask.shape[1], device=task.mask.device)[None] < lengths[:, None]).long()
    ids = task.input_ids * attention
    return [_pass(task, {"input_ids": ids, "attention_mask": attention}, ids=ids)]


def left_padding(task: Task) -> list[Pass]:
    """The same, shifted to the right end; positions count from the first real token."""
    [right] = right_padding(task)
    attention = right.inputs["attention_mask"]
    shifts = (1 - attention).sum(1).tolist()

    def shift(rows: Tensor) -> Tensor:
        return torch.stack([row.roll(by) for row, by in zip(rows, shifts, strict=True)])

    ids, attention = shift(right.ids), shift(attention)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    return [Pass(inputs, ids, shift(right.mask), shift(right.advantages), shift(right.old_logprobs))]


def packed(task: Task) -> list[Pass]:
    """All sequences in one row; positions start again at each."""
    length = task.input_ids.shape[1]
    one = [t.reshape(1, -1) for t in (task.input_ids, task.mask, task.advantages, task.old_logprobs)]
    positions = torch.arange(length, device=task.input_ids.device).repeat(len(task.input_ids))[None]
    return [Pass({"input_ids": one[0], "position_ids": positions, "use_cache": False}, *one)]


def kept(task: Task) -> list[Pass]:
    """Logits of the completion alone (its first token is at place 4)."""
    return [_pass(task, {"input_ids": task.input_ids, "logits_to_keep": task.input_ids.shape[1] - 3})]


def halves(task: Task) -> list[Pass]:
    return [plain(task.rows(slice(start, start + 2)))[0] for start in (0, 2)]


def checkpointed(reentrant: bool) -> Callable[[Model], object]:
    def prepare(model: Model) -> None:
        model.train()  # checkpoints are for training alone; these models have no dropout
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    return prepare


def evaluate(model: Model, one: Pass) -> None:
    """Two evaluations in the middle of an update: without gradients, and in eval mode with them."""
    other = {**one.inputs, "input_ids": one.ids.flip(1)}
    with torch.no_grad():
        model(**other)
    mode = model.training
    model.eval()
    model(**other).logits.square().mean()
    model.train(mode)


@contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield


SCENES = {
    "plain": Scene(plain),
    "right padding": Scene(right_padding),
    "left padding": Scene(left_padding),
    "packed": Scene(packed),
    "logits_to_keep": Scene(kept),
    "checkpointing, reentrant": Scene(plain, prepare=checkpointed(True)),
    "checkpointing": Scene(plain, prepare=checkpointed(False)),
    "autocast bf16": Scene(plain, running=autocast, low=True),
    "bf16": Scene(plain, prepare=lambda model: model.bfloat16(), low=True),
    "accumulation": Scene(halves),
    "two passes, one loss": Scene(halves, together=True),
    "evaluation between": Scene(halves, between=evaluate),
}


def one_update(
    scene: Scene,
    model: Model,
    optimizer: torch.optim.Optimizer,
    *,
    passes: list[Pass],
    objective: lg.Objective,
    probe: lg.Probe | None = None,
    call: Callable[..., Any] | None = None,
) -> list[Tensor]:
    """One optimiser step; the mean loss of each pass. call: what is called in the model's place (a compiled one)."""
    optimizer.zero_grad()
    device = passes[0].ids.device
    losses = []
    for one in passes:
        with scene.running(device):
            losses.append(objective.loss(one.logits(model if call is None else call), one.tokens()).mean())
        if probe is not None:
            one.tell(probe, losses[-1])
        scene.between(model, one)
        if not scene.together:
            (losses[-1] / len(passes)).backward()
    if scene.together:
        torch.stack(losses).mean().backward()
    optimizer.step()
    return [loss.detach() for loss in losses]


@dataclass
class FusedOutput(transformers.utils.ModelOutput):
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


def fuse(model: Model) -> None:
    """Replace the model's forward by one that returns what TRL's fused head does: (B, T - 1) each, no logits."""

    def forward(input_ids: Tensor, **inputs: Any) -> FusedOutput:
        hidden = model.model(input_ids=input_ids, **inputs).last_hidden_state[:, :-1]
        logp = torch.log_softmax(model.lm_head(hidden).float(), 2)
        picked = logp.gather(2, input_ids[:, 1:, None]).squeeze(2)
        return FusedOutput(picked, -(logp.exp() * logp).sum(2).detach(), (2 * logp).logsumexp(2).detach())

    model.forward = forward  # type: ignore[method-assign]


def one_fused_update(
    scene: Scene, model: Model, optimizer: torch.optim.Optimizer, *, passes: list[Pass], probe: lg.Probe
) -> None:
    """PPO from the log-probabilities of a fused head."""
    optimizer.zero_grad()
    losses = []
    for one in passes:
        shifted = one.mask[:, 1:]
        advantage = one.advantages[:, 1:][shifted]
        ratio = (model(**one.inputs).log_probs[shifted] - one.old_logprobs[:, 1:][shifted]).exp()
        losses.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean())
        one.tell(probe, losses[-1])
        if not scene.together:
            (losses[-1] / len(passes)).backward()
    if scene.together:
        torch.stack(losses).mean().backward()
    optimizer.step()


def task_for(model: Model) -> Task:
    return make_task(model, sequences=4, length=12)


def sampled_from(logits: Tensor, one: Pass) -> Pass:
    """The pass with an old policy near the logits (M, V)."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
    return replace(one, old_logits=logits.detach().float() + 0.3 * noise)


def _pass(task: Task, inputs: dict[str, Any], ids: Tensor | None = None) -> Pass:
    return Pass(inputs, task.input_ids if ids is None else ids, task.mask, task.advantages, task.old_logprobs)
