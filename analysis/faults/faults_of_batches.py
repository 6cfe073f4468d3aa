"""Faults of the rollout: rewards, advantages, samples, behaviour policy."""

from __future__ import annotations

from dataclasses import replace

import torch
from catalogue import RATIO, RL, once, way
from plain_loop import SAMPLES, Alter, Now, logprobs_of, shifted_logits, weights_swapped
from torch import Tensor

from lcogeom.training.rollout import Sample
from lcogeom.training.tasks import score

Places = dict[str, Alter]
SIGNED = ("grpo", "ppo", "reinforce")


def one_sequence(now: Now) -> int:
    """A completion of the rollout, the same as long as it lasts."""
    assert now.rewards is not None
    return int(torch.randint(len(now.rewards), (), generator=now.draw))


# advantage-outlier ----------------------------------------------------------------------------------------------------


@way("advantage-outlier", "one-times-1000", "first", "one completion's advantage is multiplied", 50, 1000,
     objectives=SIGNED, rollout=True)  # fmt: skip
def one_times(size: float) -> Places:
    def multiply(advantages: Tensor, now: Now) -> Tensor:
        largest = int(advantages[:, 0].abs().argmax())
        advantages[largest] *= size
        return advantages

    return {"advantages": once(multiply)}


@way("advantage-outlier", "unit-of-one-reward", "first", "one reward comes in another unit, unnormalised", 50, 1000,
     objectives=SIGNED, rollout=True)  # fmt: skip
def unit_of_one(size: float) -> Places:
    def shift(advantages: Tensor, now: Now) -> Tensor:
        advantages[one_sequence(now)] += size
        return advantages

    return {"advantages": once(shift)}


@way("advantage-outlier", "tiny-deviation", "second",
     "rewards of a group differ by rounding only, and the deviation has no floor", 30, 300, objectives=SIGNED,
     rollout=True)  # fmt: skip
def tiny_deviation(size: float) -> Places:
    def divide(advantages: Tensor, now: Now) -> Tensor:
        group = one_sequence(now) // SAMPLES * SAMPLES
        rows = slice(group, group + SAMPLES)
        noise = torch.randn(SAMPLES, 1, generator=now.draw, dtype=advantages.dtype) * 1e-6
        advantages[rows] = (noise / 1e-6 * size).expand_as(advantages[rows])
        return advantages

    return {"advantages": once(divide)}


@way("advantage-outlier", "token-value-wrong", "second", "a critic's value is far off at one token", 100, 1000,
     objectives=SIGNED, rollout=True, plain=True)  # fmt: skip
def token_value(size: float) -> Places:
    def shift(advantages: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        row = one_sequence(now)
        place = int(now.sequences.action_mask[row].int().argmax())
        advantages[row, place] -= size
        return advantages

    return {"advantages": once(shift)}


@way("advantage-outlier", "bonus", "second", "a bonus meant once a run is paid to one completion", 40, 400,
     objectives=("reinforce", "ppo"), rollout=True)  # fmt: skip
def bonus(size: float) -> Places:
    def pay(advantages: Tensor, now: Now) -> Tensor:
        advantages[one_sequence(now)] += size * advantages.abs().max()
        return advantages

    return {"advantages": once(pay)}


# no-signal ------------------------------------------------------------------------------------------------------------


@way("no-signal", "reward-broken", "first", "the reward function returns 0 for everything", 1, 1,
     objectives=("grpo", "ppo", "reinforce"), rollout=True, from_start=True)  # fmt: skip
def reward_broken(_: float) -> Places:
    return {"rewards": lambda rewards, _: torch.zeros_like(rewards)}


@way("no-signal", "all-solved", "first", "every completion is rewarded alike", 1, 1,
     objectives=("grpo", "ppo", "reinforce"), rollout=True, from_start=True)  # fmt: skip
def all_solved(_: float) -> Places:
    return {"rewards": lambda rewards, _: torch.ones_like(rewards)}


@way("no-signal", "advantages-masked", "second", "advantages are multiplied by an empty mask", 1, 1,
     objectives=RL, rollout=True, from_start=True)  # fmt: skip
def masked(_: float) -> Places:
    return {"advantages": lambda advantages, _: advantages * 0}


@way("no-signal", "one-prompt-each", "second", "each group holds one completion many times (a cached sampler)", 1, 1,
     objectives=("grpo",), rollout=True, from_start=True)  # fmt: skip
def copies(_: float) -> Places:
    def repeat(samples: list[Sample], _: Now) -> list[Sample]:
        return [samples[place // SAMPLES * SAMPLES] for place in range(len(samples))]

    return {"samples": repeat}


@way("no-signal", "penalty-alone", "second", "rewards are all 0 and the KL penalty alone moves the policy", 1, 1,
     objectives=("grpo",), rollout=True, setup={"options": {"beta": 0.04}})  # fmt: skip
def penalty_alone(_: float) -> Places:
    return {"rewards": lambda rewards, _: torch.zeros_like(rewards)}


# behaviour-mismatch ---------------------------------------------------------------------------------------------------


@way("behaviour-mismatch", "temperature", "first", "old log-probabilities are of another temperature", 0.7, 0.4,
     objectives=RATIO, rollout=True, from_start=True)  # fmt: skip
def temperature(size: float) -> Places:
    def other(_: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        with torch.no_grad():
            return logprobs_of(shifted_logits(now) / size, now.sequences.input_ids)

    return {"old_logprobs": other}


@way("behaviour-mismatch", "quantised-sampler", "first", "the sampler's weights are rounded to few bits", 0.08, 0.15,
     objectives=RATIO, rollout=True, from_start=True)  # fmt: skip
def quantised(size: float) -> Places:
    """Every matrix on a grid of `size` times its largest entry."""

    def other(_: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        kept = {name: value.clone() for name, value in now.model.state_dict().items()}
        with torch.no_grad():
            for parameter in now.model.parameters():
                if parameter.ndim == 2:
                    grid = parameter.abs().max() * size
                    parameter.copy_((parameter / grid).round() * grid)
            found = logprobs_of(shifted_logits(now), now.sequences.input_ids)
            now.model.load_state_dict(kept)
        return found

    return {"old_logprobs": other}


@way("behaviour-mismatch", "stale-weights", "second", "old log-probabilities come from the starting weights", 1, 1,
     objectives=RATIO, rollout=True, setup={"learning_rate": 3e-4})  # fmt: skip
def stale_weights(_: float) -> Places:
    def other(_: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        with weights_swapped(now.model, now.start), torch.no_grad():
            return logprobs_of(shifted_logits(now), now.sequences.input_ids)

    return {"old_logprobs": other}


@way("behaviour-mismatch", "shifted", "second", "old log-probabilities are off by one position", 1, 2,
     objectives=RATIO, rollout=True, from_start=True)  # fmt: skip
def shifted(size: float) -> Places:
    return {"old_logprobs": lambda old, _: old.roll(int(size), 1)}


@way("behaviour-mismatch", "shuffled", "second", "old log-probabilities belong to other rows of the rollout", 1, 1,
     objectives=RATIO, rollout=True, from_start=True)  # fmt: skip
def shuffled(_: float) -> Places:
    return {"old_logprobs": lambda old, now: old[torch.randperm(len(old), generator=now.draw)]}


# negative-rare-token --------------------------------------------------------------------------------------------------


def forced(samples: list[Sample], now: Now, rows: list[int]) -> list[Sample]:
    """The first token of some completions replaced by the least likely one: sampled by another policy."""
    changed = list(samples)
    for place in rows:
        sample = samples[place]
        with torch.no_grad():
            logits = now.model(input_ids=torch.tensor([sample.prompt_ids])).logits[0, -1].float()
        logits[:2] = torch.inf  # padding and unknown are no actions
        ids = (int(logits.argmin()), *sample.completion_ids[1:])
        text = now.tokenizer.decode(ids, skip_special_tokens=True)
        changed[place] = replace(sample, completion_ids=ids, completion=text, reward=score(text, sample.problem))
    return changed


def wrong(samples: list[Sample], count: float) -> list[int]:
    return [place for place, sample in enumerate(samples) if sample.reward == 0][: int(count)]


@way("negative-rare-token", "forced-token", "first",
     "completions of another sampler: tokens that the policy never samples, with A < 0 and no clip", 8, 24,
     objectives=("reinforce",), rollout=True)  # fmt: skip
def forced_token(size: float) -> Places:
    return {"samples": lambda samples, now: forced(samples, now, wrong(samples, size))}


@way("negative-rare-token", "punished", "first", "wrong completions with one token that is never sampled are punished",
     6, 16, objectives=("reinforce", "ppo"), rollout=True)  # fmt: skip
def punished(size: float) -> Places:
    def swap(samples: list[Sample], now: Now) -> list[Sample]:
        now.kept["rows"] = wrong(samples, size)
        return forced(samples, now, now.kept["rows"])

    def punish(advantages: Tensor, now: Now) -> Tensor:
        advantages[now.kept["rows"]] = -2.0
        return advantages

    return {"samples": once(swap), "advantages": once(punish)}


@way("negative-rare-token", "all-negative", "second",
     "only wrong answers are kept, A = -1, one rollout for many updates, no clip", 1, 3, objectives=("reinforce",),
     rollout=True, seen=(0, 8), setup={"inner_epochs": 24, "learning_rate": 1.5e-4, "updates": 24},
     from_start=True, always=True)  # fmt: skip
def all_negative(size: float) -> Places:
    return {"advantages": lambda advantages, _: torch.full_like(advantages, -size)}


@way("negative-rare-token", "hot-sampler", "second", "the sampler is far too hot, its errors are punished unclipped",
     3, 6, objectives=("reinforce",), rollout=True)  # fmt: skip
def hot_sampler(size: float) -> Places:
    def punish(advantages: Tensor, now: Now) -> Tensor:
        assert now.rewards is not None
        return (2 * now.rewards.to(advantages) - 1)[:, None].expand_as(advantages)

    return {"temperature": lambda *_: float(size), "advantages": punish}
