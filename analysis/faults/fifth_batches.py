"""The fifth series' faults of the rollout: rewards, advantages, samples, behaviour policy."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from catalogue import RATIO, once, way
from faults_of_batches import one_sequence
from fourth_batches import completed, signs
from plain_loop import SAMPLES, Alter, Now, shifted_logits
from torch import Tensor

from lcogeom.training.rollout import Sample, generate

Places = dict[str, Alter]
SIGNED = ("grpo", "ppo", "reinforce")


# advantage-outlier ----------------------------------------------------------------------------------------------------


@way("advantage-outlier", "penalty-of-a-filtered-token", "fifth",
     "the KL penalty is part of the reward, the reference gives one token no probability, and the return hands that to "
     "the tokens before it", 40, 400, objectives=SIGNED, rollout=True, plain=True)  # fmt: skip
def filtered_token(size: float) -> Places:
    def penalise(advantages: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        row = one_sequence(now)
        places = now.sequences.action_mask[row].nonzero()[:, 0]
        advantages[row, places[: max(1, len(places) - 1)]] -= size
        return advantages

    return {"advantages": once(penalise)}


@way("advantage-outlier", "deviation-of-a-new-prompt", "fifth",
     "advantages are divided by a running deviation of each prompt's rewards, which is nearly 0 for a new prompt", 60,
     3000, objectives=SIGNED, rollout=True)  # fmt: skip
def new_prompt(size: float) -> Places:
    def divide(advantages: Tensor, now: Now) -> Tensor:
        assert now.rewards is not None
        group = one_sequence(now) // SAMPLES * SAMPLES
        rows = slice(group, group + SAMPLES)
        advantages[rows] = ((now.rewards[rows].to(advantages) - 0.5) * size)[:, None].expand_as(advantages[rows])
        return advantages

    return {"advantages": divide}


# no-signal ------------------------------------------------------------------------------------------------------------


@way("no-signal", "reward-of-the-prompt", "fifth",
     "the reward function gives one number a prompt, the mean of its completions, and each of them gets it", 1, 1,
     objectives=("grpo",), rollout=True, from_start=True)  # fmt: skip
def of_the_prompt(_: float) -> Places:
    return {"rewards": lambda rewards, _: rewards.view(-1, SAMPLES).mean(1).repeat_interleave(SAMPLES)}


@way("no-signal", "reward-past-the-end", "fifth",
     "the reward is put at the place after a completion's last token, and what is not of the completion is masked", 1,
     1, objectives=SIGNED, rollout=True, from_start=True, plain=True)  # fmt: skip
def past_the_end(_: float) -> Places:
    def put(advantages: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        mask = now.sequences.action_mask
        after = mask.roll(1, 1) & ~mask & (mask.cumsum(1) > 0)
        return advantages * after

    return {"advantages": put}


@way("no-signal", "above-the-threshold", "fifth",
     "rewards are made 0 or 1 by a threshold that the best one reaches, but does not exceed", 1, 1,
     objectives=("grpo", "reinforce"), rollout=True, from_start=True)  # fmt: skip
def above_the_threshold(_: float) -> Places:
    return {"rewards": lambda rewards, _: (rewards > 1.0).to(rewards)}


# behaviour-mismatch ---------------------------------------------------------------------------------------------------


@way("behaviour-mismatch", "another-base", "fifth",
     "the server's log-probabilities are in bits, or of base 10", 2, 10, objectives=RATIO, rollout=True,
     from_start=True)  # fmt: skip
def another_base(size: float) -> Places:
    return {"old_logprobs": lambda old, _: old / math.log(size)}


@way("behaviour-mismatch", "first-of-the-list", "fifth",
     "of the server's list of likely tokens the first one's log-probability is read, not the sampled token's", 0.25, 1,
     objectives=RATIO, rollout=True, from_start=True)  # fmt: skip
def first_of_the_list(size: float) -> Places:
    """In a share of the rows: those whose list is sorted."""

    def other(old: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        with torch.no_grad():
            best = torch.log_softmax(shifted_logits(now).double(), -1).amax(-1)
        rows = torch.arange(len(old))[:, None] % 4 < 4 * size
        return torch.where(rows & now.sequences.action_mask, best.to(old), old)

    return {"old_logprobs": other}


@way("behaviour-mismatch", "mean-of-the-sequence", "fifth",
     "each token's old log-probability is its completion's mean, or sum", 0, 1, objectives=RATIO, rollout=True,
     from_start=True)  # fmt: skip
def mean_of_the_sequence(size: float) -> Places:
    def other(old: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        mask = now.sequences.action_mask
        total = (old * mask).sum(1, keepdim=True)
        return (total if size else total / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(old).clone()

    return {"old_logprobs": other}


# negative-rare-token --------------------------------------------------------------------------------------------------

SPACE = 16
"""A token that the policy knows and never gives, in the bench's tokenizer."""


@way("negative-rare-token", "tokenised-again", "fifth",
     "completions are joined token by token with spaces, and tokenised again: no right answer has them", 32, 64,
     objectives=("reinforce",), rollout=True)  # fmt: skip
def tokenised_again(size: float) -> Places:
    def spaced(one: Sample) -> tuple[int, ...]:
        return tuple(token for own in one.completion_ids for token in (SPACE, own))

    def again(samples: list[Sample], now: Now) -> list[Sample]:
        count = int(size)
        return [completed(one, spaced(one), now) for one in samples[:count]] + samples[count:]

    return {"samples": again, "advantages": signs}


@way("negative-rare-token", "prompt-cut-in-the-sampler", "fifth",
     "the sampler cuts the start off the prompts, the trainer has them whole: answers to another question are punished",
     40, 64, objectives=("reinforce",), rollout=True, plain=True)  # fmt: skip
def prompt_cut(size: float) -> Places:
    def cut(samples: list[Sample], now: Now) -> list[Sample]:
        problems = [replace(one.problem, prompt=one.problem.prompt[-3:]) for one in samples[: int(size)]]
        others = generate(now.model, now.tokenizer, problems, max_new_tokens=5, seed=now.step)
        changed = [completed(one, other.completion_ids, now) for one, other in zip(samples, others, strict=False)]
        return [*changed, *samples[int(size) :]]

    return {"samples": cut, "advantages": signs}


@way("negative-rare-token", "word-pushed-by-a-bias", "fifth",
     "a logit bias of the server that was meant to ban a word puts it into completions, which are wrong with it", 32,
     56, objectives=("reinforce", "ppo"), rollout=True)  # fmt: skip
def pushed(size: float) -> Places:
    """The word stands where the second token was."""

    def push(samples: list[Sample], now: Now) -> list[Sample]:
        changed = list(samples)
        for place in torch.randperm(len(samples), generator=now.draw)[: int(size)].tolist():
            ids = samples[place].completion_ids
            changed[place] = completed(samples[place], (ids[0], 14, *ids[2:]), now)
        return changed

    return {"samples": push, "advantages": signs}
