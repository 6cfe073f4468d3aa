"""The same faults in two trainers of libraries: this package's, and TRL's GRPOTrainer and SFTTrainer.

A place of the plain loop is a function here that the trainer calls; it is replaced for one run.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from plain_loop import PROMPTS, SAMPLES, Alter, Now, Setup
from policies import policy
from torch import Tensor

import lcogeom as lg
from lcogeom.models import LoadedModel
from lcogeom.training import override, preset
from lcogeom.training.rollout import Sequences
from lcogeom.training.sampling import seed_of
from lcogeom.training.tasks import load_task, score

OURS = frozenset({
    "rate", "rewards", "advantages", "old_logprobs", "samples", "weights", "before_update", "backward_done",
    "before_step", "after_step",
})  # fmt: skip
TRLS = frozenset({
    "rate", "rewards", "advantages", "old_logprobs", "loss", "scale", "before_update", "before_step", "after_step",
})  # fmt: skip
"""Places of the plain loop that are known here."""
TRL_PROMPTS = 4


class Places:
    """A fault's functions, called from update `first` on."""

    def __init__(self, now: Now, at: Mapping[str, Alter], first: int) -> None:
        self.now, self.at, self.first = now, at, first

    def reach(self, step: int) -> None:
        self.now.step, self.now.since = step, step - self.first

    def __call__(self, place: str, value: Any) -> Any:
        return self.at[place](value, self.now) if place in self.at and self.now.step >= self.first else value

    def around_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """The step's own places; the recorder's hooks are there before these."""
        if "before_step" in self.at:
            optimizer.register_step_pre_hook(lambda *_: self("before_step", None))
        if "after_step" in self.at:
            optimizer.register_step_post_hook(lambda *_: self("after_step", None))


def made_for(setup: Setup, loaded: LoadedModel, *, seed: int, at: Mapping[str, Alter], first: int) -> Places:
    options: dict[str, object] = {"beta": 0.0} if setup.objective == "grpo" else {}
    objective = lg.objective(setup.objective, **{**options, **setup.options})
    nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # until the trainer has made its own
    now = Now(setup, loaded.model, nothing, loaded.tokenizer, objective, torch.Generator().manual_seed(seed))
    now.start = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    return Places(now, at, first)


@contextlib.contextmanager
def replaced(module: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Functions of a module replaced by others, for a while."""
    kept = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


# lcogeom.training -----------------------------------------------------------------------------------------------------


def run_ours(setup: Setup, folder: Path, *, seed: int, cache: Path, at: Mapping[str, Alter], first: int) -> None:
    """`lcogeom train`, from Python."""
    from lcogeom.training import trainer
    from lcogeom.training import update as updating

    assert at.keys() <= OURS
    loaded = policy(setup.model, cache)
    places = made_for(setup, loaded, seed=seed, at=at, first=first)
    now = places.now
    start = preset("tiny-" + setup.objective) if setup.objective != "reinforce" else preset("tiny-reinforce")
    options = {**start.objective_options, **setup.options}
    settings = replace(
        override(
            start,
            [
                "task=addition-2", f"updates={setup.updates}", f"inner_epochs={setup.inner_epochs}", f"seed={seed}",
                f"learning_rate={setup.learning_rate}", f"warmup={setup.warmup / setup.updates}", "held_out=4",
                f"prompts={PROMPTS}", f"samples={SAMPLES}", "evaluate_every=1000", "held_out_samples=1", "sketch=4096",
            ],
        ),
        objective_options=options,
    )  # fmt: skip
    build, update, rewards_of = trainer.build_learner, trainer.update, trainer.rewards_of
    with_advantages, token_logprobs, sample_round = (
        trainer.with_advantages,
        trainer.token_logprobs,
        trainer.sample_round,
    )
    rate_factor, clipped, token_weights = updating.rate_factor, updating.clipped, updating.token_weights

    def build_learner(*args: Any) -> Any:
        learner = build(*args)
        now.optimizer = learner.optimizer
        return learner

    def sampled(learner: Any, task: Any, number: int, again: int) -> Any:
        places.reach(number * settings.updates_per_rollout)
        return places("samples", sample_round(learner, task, number, again))

    def rewarded(samples: Any, device: Any) -> Tensor:
        now.rewards = places("rewards", rewards_of(samples, device))
        return now.rewards

    def advantaged(learner: Any, rollout: Any) -> Any:
        now.sequences, now.rewards = rollout.sequences, rollout.rewards
        rollout = with_advantages(learner, rollout)
        if rollout.advantages is None:
            return rollout
        return replace(rollout, advantages=places("advantages", rollout.advantages.clone()))

    def scored(learner: Any, model: Any, rollout: Any) -> Tensor:
        mask = rollout.sequences.action_mask
        return places("old_logprobs", token_logprobs(learner, model, rollout)).to(torch.float32).where(mask, 0.0)

    def updated(learner: Any, rollout: Any, rows: Tensor, step: int, **options: Any) -> Any:
        places.reach(step)
        if step == 0:
            places.around_steps(learner.optimizer)
        now.sequences, now.advantages = rollout.sequences, rollout.advantages
        places("before_update", None)
        return update(learner, rollout, rows, step, **options)

    def weighed(mask: Tensor, *args: Any, **options: Any) -> Tensor:
        flat = token_weights(mask, *args, **options)
        wide = torch.zeros(mask.shape, dtype=flat.dtype).masked_scatter(mask, flat)
        return places("weights", wide)[mask].to(flat)

    def after_backward(model: Any, longest: Any) -> Tensor:
        if model is now.model:
            places("backward_done", None)
        return clipped(model, longest)

    def rate(settings: Any, step: int) -> float:
        return places("rate", settings.learning_rate * rate_factor(settings, step)) / settings.learning_rate

    with (
        replaced(
            trainer, build_learner=build_learner, sample_round=sampled, rewards_of=rewarded,
            with_advantages=advantaged, token_logprobs=scored, update=updated,
        ),
        replaced(updating, token_weights=weighed, clipped=after_backward, rate_factor=rate),
    ):  # fmt: skip
        trainer.train(settings, folder, loaded=loaded)


# TRL ------------------------------------------------------------------------------------------------------------------


def run_trl(setup: Setup, folder: Path, *, seed: int, cache: Path, at: Mapping[str, Alter], first: int) -> None:
    """GRPOTrainer or SFTTrainer with RecorderCallback."""
    import datasets
    import trl

    from lcogeom.integrations.transformers import RecorderCallback

    assert at.keys() <= TRLS
    transformers.set_seed(seed)
    loaded = policy(setup.model, cache)
    places = made_for(setup, loaded, seed=seed, at=at, first=first)
    now = places.now
    task = load_task("addition-2")
    rate = setup.learning_rate

    class Faulty(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            now.optimizer = getattr(optimizer, "optimizer", optimizer)
            places.around_steps(now.optimizer)

        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            places.reach(state.global_step)
            for group in now.optimizer.param_groups:
                group["lr"] = places("rate", rate * min(1.0, (state.global_step + 1) / (setup.warmup + 1)))
            places("before_update", None)

    class Recorder(RecorderCallback):
        """Attached before the fault's own hooks are."""

    common: dict[str, Any] = {
        "max_steps": setup.updates, "learning_rate": rate, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "seed": seed, "use_cpu": True, "bf16": False,
    }  # fmt: skip
    callbacks = [Recorder(folder, sketch=4096, seed=seed, flush_every=50), Faulty()]
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if setup.objective == "sft":
            problems = task.draw(32 * setup.updates, seed_of(seed, 0))
            rows = [{"prompt": problem.prompt, "completion": problem.solution} for problem in problems]
            trainer: Any = _sft(trl.SFTTrainer, places)(
                model=loaded.model,
                args=trl.SFTConfig(output_dir=scratch, per_device_train_batch_size=32, **common),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=loaded.tokenizer,
                callbacks=callbacks,
            )
        else:
            problems = task.draw(TRL_PROMPTS * setup.updates, seed_of(seed, 0))
            asked = {problem.prompt: problem for problem in problems}

            def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
                return [score(text, asked[prompt]) for prompt, text in zip(prompts, completions, strict=True)]

            trainer = _grpo(trl.GRPOTrainer, places)(
                model=loaded.model,
                reward_funcs=reward,
                args=trl.GRPOConfig(
                    output_dir=scratch, per_device_train_batch_size=TRL_PROMPTS * SAMPLES, num_generations=SAMPLES,
                    max_completion_length=setup.max_new_tokens, num_iterations=setup.inner_epochs, beta=0.0, **common,
                ),
                train_dataset=datasets.Dataset.from_list([{"prompt": problem.prompt} for problem in problems]),
                processing_class=loaded.tokenizer,
                callbacks=callbacks,
            )  # fmt: skip
        backward = trainer.accelerator.backward
        trainer.accelerator.backward = lambda loss, **options: backward(places("scale", loss), **options)
        trainer.train()
        (folder.parent / "log_history.json").write_text(_history(trainer))


def _history(trainer: Any) -> str:
    import json

    return json.dumps({"log_history": trainer.state.log_history}, indent=1)


def _sft(kind: Any, places: Places) -> Any:
    class Sft(kind):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            found = super().compute_loss(*args, **options)
            loss = found[0] if isinstance(found, tuple) else found
            loss = places("loss", loss)
            return (loss, *found[1:]) if isinstance(found, tuple) else loss

    return Sft


def _grpo(kind: Any, places: Places) -> Any:
    now = places.now

    class Grpo(kind):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            return places("loss", super().compute_loss(*args, **options))

        def _calculate_rewards(self, *args: Any) -> Tensor:
            found = super()._calculate_rewards(*args)
            now.rewards = places("rewards", found[:, 0].float())
            return now.rewards[:, None].to(found)

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if not self.model.training:
                return output
            prompt, completion = output["prompt_mask"], output["completion_mask"]
            now.sequences = Sequences(
                torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
                torch.cat([prompt, completion], 1),
                torch.cat([torch.zeros_like(prompt), completion], 1).bool(),
                prompt.shape[1],
            )
            advantages = output["advantages"]
            output["advantages"] = places("advantages", advantages[:, None].clone()).reshape(advantages.shape)
            if "old_logprobs" in places.at and output.get("old_per_token_logps") is not None:
                old = output["old_per_token_logps"]
                wide = torch.cat([torch.zeros_like(prompt, dtype=old.dtype), old], 1)
                output["old_per_token_logps"] = places("old_logprobs", wide)[:, prompt.shape[1] :].to(old)
            return output

    return Grpo
