"""A training loop of one's own with the recorder on it, and the places in it where a fault can be put.

    sample -> rewards -> advantages -> old log-probabilities       once a rollout of `inner_epochs` updates
    -> logits -> token losses, weighted -> loss -> backward -> clip -> optimiser step

`Faulty.alter` passes each of those values through the fault's function of that name, where there is one. Everything
the recorder is told is what the loop believes: a fault that the loop's author would not know of is not told.
B completions, T tokens wide, V the vocabulary; entry t of (B, T) belongs to the token input_ids[:, t].
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from policies import policy
from torch import Tensor

import lcogeom as lg
from lcogeom.models import LoadedModel
from lcogeom.training.advantages import sequence_advantages
from lcogeom.training.rollout import Sequences, generate, pad_id, side_by_side
from lcogeom.training.sampling import gold_samples, seed_of
from lcogeom.training.tasks import Task, load_task

PROMPTS, SAMPLES = 8, 8

ADVANTAGES = {"ppo": "whitened", "grpo": "group", "reinforce": "reinforce-mean", "sft": "none"}
OPTIONS: Mapping[str, Mapping[str, object]] = {
    "grpo": {"beta": 0.0},
    "lco-kld": {"beta": 2.0},
    "lco-mse": {"beta": 2.0},
}


@dataclass(frozen=True)
class Setup:
    """One loop's settings."""

    model: str = "tiny"
    objective: str = "grpo"
    options: Mapping[str, object] = field(default_factory=dict)
    """Of the objective, over those of OPTIONS."""
    task: str = "arithmetic"
    updates: int = 28
    inner_epochs: int = 2
    """Updates on one rollout."""
    learning_rate: float = 1e-4
    warmup: int = 4
    """Updates in which the learning rate rises."""
    schedule: str = "constant"
    """Or "linear" or "cosine", to 0."""
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    reduction: str = "token"
    """`token`: mean over the update's completion tokens; `sequence`: over each completion, then over completions."""
    accumulation: int = 1
    """Backward passes of one update."""
    dtype: str = "float32"
    """Of the weights."""
    optimizer: str = "adamw"
    """Or "sgd"."""
    tap: str = "auto"
    told: bool = True
    """Whether advantages and old log-probabilities are told to the recorder."""
    max_new_tokens: int = 5
    prompts: int = PROMPTS
    samples: int = SAMPLES
    """Completions of each prompt."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam."""
    momentum: float = 0.0
    """Of SGD."""
    advantages: str | None = None
    """A name that `sequence_advantages` knows; None: the objective's own of ADVANTAGES."""
    entropy_bonus: float = 0.0
    """Times the mean entropy of the completion tokens, taken from the loss."""


@dataclass(eq=False)
class Now:
    """What a fault may look at and change."""

    setup: Setup
    model: Any
    optimizer: torch.optim.Optimizer
    tokenizer: Any
    objective: lg.Objective
    draw: torch.Generator
    step: int = 0
    since: int = 0
    """Updates since the fault's first; 0 at its first."""
    sequences: Sequences | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    """(B, T), of the sequences in hand."""
    logits: Tensor | None = None
    """(B, T, V), entry t predicted by position t - 1; with their graph."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """The weights before the first update."""
    kept: dict[str, Any] = field(default_factory=dict)
    """A fault's own memory."""


Alter = Callable[[Any, Now], Any]
"""(value, now) -> value, at one place of the loop."""
PLACES = (
    "before_rollout", "renew", "temperature", "problems", "samples", "rewards", "advantages", "old_logprobs", "rate",
    "parts", "logits", "mask", "before_update", "objective", "token_losses", "weights", "loss", "scale",
    "backward_done", "before_step", "after_step",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Rollout:
    sequences: Sequences
    rewards: Tensor
    """(B,)."""
    advantages: Tensor
    """(B, T)."""
    old_logits: Tensor
    """(B, T, V), as Now.logits."""
    old_logprobs: Tensor
    """(B, T)."""
    ref_logprobs: Tensor | None
    """(B, T), of the starting weights; None without a penalty."""


def run(
    setup: Setup, folder: Path, *, seed: int, cache: Path, at: Mapping[str, Alter] | None = None, first: int = 0
) -> None:
    """Train and record into `folder`.

    Args:
        at: the fault: place -> what happens there, from update `first` on.
    """
    at = at or {}
    assert at.keys() <= set(PLACES)
    torch.manual_seed(seed)
    loaded = policy(setup.model, cache)
    model = loaded.model.to(getattr(torch, setup.dtype))
    if setup.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=setup.learning_rate, momentum=setup.momentum
        )
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=setup.learning_rate, betas=setup.betas, weight_decay=setup.weight_decay
        )
    objective = lg.objective(setup.objective, **{**OPTIONS.get(setup.objective, {}), **setup.options})
    now = Now(setup, model, optimizer, loaded.tokenizer, objective, torch.Generator().manual_seed(seed))

    now.start = {name: value.clone() for name, value in model.state_dict().items()}

    def alter(place: str, value: Any) -> Any:
        return at[place](value, now) if place in at and now.step >= first else value

    with lg.attach(
        model, optimizer, run=folder, objective=objective, tokenizer=loaded.tokenizer, sketch=4096, tap=setup.tap,
        flush_every=50, seed=seed,
    ) as probe:  # fmt: skip
        task = load_task(setup.task, characters=True)
        rollout = None
        for step in range(setup.updates):
            now.step, now.since = step, step - first
            alter("before_rollout", None)
            if rollout is None or alter("renew", step % setup.inner_epochs == 0):
                rollout = make_rollout(loaded, task, seed_of(seed, step), now, alter)
            update(rollout, now, probe, alter)


def make_rollout(loaded: LoadedModel, task: Task, seed: int, now: Now, alter: Callable[[str, Any], Any]) -> Rollout:
    setup = now.setup
    now.model.eval()
    if setup.objective == "sft":
        samples = gold_samples(loaded.tokenizer, task.draw(setup.prompts * setup.samples, seed), None)
    else:
        problems = alter("problems", [p for p in task.draw(setup.prompts, seed) for _ in range(setup.samples)])
        samples = generate(
            now.model, loaded.tokenizer, problems, max_new_tokens=setup.max_new_tokens, seed=seed,
            temperature=alter("temperature", 1.0),
        )  # fmt: skip
    samples = alter("samples", samples)
    sequences = side_by_side(samples, pad_id(loaded.tokenizer), now.model.device)
    now.sequences = sequences
    now.rewards = alter("rewards", torch.tensor([sample.reward for sample in samples]))
    advantages = alter("advantages", advantages_of(now).double()[:, None].expand(sequences.input_ids.shape).clone())
    with torch.no_grad():
        old_logits = shifted_logits(now)
    old = alter("old_logprobs", logprobs_of(old_logits, sequences.input_ids))
    ref = None
    if setup.options.get("beta") and setup.objective == "grpo":
        with weights_swapped(now.model, now.start), torch.no_grad():
            ref = logprobs_of(shifted_logits(now), sequences.input_ids)
    return Rollout(sequences, now.rewards, advantages, old_logits, old, ref)


@contextlib.contextmanager
def weights_swapped(model: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights for a while."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(kept)


def advantages_of(now: Now) -> Tensor:
    """(B,) float64."""
    assert now.rewards is not None
    rewards = now.rewards.double()
    kind = now.setup.advantages or ADVANTAGES.get(now.setup.objective, "rule")
    if kind == "none":
        return torch.ones_like(rewards)
    if kind == "whitened":
        return (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    groups = torch.arange(len(rewards)) // now.setup.samples
    return sequence_advantages(kind, rewards, groups)


def shifted_logits(now: Now) -> Tensor:
    """(B, T, V): entry t predicts input_ids[:, t]; entry 0 is 0."""
    assert now.sequences is not None
    sequences = now.sequences
    logits = now.model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask, use_cache=False).logits
    return torch.nn.functional.pad(logits[:, :-1], (0, 0, 1, 0)).float()


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, T) float64: log-probability of each token."""
    return torch.log_softmax(logits.double(), -1).gather(2, ids[:, :, None]).squeeze(2)


def update(rollout: Rollout, now: Now, probe: lg.Probe, alter: Callable[[str, Any], Any]) -> None:
    """One optimiser step."""
    setup, optimizer, model = now.setup, now.optimizer, now.model
    rate = setup.learning_rate * min(1.0, (now.step + 1) / (setup.warmup + 1))
    if setup.schedule == "linear":
        rate *= 1 - now.step / setup.updates
    elif setup.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * now.step / setup.updates)) / 2
    for group in optimizer.param_groups:
        group["lr"] = alter("rate", rate)
    alter("before_update", None)
    now.sequences, now.rewards, now.advantages, now.logits = (
        rollout.sequences,
        rollout.rewards,
        rollout.advantages,
        None,
    )
    optimizer.zero_grad()
    total = int(rollout.sequences.action_mask.sum())
    for rows in alter("parts", torch.arange(len(rollout.rewards)).chunk(setup.accumulation)):
        sequences = now.sequences = rollout.sequences[rows]
        now.rewards, now.advantages = rollout.rewards[rows], rollout.advantages[rows]
        now.logits = alter("logits", shifted_logits(now))
        told = sequences.action_mask
        mask = alter("mask", told)  # (B, T): what the loss runs over
        batch = lg.TokenBatch(
            actions=sequences.input_ids[mask],
            advantages=rollout.advantages[rows][mask],
            old_logprobs=rollout.old_logprobs[rows][mask],
            old_logits=rollout.old_logits[rows][mask],
            ref_logprobs=None if rollout.ref_logprobs is None else rollout.ref_logprobs[rows][mask],
        )
        objective = alter("objective", now.objective)
        losses = alter("token_losses", objective.loss(now.logits[mask], batch).double())  # (M,)
        if setup.reduction == "token":
            weights = torch.full(mask.shape, 1 / (total if mask is told else int(mask.sum())), dtype=torch.float64)
        else:
            weights = (1 / mask.sum(1).clamp(min=1) / len(rollout.rewards))[:, None].double().expand(mask.shape).clone()
        weights = alter("weights", weights)
        loss = (weights[mask] * losses).sum()
        if setup.entropy_bonus:
            logp = torch.log_softmax(now.logits[mask].double(), 1)
            loss = loss + setup.entropy_bonus * (weights[mask] * (logp.exp() * logp).sum(1)).sum()
        loss = alter("loss", loss)
        known = {"advantages": rollout.advantages[rows], "old_logprobs": rollout.old_logprobs[rows]}
        if rollout.ref_logprobs is not None:
            known["ref_logprobs"] = rollout.ref_logprobs[rows]
        if not setup.told or setup.objective == "sft":
            known = {}
        probe.batch(
            input_ids=sequences.input_ids,
            action_mask=told,
            old_logits=rollout.old_logits[rows][told],
            loss=loss,
            summed=True,
            **known,
        )
        alter("scale", loss).backward()
    alter("backward_done", None)
    if setup.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), setup.clip_norm)
    if setup.objective != "sft":
        probe.note({"reward": float(rollout.rewards.mean())})
    alter("before_step", None)
    optimizer.step()
    alter("after_step", None)
