"""The method, top to bottom: rollout, rewards, advantages, old policy, inner epochs, evaluation, checkpoint.

    for each rollout:
        problems -> completions -> rewards r (B,) -> advantages A (B, T)      make_rollout
        what the objective reads of the old policy                           keep_policies
        for each inner epoch, for each mini-batch: one update                 update
            sum over micro-batches of sum_t w_t f_t(logits)                   policy_loss
    held-out reward now and then, checkpoints now and then

B completions of this process, T tokens wide, M completion tokens among them, V the vocabulary. An update is one
optimiser step. Every random number follows from (seed, rollout), so a run can go on from any rollout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcogeom.models import LoadedModel
from lcogeom.recording import Probe
from lcogeom.training import checkpoint, run_folder
from lcogeom.training.advantages import gae, informative_groups, overlong_penalty, sequence_advantages
from lcogeom.training.buffer import Rollout, logprobs_of, token_weights
from lcogeom.training.critic import value_losses, values_of
from lcogeom.training.last_layer_of import last_layer
from lcogeom.training.learner import Learner, build_learner
from lcogeom.training.old_policy import keep_old_policy
from lcogeom.training.replay import completion_logits
from lcogeom.training.rollout import Sample, gold_samples, pad_id, side_by_side
from lcogeom.training.sampling import sample_all
from lcogeom.training.settings import SEQUENCE_ADVANTAGES, TrainSettings
from lcogeom.training.tasks import Problem, Task, load_task

Progress = Callable[[Mapping[str, object]], None]
"""Called after each update with its number and what is known of it, and when an evaluation is done."""
HELD_OUT_SEED = 1_000_003


class TrainingStopped(RuntimeError):
    """A loss or gradient was not finite: the weights are as they were before this update."""


def train(
    settings: TrainSettings,
    run: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    loaded: LoadedModel | None = None,
    log: str | None = None,
) -> Path:
    """Train, recording every update into the run folder; checkpoints lie in it, too.

    With several processes (`accelerate launch`, torchrun) each of them calls this.

    Args:
        run: folder to create; with `resume`, one to go on in from its last checkpoint (from the start without any).
        loaded: the model and tokenizer to train, in place of `settings.model`.
        log: tensorboard, wandb or trackio: rows of `updates` go there as well.

    Returns:
        The run folder.

    Raises:
        FileExistsError: `run` exists, without `resume`.
        FileNotFoundError, ValueError: a model, task or settings that cannot be used.
        TrainingStopped: a loss or a gradient was not finite. The black box in the run folder has its batch.
    """
    run = Path(run)
    run_folder.require(run, settings, resume)
    task = load_task(settings.task, characters=settings.model == "tiny", held_out=settings.held_out, seed=settings.seed)
    learner = build_learner(settings, loaded)
    start = checkpoint.load(learner, run) if resume else 0
    with run_folder.recorder(learner, run, start, log, progress) as probe:
        step = start
        while step < settings.updates:
            before = _held_out(learner, task, probe, progress, step) if _due(settings, step) else None
            began = time.monotonic()
            rollout = make_rollout(learner, task, step // settings.updates_per_rollout)
            rollout = keep_policies(learner, rollout)
            known: dict[str, float] = {
                "rollouts": float((step // settings.updates_per_rollout + 1) * settings.rollout_size),
                "rollout_seconds": time.monotonic() - began,
            }
            if settings.completions == "sampled":
                known["reward"] = float(learner.accelerator.reduce(rollout.rewards.mean(), "mean"))
            for rows in inner_batches(learner, rollout, step):
                found = update(learner, rollout, rows, step, probe)
                step += 1
                if step == settings.updates:
                    known["heldout_reward_after"] = evaluate(learner, task)
        ...
    return run
