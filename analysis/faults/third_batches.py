"""The third series' faults of the rollout: rewards, advantages, samples, behaviour policy."""

from __future__ import annotations

from dataclasses import replace

import torch
from catalogue import RATIO, RL, once, way
from faults_of_batches import one_sequence
from plain_loop import SAMPLES, Alter, Now, logprobs_of, shifted_logits
from torch import Tensor

from lcogeom.training.rollout import Sample
from lcogeom.training.tasks import score

Places = dict[str, Alter]
SIGNED = ("grpo", "ppo", "reinforce")
DIGITS = range(2, 12)
"""Their token ids in the bench's tokenizer."""


# advantage-outlier ----------------------------------------------------------------------------------------------------


@way("advantage-outlier", "reward-unbounded", "third",
     "a reward model's raw score of one completion comes through, the others' are 0 or 1", 60, 600,
     objectives=("reinforce",), rollout=True)  # fmt: skip
def reward_unbounded(size: float) -> Places:
    def spoil(rewards: Tensor, now: Now) -> Tensor:
        rewards = rewards.clone()
        rewards[int(torch.randint(len(rewards), (), generator=now.draw))] = -size
        return rewards

    return {"rewards": once(spoil)}


@way("advantage-outlier", "bootstrapped-past-the-end", "third",
     "the value after a completion's last token is read from padding, and goes back through its tokens", 40, 400,
     objectives=("ppo", "reinforce"), rollout=True, plain=True)  # fmt: skip
def past_the_end(size: float) -> Places:
    def bootstrap(advantages: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        row = one_sequence(now)
        places = now.sequences.action_mask[row].nonzero()[:, 0]
        ahead = (int(places[-1]) - places).double()  # tokens that are left
        advantages[row, places] += size * 0.95**ahead
        return advantages

    return {"advantages": once(bootstrap)}


@way("advantage-outlier", "divided-by-pass-rate", "third",
     "groups are weighed by one over their pass rate, and one prompt's counts as never passed", 30, 300,
     objectives=SIGNED, rollout=True)  # fmt: skip
def by_pass_rate(size: float) -> Places:
    def weigh(advantages: Tensor, now: Now) -> Tensor:
        group = int(advantages[:, 0].abs().argmax()) // SAMPLES * SAMPLES
        advantages[group : group + SAMPLES] *= size
        return advantages

    return {"advantages": weigh}


# no-signal ------------------------------------------------------------------------------------------------------------


@way("no-signal", "greedy-sampler", "third", "sampling is switched off: a group's completions are the same", 1, 1,
     objectives=("grpo",), rollout=True, from_start=True)  # fmt: skip
def greedy(_: float) -> Places:
    return {"temperature": lambda *_: 1e-3}


@way("no-signal", "cut-short", "third", "completions end after one token: no answer is ever whole", 1, 1,
     objectives=("grpo", "reinforce"), rollout=True, from_start=True)  # fmt: skip
def cut_short(_: float) -> Places:
    def cut(samples: list[Sample], now: Now) -> list[Sample]:
        short = []
        for sample in samples:
            ids = sample.completion_ids[:1]
            text = now.tokenizer.decode(ids, skip_special_tokens=True)
            short.append(replace(sample, completion_ids=ids, completion=text, reward=score(text, sample.problem)))
        return short

    return {"samples": cut}


@way("no-signal", "centred-in-rows", "third",
     "advantages are centred over the tokens of each completion, not over completions", 1, 1, objectives=RL,
     rollout=True, from_start=True)  # fmt: skip
def centred_in_rows(_: float) -> Places:
    return {"advantages": lambda advantages, _: advantages - advantages.mean(1, keepdim=True)}


# behaviour-mismatch ---------------------------------------------------------------------------------------------------


@way("behaviour-mismatch", "nucleus-renormalised", "third",
     "the sampler's log-probabilities are of the distribution after its nucleus filter", 0.9, 0.6, objectives=RATIO,
     rollout=True, from_start=True)  # fmt: skip
def nucleus(size: float) -> Places:
    """Tokens outside the nucleus keep their own."""

    def other(_: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        ids = now.sequences.input_ids
        with torch.no_grad():
            logits = shifted_logits(now)
        probs, order = logits.double().softmax(-1).sort(-1, descending=True)
        kept = probs.cumsum(-1) - probs < size
        mass = (probs * kept).sum(-1)  # (B, T)
        inside = kept.gather(2, (order == ids[:, :, None]).int().argmax(2, keepdim=True)).squeeze(2)
        old = logprobs_of(logits, ids)
        return torch.where(inside, old - mass.log(), old)

    return {"old_logprobs": other}


@way("behaviour-mismatch", "padding-attended", "third",
     "old log-probabilities are of a batch with padding on the left that the model attends to", 1, 4, objectives=RATIO,
     rollout=True, from_start=True)  # fmt: skip
def padding_attended(size: float) -> Places:
    def other(_: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        ids = now.sequences.input_ids
        padding = torch.full((len(ids), int(size)), now.tokenizer.pad_token_id)
        wide = torch.cat([padding, ids], 1)
        with torch.no_grad():
            logits = now.model(input_ids=wide, use_cache=False).logits[:, int(size) - 1 : -1]
        return logprobs_of(logits.float(), ids)

    return {"old_logprobs": other}


@way("behaviour-mismatch", "kept-in-eight-bits", "third",
     "old log-probabilities are kept in an eight-bit format with so many bits of mantissa", 3, 2, objectives=RATIO,
     rollout=True, from_start=True)  # fmt: skip
def eight_bits(size: float) -> Places:
    kind = torch.float8_e4m3fn if size == 3 else torch.float8_e5m2
    return {"old_logprobs": lambda old, _: old.float().clamp(min=-400).to(kind).to(old.dtype)}


# negative-rare-token --------------------------------------------------------------------------------------------------


@way("negative-rare-token", "rejected-of-a-data-set", "third",
     "a data set's rejected answers stand for one's own samples: the policy never gives them, and is punished for them",
     24, 48, objectives=("reinforce", "grpo"), rollout=True)  # fmt: skip
def rejected(size: float) -> Places:
    """Random digits, the last tokens of a group's rows: the first ones keep what right answers there are."""

    def swap(samples: list[Sample], now: Now) -> list[Sample]:
        changed = list(samples)
        each = max(1, int(size) // (len(samples) // SAMPLES))
        for place, sample in enumerate(samples):
            if place % SAMPLES < SAMPLES - each:
                continue
            draw = torch.randint(min(DIGITS), max(DIGITS) + 1, (3,), generator=now.draw).tolist()
            ids = (*draw, now.tokenizer.eos_token_id)
            text = now.tokenizer.decode(ids, skip_special_tokens=True)
            changed[place] = replace(sample, completion_ids=ids, completion=text, reward=score(text, sample.problem))
        return changed

    return {"samples": swap}


@way("negative-rare-token", "uniform-exploration", "third",
     "the sampler draws a share of the tokens uniformly from the vocabulary, and wrong answers are punished unclipped",
     0.2, 0.4, objectives=("reinforce",), rollout=True)  # fmt: skip
def uniform(size: float) -> Places:
    def explore(samples: list[Sample], now: Now) -> list[Sample]:
        changed = []
        for sample in samples:
            drawn = torch.randint(2, len(now.tokenizer), (len(sample.completion_ids),), generator=now.draw).tolist()
            swapped = (torch.rand(len(drawn), generator=now.draw) < size).tolist()
            pairs = zip(sample.completion_ids, drawn, swapped, strict=True)
            ids = tuple(other if swap else own for own, other, swap in pairs)
            text = now.tokenizer.decode(ids, skip_special_tokens=True)
            changed.append(replace(sample, completion_ids=ids, completion=text, reward=score(text, sample.problem)))
        return changed

    def punish(advantages: Tensor, now: Now) -> Tensor:
        assert now.rewards is not None
        return (2 * now.rewards.to(advantages) - 1)[:, None].expand_as(advantages)

    return {"samples": explore, "advantages": punish}


@way("negative-rare-token", "echoed-prompt", "third",
     "a tool's output in the completion is trained on as if the policy had written it, and the answer is wrong", 20, 48,
     objectives=("reinforce", "ppo"), rollout=True)  # fmt: skip
def echoed(size: float) -> Places:
    """The tool gives the prompt back, before the answer."""

    def insert(samples: list[Sample], now: Now) -> list[Sample]:
        changed = list(samples)
        for place in torch.randperm(len(samples), generator=now.draw)[: int(size)].tolist():
            sample = samples[place]
            ids = (*sample.prompt_ids[:3], *sample.completion_ids)
            text = now.tokenizer.decode(ids, skip_special_tokens=True)
            changed[place] = replace(sample, completion_ids=ids, completion=text, reward=score(text, sample.problem))
        return changed

    return {"samples": insert}
