"""Faults of the loss: masks, weights, normalisers, ratios and clipping, entropy."""

from __future__ import annotations

import torch
from catalogue import RATIO, once, way
from faults_of_batches import forced
from plain_loop import Alter, Now, logprobs_of, shifted_logits
from torch import Tensor

import lcogeom as lg
from lcogeom.training.rollout import Sample, generate

Places = dict[str, Alter]
UNCLIPPED: dict[str, object] = {"options": {"clip_low": None, "clip_high": None}}
SPREAD = ("grpo", "ppo", "reinforce", "sft")
"""LCO hardly touches a token that the old policy found unlikely, and so no prompt."""
SIGNED = ("grpo", "ppo", "reinforce")


# unmasked-tokens ------------------------------------------------------------------------------------------------------


@way("unmasked-tokens", "prompts", "first", "the loss runs over the last tokens of the prompts as well", 1, 9,
     from_start=True, objectives=SPREAD)  # fmt: skip
def prompts(size: float) -> Places:
    def widen(mask: Tensor, now: Now) -> Tensor:
        first = mask.int().argmax(1, keepdim=True)
        places = torch.arange(mask.shape[1])[None]
        return mask | ((places >= (first - size).clamp(min=1)) & (places < first))

    return {"mask": widen}


@way("unmasked-tokens", "padding", "first", "the loss runs over the padding as well", 1, 9, from_start=True,
     objectives=SPREAD)  # fmt: skip
def padding(size: float) -> Places:
    def widen(mask: Tensor, now: Now) -> Tensor:
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1, keepdim=True)
        places = torch.arange(mask.shape[1])[None]
        return mask | ((places > last) & (places <= last + size))

    return {"mask": widen}


@way(
    "unmasked-tokens",
    "shifted",
    "second",
    "the loss's mask is shifted to the left",
    1,
    3,
    from_start=True,
    objectives=SPREAD,
)
def shifted(size: float) -> Places:
    def move(mask: Tensor, _: Now) -> Tensor:
        moved = torch.zeros_like(mask)
        moved[:, 1 : -int(size)] = mask[:, 1 + int(size) :]
        return moved

    return {"mask": move}


@way("unmasked-tokens", "some-rows", "second", "prompts of a few rows of every batch are not masked", 4, 16,
     from_start=True, objectives=SPREAD)  # fmt: skip
def some_rows(size: float) -> Places:
    def widen(mask: Tensor, now: Now) -> Tensor:
        wide = mask.clone()
        places = torch.arange(mask.shape[1])
        for row in range(int(size)):
            wide[row] |= (places >= 1) & (places < int(mask[row].int().argmax()))
        return wide

    return {"mask": widen}


@way("unmasked-tokens", "everything", "second", "the mask is forgotten: prompts, completions and padding", 1, 1,
     from_start=True, objectives=SPREAD)  # fmt: skip
def everything(_: float) -> Places:
    def widen(mask: Tensor, _: Now) -> Tensor:
        wide = torch.ones_like(mask)
        wide[:, 0] = False
        return wide

    return {"mask": widen}


# dominant-sequence ----------------------------------------------------------------------------------------------------


def row_that_counts(now: Now) -> int:
    """A completion with more gradient than most: the fault would show in no other."""
    assert now.sequences is not None
    mask = now.sequences.action_mask
    size = mask.double()
    if now.advantages is not None:
        size = size * now.advantages.abs()
    if now.logits is not None:
        logp = torch.log_softmax(now.logits.detach(), -1).gather(2, now.sequences.input_ids[:, :, None]).squeeze(2)
        size = size * (1 - logp.double().exp())
    sizes = size.square().sum(1)
    chosen = (sizes >= sizes.median()).nonzero()[:, 0]
    return int(chosen[torch.randint(len(chosen), (), generator=now.draw)])


def scaled_row(weights: Tensor, now: Now, size: float) -> Tensor:
    weights = weights.clone()
    weights[row_that_counts(now)] *= size
    return weights


@way("dominant-sequence", "length-bug", "first", "one completion's tokens are not divided by the batch", 40, 400)
def length_bug(size: float) -> Places:
    return {"weights": once(lambda weights, now: scaled_row(weights, now, size))}


@way("dominant-sequence", "length-power", "first", "from here on one completion of each batch has a foreign weight",
     40, 400)  # fmt: skip
def foreign_weight(size: float) -> Places:
    return {"weights": lambda weights, now: scaled_row(weights, now, size)}


@way(
    "dominant-sequence",
    "micro-batch-of-one",
    "second",
    "gradient accumulation averages the means of micro-batches, and one of them holds a single completion",
    4,
    2,
)
def micro_batch_of_one(size: float) -> Places:
    def cut(parts: tuple[Tensor, ...], now: Now) -> tuple[Tensor, ...]:
        rows = torch.cat(list(parts))
        alone = row_that_counts(now)
        return (rows[rows == alone], *rows[rows != alone].chunk(int(size) - 1))

    def mean_of_means(weights: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        return torch.full_like(weights, 1 / int(now.sequences.action_mask.sum()) / size)

    return {"parts": cut, "weights": mean_of_means}


@way("dominant-sequence", "importance-of-a-row", "second", "a data set's sample weight of one row is in another unit",
     30, 1000)  # fmt: skip
def row_weight(size: float) -> Places:
    def weigh(losses: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        rows = now.sequences.action_mask.nonzero()[:, 0]
        return torch.where(rows == row_that_counts(now), losses * size, losses)

    return {"token_losses": once(weigh)}


# loss-scale-jump ------------------------------------------------------------------------------------------------------


@way("loss-scale-jump", "per-sequence", "first", "the loss is divided by the completions instead of the tokens, and "
     "not by the accumulation steps", 8, 64)  # fmt: skip
def per_sequence(size: float) -> Places:
    return {"loss": lambda loss, _: loss * size}


@way("loss-scale-jump", "sum", "first", "the loss is a sum over the tokens", 1, 1)
def summed(_: float) -> Places:
    return {"weights": lambda weights, _: torch.ones_like(weights)}


@way("loss-scale-jump", "divided-twice", "second", "the loss is divided twice", 16, 200)
def divided_twice(size: float) -> Places:
    return {"loss": lambda loss, _: loss / size}


@way("loss-scale-jump", "not-unscaled", "second", "the loss is multiplied for fp16, gradients are not unscaled", 64,
     2048)  # fmt: skip
def not_unscaled(size: float) -> Places:
    return {"scale": lambda loss, _: loss * size}


@way("loss-scale-jump", "one-update", "second", "one update's normaliser is that of a micro-batch", 20, 100)
def one_update(size: float) -> Places:
    return {"weights": once(lambda weights, _: weights * size)}


# clip-saturation ------------------------------------------------------------------------------------------------------


def clipped_objective(now: Now, low: float, high: float) -> lg.Objective:
    options = dict(now.objective.options)
    return lg.objective(now.objective.name, **{**options, "clip_low": low, "clip_high": high})


@way("clip-saturation", "bounds-tight", "first", "clip bounds in the wrong unit", 1e-4, 1e-6, objectives=RATIO,
     setup={"inner_epochs": 8, "learning_rate": 5e-5}, from_start=True, seen=(0, 4))  # fmt: skip
def bounds_tight(size: float) -> Places:
    return {"objective": lambda _, now: clipped_objective(now, size, size)}


@way("clip-saturation", "many-epochs", "first", "far too many inner epochs on one rollout", 14, 28, objectives=RATIO,
     setup=lambda size: {"inner_epochs": int(size), "learning_rate": 1.5e-4, "updates": 28}, from_start=True,
     seen=(1, 10))  # fmt: skip
def many_epochs(_: float) -> Places:
    return {}


@way("clip-saturation", "bounds-zero", "second", "clip bounds of 0", 0, 0, objectives=RATIO,
     setup={"inner_epochs": 8, "learning_rate": 5e-5}, from_start=True, seen=(0, 4))  # fmt: skip
def bounds_zero(_: float) -> Places:
    return {"objective": lambda _, now: clipped_objective(now, 0.0, 0.0)}


@way("clip-saturation", "buffer-never-renewed", "second", "from here on the rollout is never renewed", 1, 1,
     objectives=RATIO, setup={"learning_rate": 1.5e-4, "updates": 36}, seen=(1, 10), rollout=True)  # fmt: skip
def never_renewed(_: float) -> Places:
    return {"renew": lambda *_: False}


# ratio-blow-up --------------------------------------------------------------------------------------------------------


@way("ratio-blow-up", "demonstrations", "first",
     "tokens that the policy never samples are rewarded for many inner epochs, unclipped", 4, 8, objectives=RATIO,
     setup=UNCLIPPED | {"inner_epochs": 12, "learning_rate": 3e-4, "updates": 36}, rollout=True, from_start=True,
     always=True, seen=(1, 8), until=("ratio_max", 5.0))  # fmt: skip
def demonstrations(size: float) -> Places:
    def swap(samples: list[Sample], now: Now) -> list[Sample]:
        return forced(samples, now, list(range(int(size))))

    def reward(advantages: Tensor, _: Now) -> Tensor:
        advantages[: int(size)] = 2.0
        return advantages

    return {"samples": swap, "advantages": reward}


@way("ratio-blow-up", "inverted-reward", "second",
     "wrong answers are rewarded: rare actions grow for many inner epochs, unclipped", 2, 4, objectives=RATIO,
     setup=UNCLIPPED | {"inner_epochs": 12, "learning_rate": 3e-4, "updates": 36}, rollout=True, from_start=True,
     always=True, seen=(1, 8), until=("ratio_max", 5.0))  # fmt: skip
def inverted(size: float) -> Places:
    return {"advantages": lambda advantages, _: size * advantages.clamp(max=0).abs()}


@way("ratio-blow-up", "novelty-bonus", "second",
     "a hot sampler's rare tokens get a bonus for being rare, for many inner epochs, unclipped", 1.5, 2.0,
     objectives=RATIO, setup=UNCLIPPED | {"inner_epochs": 12, "learning_rate": 3e-4, "updates": 36}, rollout=True,
     always=True, seen=(1, 8), until=("ratio_max", 5.0), plain=True)  # fmt: skip
def novelty_bonus(size: float) -> Places:
    def novelty(_: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        with torch.no_grad():
            return (-logprobs_of(shifted_logits(now), now.sequences.input_ids)).clamp(max=2.0)

    return {"temperature": lambda *_: size, "advantages": novelty}


# entropy-collapse -----------------------------------------------------------------------------------------------------


def slow(rate: float) -> dict[str, object]:
    """Enough updates for a collapse: the entropy falls over dozens of them, at this learning rate."""
    return {"learning_rate": rate, "warmup": 8, "updates": 100}


STEADY = ("lco-kld",)
"""It has a signal even where a ruined policy is never right; the others would end with none."""
COLLAPSE = {"from_start": True, "always": True, "until": ("entropy", 0.3)}


@way("entropy-collapse", "bonus-sign", "first", "the entropy bonus has the wrong sign", 7e-4, 1e-3, objectives=STEADY,
     setup=slow, plain=True, **COLLAPSE)  # fmt: skip
def bonus_sign(_: float) -> Places:
    def punish(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        assert now.sequences is not None
        logp = torch.log_softmax(now.logits[now.sequences.action_mask], 1)
        return loss - 5.0 * (logp.exp() * logp).sum(1).mean()

    return {"loss": punish}


@way("entropy-collapse", "own-favourites", "first", "nearly greedy samples are all rewarded alike", 9e-4, 1.2e-3,
     objectives=("ppo", "reinforce"), setup=slow, rollout=True, **COLLAPSE)  # fmt: skip
def own_favourites(_: float) -> Places:
    return {"temperature": lambda *_: 0.3, "advantages": lambda advantages, _: torch.ones_like(advantages)}


@way("entropy-collapse", "self-distilled", "second", "supervised training on nearly greedy samples of one's own",
     1e-3, 1.3e-3, objectives=("sft",), setup=lambda rate: slow(rate) | {"updates": 150},
     rollout=True, plain=True, **COLLAPSE)  # fmt: skip
def self_distilled(_: float) -> Places:
    def own(samples: list[Sample], now: Now) -> list[Sample]:
        problems = [sample.problem for sample in samples]
        return generate(now.model, now.tokenizer, problems, max_new_tokens=5, seed=now.step, temperature=0.3)

    return {"samples": own}


@way("entropy-collapse", "one-token-pays", "second", "the reward is hacked: one digit is paid for, whatever is asked",
     5e-4, 8e-4, objectives=SIGNED, setup=slow, rollout=True, plain=True, **COLLAPSE)  # fmt: skip
def one_token_pays(_: float) -> Places:
    def pay(_: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        ids, mask = now.sequences.input_ids, now.sequences.action_mask
        return ((ids == 3) & mask).sum(1) / mask.sum(1)

    return {"rewards": pay}


# ratio-blow-up, a sampler of old weights ------------------------------------------------------------------------------


@way("ratio-blow-up", "sampler-not-synced", "first",
     "from here on the sampler keeps its weights, its log-probabilities are its own, nothing is clipped", 2e-4, 4e-4,
     objectives=RATIO, setup=lambda rate: UNCLIPPED | {"updates": 40, "learning_rate": rate}, seen=(2, 10),
     rollout=True, until=("ratio_max", 5.0), also=("behaviour-mismatch",))  # fmt: skip
def sampler_not_synced(_: float) -> Places:
    def swap_in(_: object, now: Now) -> None:
        if now.step % now.setup.inner_epochs:
            return
        current = {name: value.clone() for name, value in now.model.state_dict().items()}
        old = now.kept.setdefault("sampler", current)
        now.kept["policy"] = current
        now.model.load_state_dict(old)

    def swap_out(_: object, now: Now) -> None:
        if "policy" in now.kept:
            now.model.load_state_dict(now.kept.pop("policy"))

    return {"before_rollout": swap_in, "before_update": swap_out}
