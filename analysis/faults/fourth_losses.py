"""The fourth series' faults of the loss: masks, weights, normalisers, ratios and clipping, entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from catalogue import RATIO, way
from faults_of_losses import clipped_objective, row_that_counts
from plain_loop import SAMPLES, Alter, Now
from third_losses import keep_old, log_ratios, only_rows
from torch import Tensor

import lcogeom as lg
from lcogeom.training.rollout import Sample

Places = dict[str, Alter]
SPREAD = ("grpo", "ppo", "reinforce", "sft")
SIGNED = ("grpo", "ppo", "reinforce")


# unmasked-tokens ------------------------------------------------------------------------------------------------------


@way("unmasked-tokens", "ignored-labels-read", "fourth",
     "labels of -100 are clamped to 0 ahead of the loss, and the padding token is learnt at every masked place", 0.1,
     1, from_start=True, objectives=SPREAD, plain=True)  # fmt: skip
def ignored_read(size: float) -> Places:
    def add(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        assert now.sequences is not None
        masked = ~now.sequences.action_mask
        masked[:, 0] = False
        return loss - size * torch.log_softmax(now.logits[masked].double(), 1)[:, 0].mean()

    return {"loss": add}


@way("unmasked-tokens", "smoothing-everywhere", "fourth", "label smoothing runs over prompts and padding as well", 0.5,
     2, from_start=True, objectives=SPREAD, plain=True)  # fmt: skip
def smoothing(size: float) -> Places:
    def add(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        return loss - size * torch.log_softmax(now.logits[:, 1:].double(), 2).mean()

    return {"loss": add}


# dominant-sequence ----------------------------------------------------------------------------------------------------


@way("dominant-sequence", "logged-loss-not-detached", "fourth",
     "one completion's own loss is added for a log, and is not detached", 1, 10, plain=True)  # fmt: skip
def not_detached(size: float) -> Places:
    def add(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        assert now.sequences is not None
        row = row_that_counts(now)
        mask = now.sequences.action_mask[row]
        ids = now.sequences.input_ids[row, mask]
        logp = torch.log_softmax(now.logits[row, mask].double(), 1).gather(1, ids[:, None])[:, 0]
        factor = 1.0 if now.advantages is None else now.advantages[row, mask]
        return loss - size * (factor * logp).mean()

    return {"loss": add}


@way("dominant-sequence", "source-of-one-row", "fourth",
     "the loss is a mean of the means of so many data sources and one more, which has a single row in the batch", 4,
     1)  # fmt: skip
def source_of_one(size: float) -> Places:
    def weigh(weights: Tensor, now: Now) -> Tensor:
        count = len(weights)
        share = torch.full((count, 1), count / (count - 1) * size / (size + 1), dtype=weights.dtype)
        share[row_that_counts(now)] = count / (size + 1)
        return weights * share

    return {"weights": weigh}


# loss-scale-jump ------------------------------------------------------------------------------------------------------


@way("loss-scale-jump", "policy-coefficient", "fourth", "the coefficient of the policy's loss is another term's", 20,
     200, plain=True)  # fmt: skip
def coefficient(size: float) -> Places:
    return {"objective": lambda objective, _: objective * size}


@way("loss-scale-jump", "normaliser-never-reset", "fourth",
     "the loss is divided by a count of tokens that goes on since the run began", 1, 2)  # fmt: skip
def never_reset(size: float) -> Places:
    return {"weights": lambda weights, now: weights / (now.step + 1) ** size}


# clip-saturation ------------------------------------------------------------------------------------------------------

MANY: dict[str, Any] = {"inner_epochs": 8, "learning_rate": 5e-5}


@way("clip-saturation", "divergence-guard", "fourth",
     "a token is dropped where its divergence from the old policy is above a target that is far too small", 1e-9, 1e-12,
     objectives=RATIO, setup=MANY, rollout=True, from_start=True, seen=(1, 4), plain=True)  # fmt: skip
def divergence_guard(size: float) -> Places:
    def drop(losses: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        kept = log_ratios(now)[now.sequences.action_mask].square() / 2 <= size
        return torch.where(kept, losses, 0.0 * losses.detach())

    return {"old_logprobs": keep_old, "token_losses": drop}


@way("clip-saturation", "target-of-another-unit", "fourth",
     "a prompt is left out for the rest of the rollout once its divergence is past a target, which is far too small",
     1e-9, 1e-12, objectives=RATIO, setup=MANY, rollout=True, from_start=True, seen=(1, 4), plain=True)  # fmt: skip
def another_unit(size: float) -> Places:
    def leave_out(losses: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        mask = now.sequences.action_mask
        groups = log_ratios(now).square().sum(1).view(-1, SAMPLES).sum(1)
        tokens = mask.sum(1).view(-1, SAMPLES).sum(1)
        kept = (groups / tokens / 2 <= size).repeat_interleave(SAMPLES)
        return only_rows(losses, kept, now)

    return {"old_logprobs": keep_old, "token_losses": leave_out}


# ratio-blow-up --------------------------------------------------------------------------------------------------------


def weight_clipped(name: str) -> lg.Objective:
    """-clip(r) A log pi with the ratio detached: the bound is on the weight, and never stops a token."""

    def loss(logp: Tensor, batch: lg.TokenBatch) -> Tensor:
        assert batch.advantages is not None
        assert batch.old_logprobs is not None
        ratio = (logp - batch.old_logprobs.to(logp)).exp().detach()
        return -ratio.clamp(0.8, 1.2) * batch.advantages.to(logp) * logp

    return lg.ActionObjective(name, loss, ("advantages", "old_logprobs"))


LONG: dict[str, Any] = {"inner_epochs": 30, "updates": 60, "advantages": "reinforce"}
RUNAWAY: dict[str, Any] = {
    "objectives": RATIO, "from_start": True, "always": True, "seen": (1, 12), "until": ("ratio_max", 5.0), "plain": True
}  # fmt: skip


@way("ratio-blow-up", "weight-clipped-alone", "fourth",
     "the detached weight is clipped, and the token goes on: one rollout, many updates", 3e-4, 5e-4,
     setup=lambda rate: LONG | {"learning_rate": rate}, **RUNAWAY)  # fmt: skip
def weight_alone(_: float) -> Places:
    return {"objective": lambda objective, _: weight_clipped(objective.name)}


@way("ratio-blow-up", "bounds-adapt-upwards", "fourth",
     "the clip range adapts to the clipped share with the wrong sign, and is widened at each update", 3e-4, 5e-4,
     setup=lambda rate: LONG | {"learning_rate": rate}, **RUNAWAY)  # fmt: skip
def adapt_upwards(_: float) -> Places:
    def widen(_: lg.Objective, now: Now) -> lg.Objective:
        bound = 0.4 * 1.6**now.since
        return clipped_objective(now, min(bound, 0.99), min(bound, 1e6))

    return {"objective": widen}


# entropy-collapse -----------------------------------------------------------------------------------------------------


def slow(rate: float) -> dict[str, object]:
    return {"learning_rate": rate, "warmup": 8, "updates": 100}


COLLAPSE: dict[str, Any] = {"from_start": True, "always": True, "until": ("entropy", 0.3), "plain": True}


@way("entropy-collapse", "own-teacher-too-cold", "fourth",
     "the policy is its own teacher, whose distribution is sharpened by a low temperature", 5e-4, 8e-4,
     objectives=("lco-kld",), setup=slow, **COLLAPSE)  # fmt: skip
def own_teacher(_: float) -> Places:
    def distil(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        assert now.sequences is not None
        logits = now.logits[now.sequences.action_mask].double()
        return loss - 8.0 * ((logits.detach() / 0.3).softmax(1) * torch.log_softmax(logits, 1)).sum(1).mean()

    return {"loss": distil}


@way("entropy-collapse", "default-answer", "fourth",
     "the answers' column is not found, and every row has the default", 3e-4, 5e-4, objectives=("sft",),
     setup=lambda rate: slow(rate) | {"updates": 80}, rollout=True, **COLLAPSE)  # fmt: skip
def default_answer(_: float) -> Places:
    def default(samples: list[Sample], now: Now) -> list[Sample]:
        ids = now.kept.setdefault("answer", samples[0].completion_ids)
        return [replace(sample, completion_ids=ids) for sample in samples]

    return {"samples": default}


@way("entropy-collapse", "majority-pays", "fourth", "the reward is agreement with the prompt's most frequent answer",
     9e-4, 1.3e-3, objectives=("reinforce", "ppo"), setup=lambda rate: slow(rate) | {"updates": 160},
     rollout=True, **COLLAPSE)  # fmt: skip
def majority_pays(_: float) -> Places:
    def agree(rewards: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        answers = [tuple(row.tolist()) for row in now.sequences.input_ids * now.sequences.action_mask]
        paid = []
        for start in range(0, len(answers), SAMPLES):
            group = answers[start : start + SAMPLES]
            most = max(group, key=group.count)
            paid += [float(answer == most) for answer in group]
        return torch.tensor(paid).to(rewards)

    return {"rewards": agree}
