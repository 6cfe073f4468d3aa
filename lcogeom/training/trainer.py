"""The method, top to bottom: rollout, rewards, advantages, old policy, inner epochs, evaluation, checkpoint.

    for each rollout:
        problems -> completions -> rewards r (B,) -> advantages A (B, T)         make_rollout, with_advantages
        what the objective will ask of the old policy and of the reference       with_policies
        for each inner epoch, for each mini-batch: one update                    update
            the sum over its micro-batches of sum_t w_t f_t(logits)              policy_loss
    held-out reward now and then, checkpoints now and then

B completions of this process, T tokens wide, M completion tokens among them, V the vocabulary. An update is one
optimiser step. Every random number follows from the seed and the rollout's number, so a run can go on from any rollout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lcogeom.models import LoadedModel
from lcogeom.training import checkpoint, run_folder
from lcogeom.training.advantages import gae, informative_groups, overlong_penalty, sequence_advantages
from lcogeom.training.buffer import Rollout, logprobs_of
from lcogeom.training.critic import values_of
from lcogeom.training.dense_rollout import dense_advantages
from lcogeom.training.learner import Learner, build_learner
from lcogeom.training.old_policy import keep_old_policy
from lcogeom.training.replay import completion_logits
from lcogeom.training.rollout import Sample, pad_id, side_by_side
from lcogeom.training.sampling import accuracy, gold_samples, sample_all, seed_of
from lcogeom.training.settings import DENSE_ADVANTAGES, SEQUENCE_ADVANTAGES, TrainSettings
from lcogeom.training.tasks import Task, load_task
from lcogeom.training.update import update

Progress = Callable[[Mapping[str, object]], None]
"""Called with each update's row (column of `updates` -> value) when it is known."""
FLUSH_EVERY, FLUSH_SECONDS = 10, 60.0  # rollouts, s
PROBLEMS, SAMPLES, SHUFFLE, HELD_OUT = range(4)  # what a seed is for


def train(
    settings: TrainSettings,
    run: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    loaded: LoadedModel | None = None,
    labels: Mapping[str, str | int | float] | None = None,
    log: str | None = None,
) -> Path:
    """Train, and record every update into the run folder; checkpoints lie in it, too.

    With several processes (`accelerate launch`, torchrun) each of them calls this.

    Args:
        run: folder to create; with `resume`, one to go on in from its last checkpoint, from the start if it has none.
        progress: called by process 0.
        loaded: the model and tokenizer to train, in place of `settings.model`.
        labels: kept with the run; columns of their own when several runs are read together. A resumed run has its own.
        log: `tensorboard`, `wandb` or `trackio`: the rows of `updates` go there as well.

    Returns:
        The run folder.

    Raises:
        FileExistsError: `run` exists, without `resume`.
        FileNotFoundError, ValueError: a model, task or settings that cannot be used.
        TrainingStopped: a loss or a gradient was not finite. The black box in the run folder has its batch.
    """
    run = Path(run)
    run_folder.require(run, settings, resume)
    there = run.exists()
    task = load_task(settings.task, held_out=settings.held_out, template=settings.template)
    learner = build_learner(settings, loaded)
    step = checkpoint.load(learner, run) if there else 0
    tell = run_folder.teller(learner, run, progress, log)
    labels = {"seed": settings.seed, "model": settings.model, "task": settings.task, **(labels or {})}
    with run_folder.recorder(learner, run, step, there=there, labels=labels, on_row=tell) as probe:
        flushed = time.monotonic()
        while step < settings.updates:
            number = step // settings.updates_per_rollout
            began, known = time.monotonic(), dict[str, float]()
            if step % settings.evaluate_every < settings.updates_per_rollout:
                known["heldout_reward"] = evaluate(learner, task)
                began = time.monotonic()
            rollout = with_policies(learner, with_advantages(learner, make_rollout(learner, task, number)))
            known |= {
                "rollouts": float((number + 1) * settings.rollout_size),
                "rollout_seconds": time.monotonic() - began,
            }
            if settings.completions == "sampled":
                known["reward"] = float(learner.accelerator.reduce(rollout.rewards.mean(), "mean"))
            for rows in inner_batches(learner, number):
                found = update(learner, rollout, rows, step, probe=probe, known=known)
                step += 1
                if step == settings.updates:
                    last = {"heldout_reward_after": evaluate(learner, task)}
                    found |= last
                    if probe is not None:
                        probe.note(last, done=True)
                if probe is not None:
                    probe.collect()
                else:
                    tell({"step": step - 1, **found})
                known.pop("heldout_reward", None)
            due = settings.checkpoint_every and step % settings.checkpoint_every < settings.updates_per_rollout
            save = due or step == settings.updates
            waited = torch.tensor(time.monotonic() - flushed, device=learner.device)
            late = (
                float(learner.accelerator.reduce(waited, "mean")) > FLUSH_SECONDS
            )  # clocks differ; all flush together
            if probe is not None and (save or late or (number + 1) % FLUSH_EVERY == 0):
                probe.flush()  # a resumed recording goes on where the checkpoint does
                flushed = time.monotonic()
            if save:
                checkpoint.save(learner, run, step)
    for tracker in learner.accelerator.trackers:  # end_training() would end the process group, too
        tracker.finish()
    return run


# rollout, rewards, advantages -----------------------------------------------------------------------------------------


def make_rollout(learner: Learner, task: Task, number: int) -> Rollout:
    """Completions of this process's share of the problems, scored. rewards (B,)."""
    settings, accelerator = learner.settings, learner.accelerator
    world, rank = accelerator.num_processes, accelerator.process_index
    if settings.completions == "gold":
        share = settings.rollout_size // world
        problems = task.draw(settings.rollout_size, seed_of(settings.seed, PROBLEMS, number))
        samples = gold_samples(learner.tokenizer, problems[rank * share : (rank + 1) * share], settings.stop)
    else:
        samples = sample_round(learner, task, number, 0)
        for again in range(1, settings.dynamic_sampling + 1):
            rewards, groups = rewards_of(samples, learner.device), groups_of(learner)
            dull = ~informative_groups(rewards, groups)  # (B,)
            if not int(accelerator.reduce(dull.sum(), "sum")):
                break
            fresh = sample_round(learner, task, number, again)
            lively = informative_groups(rewards_of(fresh, learner.device), groups)
            samples = exchange_groups(samples, dull.tolist(), fresh, lively.tolist(), settings.samples)
    sequences = side_by_side(samples, pad_id(learner.tokenizer), learner.device)
    rewards = rewards_of(samples, learner.device)
    if settings.overlong_buffer:
        lengths = sequences.action_mask.sum(1)
        rewards = rewards + overlong_penalty(
            lengths, longest=settings.max_new_tokens, buffer=settings.overlong_buffer
        ).to(rewards)
    return Rollout(samples, sequences, rewards)


def sample_round(learner: Learner, task: Task, number: int, again: int) -> list[Sample]:
    """`samples` completions of each of this process's problems, those of one problem side by side."""
    settings, accelerator = learner.settings, learner.accelerator
    share = settings.prompts // accelerator.num_processes
    first = accelerator.process_index * share
    problems = task.draw(settings.prompts, seed_of(settings.seed, PROBLEMS, number, again))[first : first + share]
    asked = [problem for problem in problems for _ in range(settings.samples)]
    seed = seed_of(settings.seed, SAMPLES, number, again)
    return sample_all(learner, asked, seed, first=first * settings.samples)


def exchange_groups(
    samples: list[Sample], dull: list[bool], fresh: list[Sample], lively: list[bool], size: int
) -> list[Sample]:
    """Dull groups of `size` replaced by lively ones, as far as there are any."""
    spare = [fresh[start : start + size] for start in range(0, len(fresh), size) if lively[start]]
    result = list(samples)
    for start in range(0, len(samples), size):
        if dull[start] and spare:
            result[start : start + size] = spare.pop(0)
    return result


def rewards_of(samples: list[Sample], device: torch.device) -> Tensor:
    """(B,) float32."""
    return torch.tensor([sample.reward for sample in samples], dtype=torch.float32, device=device)


def groups_of(learner: Learner) -> Tensor:
    """(B,) int64: which completions of this process answer the same problem, numbered through all processes."""
    settings, accelerator = learner.settings, learner.accelerator
    share = settings.rollout_size // accelerator.num_processes
    places = torch.arange(share, device=learner.device) + accelerator.process_index * share
    return places // settings.samples


def with_advantages(learner: Learner, rollout: Rollout) -> Rollout:
    """The rollout with A, (B, T) or (B, T, K); with PPO's critic, its values and what it is to learn."""
    settings, accelerator = learner.settings, learner.accelerator
    mask = rollout.sequences.action_mask
    if settings.advantages in DENSE_ADVANTAGES:
        return dense_advantages(learner, rollout)
    if settings.advantages in SEQUENCE_ADVANTAGES:
        lengths = accelerator.gather(mask.sum(1))
        rewards, groups = accelerator.gather(rollout.rewards), accelerator.gather(groups_of(learner))
        per_sequence = sequence_advantages(
            settings.advantages, rewards, groups, lengths=lengths, longest=settings.max_new_tokens
        )
        mine = per_sequence[accelerator.process_index * len(mask) :][: len(mask)]  # (B,)
        rollout = replace(rollout, advantages=mine[:, None].expand(mask.shape))
    elif settings.advantages == "gae":
        assert learner.critic is not None
        with torch.no_grad(), learner.precision():
            parts = [values_of(learner.critic, rollout.sequences[rows]) for rows in row_parts(learner, len(mask))]
        values = torch.cat(parts)  # (B, T)
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        rewards = torch.zeros_like(values).scatter(1, last[:, None], rollout.rewards[:, None])  # at the last token
        advantages, returns = gae(rewards, values, mask, gamma=settings.gamma, lam=settings.lam)
        rollout = replace(rollout, advantages=advantages, values=values, returns=returns)
    if settings.whiten and rollout.advantages is not None:
        rollout = replace(rollout, advantages=whitened(learner, rollout.advantages, mask))
    return rollout


def whitened(learner: Learner, advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the completion tokens of all processes, (B, T)."""
    chosen = advantages[mask].double()
    sums = torch.stack([torch.ones_like(chosen).sum(), chosen.sum(), chosen.square().sum()])
    count, total, squares = learner.accelerator.reduce(sums, "sum")
    mean = total / count
    deviation = ((squares - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)).sqrt()
    return ((advantages - mean) / (deviation + 1e-8)).to(advantages).where(mask, 0.0)


# old policy, reference ------------------------------------------------------------------------------------------------


def with_policies(learner: Learner, rollout: Rollout) -> Rollout:
    """The rollout with what the objective will ask of the policies that have been, kept before the first update.

    Where a rollout gives one update, nothing is kept: the policy has not moved when it is asked. The authors' top-k is
    another policy than their own from the first update on, so it is always kept.
    """
    settings, needs = learner.settings, learner.needs
    size = max(1, settings.rollout_size // (settings.mini_batches * settings.micro_batches))
    moved = settings.updates_per_rollout > 1
    if "old_logits" in needs and (moved or settings.old_policy == "topk"):
        with learner.precision():
            old = keep_old_policy(
                learner.policy,
                rollout.sequences,
                form=settings.old_policy,  # type: ignore[arg-type]
                k=settings.old_k,
                rows_per_pass=max(1, size // learner.accelerator.num_processes),
                temperature=settings.temperature,
            )
        rollout = replace(rollout, old=old, old_logprobs=old.old_logprobs)
    elif "old_logprobs" in needs and moved:
        rollout = replace(rollout, old_logprobs=token_logprobs(learner, learner.policy, rollout))
    if "ref_logprobs" in needs:
        with learner.reference_policy() as reference:
            rollout = replace(rollout, ref_logprobs=token_logprobs(learner, reference, rollout))
    return rollout


@torch.no_grad()
def token_logprobs(learner: Learner, model: torch.nn.Module, rollout: Rollout) -> Tensor:
    """Log-probability of each completion token, (B, T) float32; 0 elsewhere."""
    result = torch.zeros(rollout.sequences.input_ids.shape, device=learner.device)
    for rows in row_parts(learner, len(result)):
        sequences = rollout.sequences[rows]
        with learner.precision():
            logits = completion_logits(model, sequences).float() / learner.settings.temperature  # (M, V)
        part = torch.zeros(sequences.input_ids.shape, device=learner.device)
        part[sequences.action_mask] = logprobs_of(logits, sequences.input_ids[sequences.action_mask])
        result[rows] = part
    return result


def row_parts(learner: Learner, rows: int) -> tuple[Tensor, ...]:
    """The rows of a rollout, as many at once as a micro-batch has."""
    parts = learner.settings.mini_batches * learner.settings.micro_batches
    return torch.arange(rows, device=learner.device).chunk(parts)


# inner epochs ---------------------------------------------------------------------------------------------------------


def inner_batches(learner: Learner, number: int) -> Iterator[Tensor]:
    """The rows of each update made from a rollout, (R,) int64: `mini_batches` of every inner epoch, shuffled."""
    settings = learner.settings
    rows = torch.arange(settings.rollout_size // learner.accelerator.num_processes)
    for epoch in range(settings.inner_epochs):
        if settings.mini_batches > 1:
            draw = torch.Generator().manual_seed(seed_of(settings.seed, SHUFFLE, number, epoch))
            rows = rows[torch.randperm(len(rows), generator=draw)]
        for part in rows.chunk(settings.mini_batches):
            yield part.to(learner.device)


# evaluation -----------------------------------------------------------------------------------------------------------


def evaluate(learner: Learner, task: Task) -> float:
    """Mean reward of sampled completions of the held-out problems; the same random numbers every time."""
    return accuracy(learner, task.held_out * learner.settings.held_out_samples, seed_of(HELD_OUT))
