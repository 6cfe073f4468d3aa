"""Completions of many problems: in batches, shared out over processes, the same whoever samples them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from lcogeom.training.learner import Learner
from lcogeom.training.old_policy import eval_mode
from lcogeom.training.rollout import Sample, generate, stop_ids
from lcogeom.training.tasks import Problem, score

SEEDS = 2**48


def seed_of(*numbers: int) -> int:
    """One seed for some numbers; neighbours get far-apart ones."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % SEEDS
    return seed


def sample_all(learner: Learner, problems: Sequence[Problem], seed: int, *, first: int = 0) -> list[Sample]:
    """One completion for each problem of this process.

    Batches of `generation_batch` have a seed of their own, by their place among those of all processes: one process
    samples what several do.

    Args:
        problems: as many in every process, where parameters are sharded.
        first: place of the first of them among all processes' problems.
    """
    settings = learner.settings
    size = settings.generation_batch or len(problems)
    samples = []
    with torch.no_grad(), learner.precision(), eval_mode(learner.model):  # recomputing blocks keep no cache
        for start in range(0, len(problems), size):
            samples += generate(
                learner.model,
                learner.tokenizer,
                problems[start : start + size],
                max_new_tokens=settings.max_new_tokens,
                seed=seed_of(seed, first + start),
                stop=settings.stop,
                temperature=settings.temperature,
                synced=settings.fsdp,
                continuous=settings.continuous_batching,
            )
    return samples


def accuracy(learner: Learner, problems: Sequence[Problem], seed: int) -> float:
    """Mean reward of one sampled completion of each problem, shared out over the processes."""
    world, rank = learner.accelerator.num_processes, learner.accelerator.process_index
    size = learner.settings.generation_batch or learner.settings.rollout_size // world
    batches = [(start, list(problems[start : start + size])) for start in range(0, len(problems), size)]
    total = torch.zeros((), dtype=torch.float64)
    for turn in range(0, len(batches), world):
        mine = turn + rank
        start, batch = batches[min(mine, len(batches) - 1)]  # shards want every process to take part
        samples = sample_all(learner, batch, seed, first=start) if mine < len(batches) or learner.settings.fsdp else []
        if mine < len(batches):
            total += sum(sample.reward for sample in samples)
    return float(learner.accelerator.reduce(total.to(learner.device), "sum")) / len(problems)


def gold_samples(
    tokenizer: transformers.PreTrainedTokenizerBase, problems: Sequence[Problem], stop: str | None
) -> list[Sample]:
    """The tasks' own answers as completions, each ended as a sampled one would be.

    Raises:
        ValueError: no token ends a completion.
    """
    stops = stop_ids(tokenizer, stop)
    samples = []
    for problem in problems:
        text = getattr(problem, "solution", "") or problem.answer
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        if ids[-1] not in stops:
            end = tokenizer(stop, add_special_tokens=False).input_ids[-1:] if stop else stops[:1]
            if not end:
                raise ValueError("stop: no token ends a completion: the tokenizer has no eos token. Set stop.")
            ids += end
        prompt = tokenizer(problem.prompt).input_ids
        samples.append(Sample(problem, tuple(prompt), tuple(ids), text, score(text, problem)))
    return samples
