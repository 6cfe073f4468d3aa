"""One update: the loss of its micro-batches, the gradient, the step; and the critic's, where there is one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lcogeom.objectives import TokenBatch
from lcogeom.recording import Probe
from lcogeom.training.buffer import Rollout, token_weights
from lcogeom.training.critic import value_losses, values_of
from lcogeom.training.head_input import head_inputs, last_layer
from lcogeom.training.learner import Learner
from lcogeom.training.replay import completion_logits
from lcogeom.training.settings import TrainSettings


class TrainingStopped(RuntimeError):
    """A loss or a gradient was not finite. The weights are as they were before this update."""


def update(
    learner: Learner,
    rollout: Rollout,
    rows: Tensor,
    step: int,
    *,
    probe: Probe | None = None,
    known: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """One optimiser step of the policy, and one of the critic. `known`: for the update's row.

    Raises:
        TrainingStopped: loss or gradient not finite; nothing was stepped.
    """
    settings, accelerator = learner.settings, learner.accelerator
    factor = rate_factor(settings, step)
    for group in learner.optimizer.param_groups:
        group["lr"] = settings.learning_rate * factor
    tokens = accelerator.reduce(rollout.sequences.action_mask[rows].sum(), "sum")
    learner.optimizer.zero_grad()
    losses, kept = [], []
    parts = rows.chunk(settings.micro_batches)
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(learner.policy):
            loss, share = policy_loss(learner, rollout, part, tokens=tokens, completions=len(rows), probe=probe)
            accelerator.backward(loss)
        losses.append(loss.detach())
        kept.append(share)
    loss = accelerator.reduce(torch.stack(losses).sum(), "mean")
    norm = clipped(learner.policy, settings.clip_norm)
    found = {**(known or {}), "learning_rate": settings.learning_rate * factor}
    if learner.intervention is not None:
        found["kept_share"] = float(accelerator.reduce(torch.stack(kept).sum(), "sum") / tokens)
    loss_value, norm_value = torch.stack(
        [loss.double(), norm.double()]
    ).tolist()  # waits for the device, once an update
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise TrainingStopped(
            f"update {step}: the loss is {loss_value:g} and its gradient's norm {norm_value:g}; stopped before "
            "the step. The batch is in the run folder's black box, lcogeom.load_run(RUN).black_box(). A lower "
            "learning_rate or clip_norm may help; --resume goes on from the last checkpoint."
        )
    if learner.critic is not None:
        found["critic_loss"] = critic_step(learner, rollout, rows, tokens, factor)
    if probe is not None:
        probe.note(found)
    learner.optimizer.step()
    return found | {"loss": loss_value, "grad_norm": norm_value}


def policy_loss(
    learner: Learner,
    rollout: Rollout,
    rows: Tensor,
    *,
    tokens: Tensor | int,
    completions: int,
    probe: Probe | None = None,
) -> tuple[Tensor, Tensor]:
    """The part of an update's loss that some rows make, differentiable; times the processes: gradients are averaged.

    Args:
        tokens: completion tokens of the whole update, in all processes.
        completions: of the whole update, in this process.

    Returns:
        (loss, number of tokens that an intervention kept), scalars.
    """
    settings, world = learner.settings, learner.accelerator.num_processes
    sequences = rollout.sequences[rows]
    with learner.precision(), head_inputs(learner.policy) as seen:
        logits = completion_logits(learner.policy, sequences)  # (M, V)
    if settings.temperature != 1:
        logits = logits / settings.temperature
    with learner.precision():  # old logits are rounded as the policy's own
        batch = rollout.token_batch(rows, logits, settings.temperature, learner.needs)
    if "ref_logits" in learner.needs:
        with torch.no_grad(), learner.precision(), learner.reference_policy() as reference:
            ref_logits = completion_logits(reference, sequences) / settings.temperature
        batch = replace(batch, ref_logits=ref_logits)
    kept = None
    counted: TokenBatch = batch
    if learner.intervention is not None:
        layer = None
        if learner.judges_steps:
            rate = float(learner.optimizer.param_groups[0]["lr"])
            layer = last_layer(
                learner.policy,
                learner.optimizer,
                seen[-1],
                sequences,
                learning_rate=rate,
                temperature=settings.temperature,
            )
        choice = learner.intervention(logits, batch, objective=learner.objective, layer=layer)
        counted, kept = choice.batch, choice.keep
    weights = token_weights(
        sequences.action_mask,
        settings.reduction,
        completions=completions * world,
        tokens=tokens,
        longest=settings.max_new_tokens,
        kept=kept,
    )  # (M,)
    loss = (weights * learner.objective.loss(logits, counted)).sum() * world
    if probe is not None:
        per_token: dict[str, Any] = {
            name: None if value is None else value[rows]
            for name in ("advantages", "advantage_ids", "ref_logprobs")
            for value in [getattr(rollout, name)]
        }
        old = torch.zeros(sequences.input_ids.shape, device=logits.device)
        assert batch.old_logprobs is not None
        old[sequences.action_mask] = batch.old_logprobs.float()
        probe.batch(
            input_ids=sequences.input_ids,
            action_mask=sequences.action_mask,
            old_logprobs=old,
            old_logits=batch.old_logits,
            loss=loss,
            summed=True,
            **per_token,
        )
    count = torch.ones_like(batch.actions).sum() if kept is None else kept.sum()
    return loss, count


def critic_step(learner: Learner, rollout: Rollout, rows: Tensor, tokens: Tensor, factor: float) -> float:
    """One optimiser step of the critic on the rows of an update; returns its mean loss per token."""
    settings, accelerator = learner.settings, learner.accelerator
    assert learner.critic is not None
    assert learner.critic_optimizer is not None
    for group in learner.critic_optimizer.param_groups:
        group["lr"] = settings.critic_learning_rate * factor
    learner.critic_optimizer.zero_grad()
    losses = []
    parts = rows.chunk(settings.micro_batches)
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(learner.critic):
            loss = critic_loss(learner, rollout, part, tokens)
            accelerator.backward(loss)
        losses.append(loss.detach())
    clipped(learner.critic, settings.clip_norm)
    learner.critic_optimizer.step()
    return float(accelerator.reduce(torch.stack(losses).sum(), "mean"))


def critic_loss(learner: Learner, rollout: Rollout, rows: Tensor, tokens: Tensor | int) -> Tensor:
    """The part of the critic's mean loss per token that some rows make, times the number of processes."""
    assert learner.critic is not None
    assert rollout.values is not None
    assert rollout.returns is not None
    sequences = rollout.sequences[rows]
    with learner.precision():
        values = values_of(learner.critic, sequences)  # (R, T)
    losses = value_losses(values, rollout.returns[rows], rollout.values[rows], learner.settings.critic_clip)
    return losses[sequences.action_mask].sum() / tokens * learner.accelerator.num_processes


def clipped(model: torch.nn.Module, longest: float | None) -> Tensor:
    """Clip the gradient's norm in place; returns what it was before, a scalar. A gradient that is not finite stays."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if longest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, longest, torch.where(norm.isfinite(), norm, 0.0))
    return norm


def rate_factor(settings: TrainSettings, step: int) -> float:
    """What the learning rate of an update is multiplied by, in (0, 1]."""
    rise = round(settings.warmup * settings.updates)
    if step < rise:
        return (step + 1) / rise
    left = (settings.updates - step) / max(1, settings.updates - rise)  # 1 at the peak, above 0 at the last update
    if settings.schedule == "linear":
        return left
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * (1 - left))) / 2
    return 1.0
