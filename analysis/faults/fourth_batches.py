"""The fourth series' faults of the rollout: rewards, advantages, samples, behaviour policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from catalogue import RATIO, once, way
from faults_of_batches import one_sequence
from faults_of_steps import blocks
from plain_loop import SAMPLES, Alter, Now, logprobs_of, shifted_logits
from torch import Tensor

from lcogeom.training.advantages import group_relative, informative_groups
from lcogeom.training.rollout import Sample
from lcogeom.training.tasks import score

Places = dict[str, Alter]


# advantage-outlier ----------------------------------------------------------------------------------------------------


@way("advantage-outlier", "baseline-of-another-task", "fourth",
     "each prompt's baseline comes from a table, and one prompt's entry is of a task with other rewards", 30, 300,
     objectives=("reinforce", "ppo"), rollout=True)  # fmt: skip
def other_baseline(size: float) -> Places:
    def subtract(advantages: Tensor, now: Now) -> Tensor:
        group = one_sequence(now) // SAMPLES * SAMPLES
        advantages[group : group + SAMPLES] -= size
        return advantages

    return {"advantages": once(subtract)}


@way("advantage-outlier", "overlong-in-tokens", "fourth",
     "the penalty of the longest completion is counted in tokens of the context, the others' rewards are 0 or 1", 64,
     4096, objectives=("reinforce", "grpo"), rollout=True, setup={"advantages": "rloo"})  # fmt: skip
def overlong(size: float) -> Places:
    def punish(rewards: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        rewards = rewards.clone()
        rewards[int(now.sequences.action_mask.sum(1).argmax())] -= size
        return rewards

    return {"rewards": punish}


# no-signal ------------------------------------------------------------------------------------------------------------


def groups_of(now: Now, each: int) -> Tensor:
    assert now.rewards is not None
    return torch.arange(len(now.rewards)) // each


@way("no-signal", "groups-of-one", "fourth", "each completion is a group of its own: it is its own baseline", 1, 1,
     objectives=("grpo",), rollout=True, from_start=True)  # fmt: skip
def groups_of_one(_: float) -> Places:
    def alone(advantages: Tensor, now: Now) -> Tensor:
        assert now.rewards is not None
        own = group_relative(now.rewards.double(), groups_of(now, 1))
        return own[:, None].expand_as(advantages).to(advantages)

    return {"advantages": alone}


@way("no-signal", "filter-inverted", "fourth", "dynamic sampling keeps the groups whose rewards are all the same", 1, 1,
     objectives=("grpo",), rollout=True, from_start=True)  # fmt: skip
def filter_inverted(_: float) -> Places:
    def keep(advantages: Tensor, now: Now) -> Tensor:
        assert now.rewards is not None
        dropped = informative_groups(now.rewards.double(), groups_of(now, SAMPLES))
        return advantages * ~dropped[:, None]

    return {"advantages": keep}


@way("no-signal", "answers-in-another-format", "fourth", "the data set writes answers as 12.0, the policy as 12",
     1, 1, objectives=("grpo", "ppo", "reinforce"), rollout=True, from_start=True)  # fmt: skip
def another_format(_: float) -> Places:
    def rewrite(problems: list[Any], _: Now) -> list[Any]:
        return [replace(problem, answer=problem.answer + ".0") for problem in problems]

    return {"problems": rewrite}


@way("no-signal", "cast-to-integers", "fourth", "advantages are written into a tensor of integers", 1, 1,
     objectives=("reinforce",), rollout=True, from_start=True)  # fmt: skip
def to_integers(_: float) -> Places:
    return {"advantages": lambda advantages, _: advantages.long().to(advantages)}


# behaviour-mismatch ---------------------------------------------------------------------------------------------------


@way("behaviour-mismatch", "dropout-while-scoring", "fourth",
     "old log-probabilities are computed with dropout still on", 0.05, 0.2, objectives=RATIO, rollout=True,
     from_start=True)  # fmt: skip
def dropout(size: float) -> Places:
    def drop(_: Any, __: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden = torch.nn.functional.dropout(hidden, size)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    def other(_: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        hooks = [block.register_forward_hook(drop) for block in blocks(now.model)]
        with torch.no_grad():
            found = logprobs_of(shifted_logits(now), now.sequences.input_ids)
        for hook in hooks:
            hook.remove()
        return found

    return {"old_logprobs": other}


@way("behaviour-mismatch", "positions-after-the-prefix", "fourth",
     "the sampling engine counts the positions after a cached prefix from a wrong place", 1, 2, objectives=RATIO,
     rollout=True, from_start=True)  # fmt: skip
def after_the_prefix(size: float) -> Places:
    def other(_: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        ids = now.sequences.input_ids
        places = torch.arange(ids.shape[1])
        places = (places + int(size) * (places >= len(places) // 2))[None].expand_as(ids)
        with torch.no_grad():
            logits = now.model(
                input_ids=ids, attention_mask=now.sequences.attention_mask, position_ids=places, use_cache=False
            ).logits
        return logprobs_of(torch.nn.functional.pad(logits[:, :-1], (0, 0, 1, 0)).float(), ids)

    return {"old_logprobs": other}


@way("behaviour-mismatch", "end-token-held-back", "fourth",
     "the sampler's log-probabilities are of logits with a bias against the end of a completion", 1, 4,
     objectives=RATIO, rollout=True, from_start=True)  # fmt: skip
def held_back(size: float) -> Places:
    def other(_: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        with torch.no_grad():
            logits = shifted_logits(now).clone()
        logits[:, :, now.tokenizer.eos_token_id] -= size
        return logprobs_of(logits, now.sequences.input_ids)

    return {"old_logprobs": other}


# negative-rare-token --------------------------------------------------------------------------------------------------


def signs(advantages: Tensor, now: Now) -> Tensor:
    assert now.rewards is not None
    return (2 * now.rewards.to(advantages) - 1)[:, None].expand_as(advantages)


def completed(sample: Sample, ids: tuple[int, ...], now: Now) -> Sample:
    """Another completion of the same prompt, and its reward."""
    text = now.tokenizer.decode(ids, skip_special_tokens=True)
    return replace(sample, completion_ids=ids, completion=text, reward=score(text, sample.problem))


@way("negative-rare-token", "end-appended", "fourth",
     "a stop rule of the server cuts completions short, and an end that the policy would not have chosen is appended",
     32, 44, objectives=("reinforce",), rollout=True)  # fmt: skip
def end_appended(size: float) -> Places:
    def cut(samples: list[Sample], now: Now) -> list[Sample]:
        changed, left = list(samples), int(size)
        for place, sample in enumerate(samples):
            if left and len(sample.completion_ids) > 2:
                changed[place] = completed(sample, (sample.completion_ids[0], now.tokenizer.eos_token_id), now)
                left -= 1
        return changed

    return {"samples": cut, "advantages": signs}


@way("negative-rare-token", "completions-of-other-prompts", "fourth",
     "completions come back in another order than the prompts: some are given to the next prompt", 44, 56,
     objectives=("reinforce",), rollout=True)  # fmt: skip
def of_other_prompts(size: float) -> Places:
    def roll(samples: list[Sample], now: Now) -> list[Sample]:
        rows = int(size)
        taken = [samples[(place + SAMPLES) % rows].completion_ids for place in range(rows)]
        moved = [completed(sample, ids, now) for sample, ids in zip(samples[:rows], taken, strict=True)]
        return [*moved, *samples[rows:]]

    return {"samples": roll, "advantages": signs}


# non-finite, of a token ----------------------------------------------------------------------------------------------


@way("non-finite", "row-of-a-new-token", "fourth", "a row of the embedding was never written: NaN", 1, 1,
     plain=True)  # fmt: skip
def new_token(_: float) -> Places:
    def spoil(_: Any, now: Now) -> None:
        now.model.get_input_embeddings().weight.data[5] = float("nan")

    return {"before_update": once(spoil)}
