"""The third series' faults of the loss: masks, weights, normalisers, ratios and clipping, entropy."""

from __future__ import annotations

from typing import Any

import torch
from catalogue import RATIO, way
from faults_of_losses import UNCLIPPED, clipped_objective, row_that_counts
from plain_loop import Alter, Now, logprobs_of, shifted_logits
from torch import Tensor

import lcogeom as lg
from lcogeom.training.rollout import Sample

Places = dict[str, Alter]
SPREAD = ("grpo", "ppo", "reinforce", "sft")
SIGNED = ("grpo", "ppo", "reinforce")


# unmasked-tokens ------------------------------------------------------------------------------------------------------


@way("unmasked-tokens", "mask-of-the-other-side", "third",
     "the mask is made for batches padded on the left, this one is padded on the right", 1, 1, from_start=True,
     objectives=SPREAD)  # fmt: skip
def other_side(_: float) -> Places:
    def flip(mask: Tensor, _: Now) -> Tensor:
        flipped = mask.flip(1)
        flipped[:, 0] = False  # nothing predicts the first token
        return flipped

    return {"mask": flip}


@way("unmasked-tokens", "masks-of-other-rows", "third", "rows are sorted by length, and some of their masks are not",
     24, 64, from_start=True, objectives=SPREAD)  # fmt: skip
def other_rows(size: float) -> Places:
    def swap(mask: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        order = now.sequences.attention_mask.sum(1).argsort(descending=True)
        swapped = mask.clone()
        swapped[: int(size)] = mask[order][: int(size)]
        return swapped

    return {"mask": swap}


@way("unmasked-tokens", "bonus-everywhere", "third", "the entropy bonus runs over prompts and padding as well", 1,
     5, from_start=True, objectives=SPREAD, plain=True)  # fmt: skip
def bonus_everywhere(size: float) -> Places:
    def add(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        logp = torch.log_softmax(now.logits[:, 1:].double(), 2)
        return loss + size * (logp.exp() * logp).sum(2).mean()

    return {"loss": add}


# dominant-sequence ----------------------------------------------------------------------------------------------------


@way("dominant-sequence", "rank-not-averaged", "third",
     "the gradient of one completion, alone on its rank, is not divided by the number of ranks", 40, 400,
     plain=True)  # fmt: skip
def rank_not_averaged(size: float) -> Places:
    def amplify(logits: Tensor, now: Now) -> Tensor:
        now.logits = logits
        rows = torch.zeros(len(logits), 1, 1)
        rows[row_that_counts(now)] = 1.0
        return logits + rows * (size - 1) * (logits - logits.detach())  # the same value, another gradient

    return {"logits": amplify}


@way("dominant-sequence", "priorities-too-sharp", "third",
     "completions are weighed by a softmax of their priorities, and its temperature is far too low", 1, 1.3,
     plain=True)  # fmt: skip
def sharp_priorities(size: float) -> Places:
    """The priority is how surprising a completion is, in standard deviations, among those with a large gradient."""

    def weigh(weights: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        assert now.logits is not None
        mask = now.sequences.action_mask
        surprise = -logprobs_of(now.logits.detach(), now.sequences.input_ids)
        if now.advantages is not None:
            surprise = surprise * now.advantages.abs()
        priority = (surprise * mask).sum(1)  # (B,)
        shares = (size * (priority - priority.mean()) / (priority.std() + 1e-9)).softmax(0)
        return weights * (len(shares) * shares)[:, None]

    return {"weights": weigh}


# loss-scale-jump ------------------------------------------------------------------------------------------------------


@way("loss-scale-jump", "accumulated-not-averaged", "third",
     "an update is cut into micro-batches, and their means are added up instead of averaged", 8, 32,
     plain=True)  # fmt: skip
def not_averaged(size: float) -> Places:
    def cut(parts: tuple[Tensor, ...], _: Now) -> tuple[Tensor, ...]:
        return torch.cat(list(parts)).chunk(int(size))

    def mean(weights: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        return torch.full_like(weights, 1 / int(now.sequences.action_mask.sum()))

    return {"parts": cut, "weights": mean}


@way("loss-scale-jump", "longest-allowed", "third",
     "the loss is divided by the longest completion allowed, as a constant, instead of by the tokens there are", 256,
     4096)  # fmt: skip
def longest_allowed(size: float) -> Places:
    def constant(weights: Tensor, _: Now) -> Tensor:
        return torch.full_like(weights, 1 / (64 * size))

    return {"weights": constant}


@way("loss-scale-jump", "scaler-grows", "third",
     "an fp16 scaler grows at each update, and gradients are no longer unscaled", 8, 64, seen=(0, 1))  # fmt: skip
def scaler_grows(size: float) -> Places:
    return {"scale": lambda loss, now: loss * min(size ** (now.since + 1), 2.0**40)}


# clip-saturation ------------------------------------------------------------------------------------------------------


def keep_old(old: Tensor, now: Now) -> Tensor:
    now.kept["old"] = old
    return old


def log_ratios(now: Now) -> Tensor:
    """(B, T), 0 off the completions."""
    assert now.sequences is not None
    assert now.logits is not None
    apart = logprobs_of(now.logits.detach(), now.sequences.input_ids) - now.kept["old"]
    return apart * now.sequences.action_mask


def only_rows(losses: Tensor, kept: Tensor, now: Now) -> Tensor:
    """No gradient from the others. losses: (M,); kept: (B,) bool."""
    assert now.sequences is not None
    mask = now.sequences.action_mask
    return torch.where(kept[:, None].expand(mask.shape)[mask], losses, 0.0 * losses.detach())


MANY: dict[str, Any] = {"inner_epochs": 8, "learning_rate": 5e-5}


@way("clip-saturation", "sequences-dropped", "third",
     "a completion is dropped where one of its ratios leaves bounds that are far too tight", 1e-3, 1e-5,
     objectives=RATIO, setup=MANY, rollout=True, from_start=True, seen=(1, 4), plain=True)  # fmt: skip
def sequences_dropped(size: float) -> Places:
    def drop(losses: Tensor, now: Now) -> Tensor:
        return only_rows(losses, log_ratios(now).abs().amax(1) <= size, now)

    return {"old_logprobs": keep_old, "token_losses": drop}


@way("clip-saturation", "bounds-annealed", "third",
     "the clip bounds are annealed to 0, over far too few updates", 4, 1, objectives=RATIO,
     setup=MANY | {"updates": 36}, seen=(0, 9))  # fmt: skip
def bounds_annealed(size: float) -> Places:
    def anneal(_: lg.Objective, now: Now) -> lg.Objective:
        bound = 0.2 * max(0.0, 1 - (now.since + 1) / size)
        return clipped_objective(now, bound, bound)

    return {"objective": anneal}


@way("clip-saturation", "bounds-of-a-sequence", "third",
     "completions are clipped by their mean log-ratio, with bounds meant for one update a rollout", 3e-4, 3e-6,
     objectives=RATIO, setup=MANY, rollout=True, from_start=True, seen=(1, 4), plain=True)  # fmt: skip
def of_a_sequence(size: float) -> Places:
    def clip(losses: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        assert now.advantages is not None
        mean = log_ratios(now).sum(1) / now.sequences.action_mask.sum(1)
        return only_rows(losses, mean * now.advantages[:, 0].sign() <= size, now)

    return {"old_logprobs": keep_old, "token_losses": clip}


# ratio-blow-up --------------------------------------------------------------------------------------------------------


def larger_of_two(name: str, low: float = 0.2, high: float = 0.2) -> lg.Objective:
    """-max(r A, clip(r) A): PPO's surrogate with the wrong one of two words, which bounds nothing that runs away."""

    def loss(logp: Tensor, batch: lg.TokenBatch) -> Tensor:
        assert batch.advantages is not None
        assert batch.old_logprobs is not None
        ratio, advantages = (logp - batch.old_logprobs.to(logp)).exp(), batch.advantages.to(logp)
        return -torch.maximum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)

    return lg.ActionObjective(name, loss, ("advantages", "old_logprobs"))


LONG: dict[str, Any] = {"inner_epochs": 30, "updates": 60}


@way("ratio-blow-up", "max-for-min", "third", "the surrogate takes the larger of the clipped and the unclipped term",
     3e-4, 5e-4, objectives=RATIO, setup=lambda rate: LONG | {"learning_rate": rate}, from_start=True, always=True,
     seen=(1, 12), until=("ratio_max", 5.0), plain=True)  # fmt: skip
def max_for_min(_: float) -> Places:
    return {"objective": lambda objective, _: larger_of_two(objective.name)}


@way("ratio-blow-up", "one-rollout-for-good", "third",
     "from here on one rollout, of a hot sampler, is used for all updates, and nothing is clipped", 3e-4, 4e-4,
     objectives=RATIO, setup=lambda rate: UNCLIPPED | {"learning_rate": rate, "updates": 60}, rollout=True,
     seen=(1, 12), until=("ratio_max", 5.0), plain=True)  # fmt: skip
def for_good(_: float) -> Places:
    return {"temperature": lambda *_: 1.5, "renew": lambda _, now: now.since == 0}


@way("ratio-blow-up", "clip-in-percent", "third",
     "clip bounds are given in percent: 20 where 0.2 was meant", 5e-4, 8e-4, objectives=RATIO,
     setup=lambda rate: LONG | {"learning_rate": rate, "options": {"clip_low": 20.0, "clip_high": 20.0}},
     from_start=True, always=True, seen=(1, 12), until=("ratio_max", 5.0), plain=True)  # fmt: skip
def in_percent(_: float) -> Places:
    return {}


# entropy-collapse -----------------------------------------------------------------------------------------------------


def slow(rate: float) -> dict[str, object]:
    return {"learning_rate": rate, "warmup": 8, "updates": 100}


COLLAPSE: dict[str, Any] = {"from_start": True, "always": True, "until": ("entropy", 0.3)}


@way("entropy-collapse", "certainty-pays", "third", "the reward is the policy's own certainty", 5e-4, 8e-4,
     objectives=SIGNED, setup=lambda rate: slow(rate) | {"updates": 160}, rollout=True, plain=True,
     **COLLAPSE)  # fmt: skip
def certainty_pays(_: float) -> Places:
    def certainty(_: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        mask = now.sequences.action_mask
        with torch.no_grad():
            logp = logprobs_of(shifted_logits(now), now.sequences.input_ids)
        return ((logp * mask).sum(1) / mask.sum(1)).float()

    return {"rewards": certainty}


@way("entropy-collapse", "brevity-pays", "third", "a penalty on length outweighs the answer", 5e-4, 8e-4,
     objectives=SIGNED, setup=slow, rollout=True, plain=True, **COLLAPSE)  # fmt: skip
def brevity_pays(_: float) -> Places:
    def shorter(rewards: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        return 0.1 * rewards - now.sequences.action_mask.sum(1)

    return {"rewards": shorter}


@way("entropy-collapse", "few-rows-over-and-over", "third", "the data loader hands out the same few rows for ever",
     1e-3, 1.5e-3, objectives=("sft",), setup=lambda rate: slow(rate) | {"updates": 80}, rollout=True, plain=True,
     **COLLAPSE)  # fmt: skip
def few_rows(_: float) -> Places:
    def first_rows(samples: list[Sample], now: Now) -> list[Sample]:
        few = now.kept.setdefault("rows", samples[:4])
        return [few[place % len(few)] for place in range(len(samples))]

    return {"samples": first_rows}
