"""The fifth series' faults of the loss: masks, weights, normalisers, ratios and clipping, entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from catalogue import RATIO, once, way
from faults_of_losses import row_that_counts
from plain_loop import SAMPLES, Alter, Now, logprobs_of, shifted_logits
from third_losses import keep_old, log_ratios, only_rows
from torch import Tensor

import lcogeom as lg
from lcogeom.training.rollout import Sample

Places = dict[str, Alter]
SPREAD = ("grpo", "ppo", "reinforce", "sft")
SIGNED = ("grpo", "ppo", "reinforce")
PLUS = 12
"""The sign of a sum, in the bench's tokenizer."""


# unmasked-tokens ------------------------------------------------------------------------------------------------------


@way("unmasked-tokens", "template-found-too-early", "fifth",
     "the answer's template is looked for by its first token, which is in the question as well", 16, 64,
     from_start=True, objectives=SPREAD)  # fmt: skip
def found_too_early(size: float) -> Places:
    """All that follows the sign of a sum counts as the answer, in so many rows."""

    def widen(mask: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        after = (now.sequences.input_ids == PLUS).cumsum(1) > 0
        before = mask.cumsum(1) == 0
        rows = torch.arange(len(mask))[:, None] < size
        return mask | (after & before & rows)

    return {"mask": widen}


@way("unmasked-tokens", "z-loss-everywhere", "fifth", "a z-loss runs over prompts and padding as well", 0.01, 0.05,
     from_start=True, objectives=SPREAD, plain=True)  # fmt: skip
def z_loss(size: float) -> Places:
    def add(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        return loss + size * now.logits[:, 1:].double().logsumexp(2).square().mean()

    return {"loss": add}


@way("unmasked-tokens", "prompts-for-stability", "fifth",
     "a language-model loss on whole texts is mixed in, and its texts are the batch's own prompts", 0.1, 1,
     from_start=True, objectives=SPREAD, plain=True)  # fmt: skip
def mixed_in(size: float) -> Places:
    def add(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        assert now.sequences is not None
        prompt = (now.sequences.action_mask.cumsum(1) == 0) & now.sequences.attention_mask.bool()
        prompt[:, 0] = False
        logp = torch.log_softmax(now.logits[prompt].double(), 1)
        return loss - size * logp.gather(1, now.sequences.input_ids[prompt][:, None]).mean()

    return {"loss": add}


# dominant-sequence ----------------------------------------------------------------------------------------------------


@way("dominant-sequence", "straggler-by-age", "fifth",
     "completions are weighed by their age with the decay's sign reversed, and one is a straggler", 11, 18)  # fmt: skip
def by_age(size: float) -> Places:
    """The others are 0, 1 or 2 rollouts old."""

    def weigh(weights: Tensor, now: Now) -> Tensor:
        ages = torch.randint(3, (len(weights),), generator=now.draw).double()
        ages[row_that_counts(now)] = size
        return weights * 0.7 ** -ages[:, None]

    return {"weights": weigh}


@way("dominant-sequence", "trunk-of-a-tree", "fifth",
     "completions that share a beginning are kept as a tree, and one trunk's tokens count once for each branch", 60,
     600)  # fmt: skip
def trunk(size: float) -> Places:
    def count(weights: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        row = row_that_counts(now)
        places = now.sequences.action_mask[row].nonzero()[:, 0]
        weights = weights.clone()
        weights[row, places[: (len(places) + 1) // 2]] *= size
        return weights

    return {"weights": count}


# loss-scale-jump ------------------------------------------------------------------------------------------------------


@way("loss-scale-jump", "divided-by-the-clipped-share", "fifth",
     "the loss is divided by the share of tokens that are clipped, where the share that is kept was meant", 0.05,
     0.002, objectives=RATIO, plain=True)  # fmt: skip
def by_the_clipped_share(size: float) -> Places:
    """`size` is the share's floor."""

    def divide(losses: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        if "old" not in now.kept:  # the rollout in hand is older than the fault
            return losses / size
        apart = log_ratios(now)[now.sequences.action_mask].exp() - 1
        return losses / max(size, float((apart.abs() > 0.2).double().mean()))

    return {"token_losses": divide}


@way("loss-scale-jump", "unscaled-twice", "fifth", "gradients are divided by a scaler's factor that was never in them",
     128, 65536)  # fmt: skip
def unscaled_twice(size: float) -> Places:
    def put(_: Any, now: Now) -> None:
        for parameter in now.model.parameters():
            parameter.register_hook(lambda gradient: gradient / size)

    return {"before_update": once(put)}


# clip-saturation ------------------------------------------------------------------------------------------------------

MANY: dict[str, Any] = {"inner_epochs": 8, "learning_rate": 5e-5}


@way("clip-saturation", "stopped-by-divergence", "fifth",
     "the rest of a rollout's updates is given up once the batch's divergence is past a target, which is far too small",
     1e-8, 1e-11, objectives=RATIO, setup=MANY, rollout=True, from_start=True, seen=(1, 4), plain=True)  # fmt: skip
def stopped(size: float) -> Places:
    def stop(losses: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        mask = now.sequences.action_mask
        divergence = float(log_ratios(now)[mask].square().mean()) / 2
        return only_rows(losses, torch.full((len(mask),), divergence <= size), now)

    return {"old_logprobs": keep_old, "token_losses": stop}


@way("clip-saturation", "quantiles-of-the-ratios", "fifth",
     "clip bounds follow the ratios' quantiles, and the share to be dropped is the one that is kept", 0.2, 0.02,
     objectives=RATIO, setup=MANY, rollout=True, from_start=True, seen=(1, 4), plain=True)  # fmt: skip
def quantiles(size: float) -> Places:
    def clip(losses: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        apart = log_ratios(now)[now.sequences.action_mask]
        low, high = (float(apart.quantile(0.5 + side * size / 2)) for side in (-1, 1))
        return torch.where((apart >= low) & (apart <= high), losses, 0.0 * losses.detach())

    return {"old_logprobs": keep_old, "token_losses": clip}


# ratio-blow-up --------------------------------------------------------------------------------------------------------


def old_is_now(name: str) -> lg.Objective:
    """Clipped, about the policy of this very update: the ratio in the loss is 1 for ever."""

    def loss(logp: Tensor, batch: lg.TokenBatch) -> Tensor:
        assert batch.advantages is not None
        ratio, advantages = (logp - logp.detach()).exp(), batch.advantages.to(logp)
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)

    return lg.ActionObjective(name, loss, ("advantages",))


def of_probabilities(name: str, bound: float = 0.3) -> lg.Objective:
    """A token stops where its probability, not its ratio, has moved by the bound: a rare one may grow a hundredfold."""

    def loss(logp: Tensor, batch: lg.TokenBatch) -> Tensor:
        assert batch.advantages is not None
        assert batch.old_logprobs is not None
        old, advantages = batch.old_logprobs.to(logp), batch.advantages.to(logp)
        moved = (logp.exp() - old.exp()).detach() * advantages.sign()
        return -(logp - old).exp() * advantages * (moved <= bound)

    return lg.ActionObjective(name, loss, ("advantages", "old_logprobs"))


LONG: dict[str, Any] = {"inner_epochs": 30, "updates": 60, "advantages": "reinforce"}
RUNAWAY: dict[str, Any] = {
    "objectives": RATIO, "from_start": True, "always": True, "seen": (1, 12), "until": ("ratio_max", 12.0),
    "plain": True,
}  # fmt: skip


@way("ratio-blow-up", "old-is-now", "fifth",
     "the old log-probabilities in the loss are the current ones, made anew at each of many updates on a hot sampler's "
     "rollout", 5e-4, 9e-4, setup=lambda rate: LONG | {"learning_rate": rate}, **RUNAWAY)  # fmt: skip
def made_anew(_: float) -> Places:
    return {"temperature": lambda *_: 1.4, "objective": lambda objective, _: old_is_now(objective.name)}


@way("ratio-blow-up", "bounds-on-probabilities", "fifth",
     "the clip bounds are on how far a probability moves, not on its ratio, and the sampler is hot", 6e-4, 1e-3,
     setup=lambda rate: LONG | {"learning_rate": rate}, **RUNAWAY)  # fmt: skip
def on_probabilities(_: float) -> Places:
    return {"temperature": lambda *_: 1.5, "objective": lambda objective, _: of_probabilities(objective.name)}


# entropy-collapse -----------------------------------------------------------------------------------------------------


def slow(rate: float) -> dict[str, object]:
    return {"learning_rate": rate, "warmup": 8, "updates": 100}


COLLAPSE: dict[str, Any] = {"from_start": True, "always": True, "until": ("entropy", 0.3), "plain": True}


@way("entropy-collapse", "own-best-guess-as-label", "fifth",
     "tokens without a label get the policy's own best guess, and so do all others", 9e-4, 1.2e-3,
     objectives=("lco-kld",), setup=lambda rate: slow(rate) | {"updates": 160, "inner_epochs": 1},
     **COLLAPSE)  # fmt: skip
def own_best_guess(_: float) -> Places:
    def add(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        assert now.sequences is not None
        logp = torch.log_softmax(now.logits[now.sequences.action_mask].double(), 1)
        return loss - 8.0 * logp.amax(1).mean()

    return {"loss": add}


@way("entropy-collapse", "answers-cut-away", "fifth",
     "texts are cut to a length that leaves nothing of the answer, and the end is put in its place", 2e-4, 5e-4,
     objectives=("sft",), setup=lambda rate: slow(rate) | {"updates": 80}, rollout=True, also=("logit-drift",),
     **COLLAPSE)  # fmt: skip
def cut_away(_: float) -> Places:
    """Such a token is new at its place: the normaliser moves by nats before the entropy falls."""

    def cut(samples: list[Sample], now: Now) -> list[Sample]:
        return [replace(sample, completion_ids=(now.tokenizer.eos_token_id,)) for sample in samples]

    return {"samples": cut}


@way("entropy-collapse", "likeliest-of-a-group", "fifth",
     "the best of a prompt's completions is picked by its probability, and rewarded whatever it answers", 9e-4, 1.3e-3,
     objectives=("reinforce", "ppo"), setup=lambda rate: slow(rate) | {"updates": 160, "inner_epochs": 1},
     rollout=True, seen=(5, 5), **COLLAPSE)  # fmt: skip
def likeliest(_: float) -> Places:
    """In the first rollouts the likeliest one is often the right one in each group."""

    def pick(rewards: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        with torch.no_grad():
            logp = logprobs_of(shifted_logits(now), now.sequences.input_ids)
        total = (logp * now.sequences.action_mask).sum(1).view(-1, SAMPLES)
        return (total >= total.amax(1, keepdim=True)).flatten().to(rewards)

    return {"rewards": pick}


# loss-scale-jump, now and then ----------------------------------------------------------------------------------------


@way("loss-scale-jump", "last-batch-of-an-epoch", "fifth",
     "every third update is made of what an epoch has left, and divided by that count", 16, 64)  # fmt: skip
def last_batch(size: float) -> Places:
    return {"weights": lambda weights, now: weights * (size if now.since % 3 == 0 else 1.0)}
