"""The fifth series' faults of the step: learning rate, optimiser state, weights, precision, gradients on their way."""

from __future__ import annotations

from typing import Any

import torch
from catalogue import once, way
from faults_of_steps import blocks, moments
from plain_loop import Alter, Now
from torch import Tensor

Places = dict[str, Alter]


# step-too-large -------------------------------------------------------------------------------------------------------


@way("step-too-large", "plateau-factor-above-one", "fifth",
     "the rate is to fall on a plateau, its factor is the inverse of the one meant, and all is a plateau", 25,
     60)  # fmt: skip
def plateau(size: float) -> Places:
    return {"rate": lambda rate, now: rate * min(size ** (1 + now.since // 5), 1000.0)}


@way("step-too-large", "peak-in-another-unit", "fifth",
     "the rate's peak is given in another unit, and a warmup leads up to it", 150, 600, setup={"warmup": 6},
     from_start=True, always=True, seen=(0, 2))  # fmt: skip
def peak(size: float) -> Places:
    return {"rate": lambda rate, _: rate * size}


# optimizer-lag --------------------------------------------------------------------------------------------------------


@way("optimizer-lag", "squares-on-a-linear-grid", "fifth",
     "second moments were kept as integers with one scale a matrix, and the small ones have become 0", 4095,
     255)  # fmt: skip
def linear_grid(size: float) -> Places:
    def load(_: Any, now: Now) -> None:
        for state in moments(now):
            grid = state["exp_avg_sq"].max().clamp(min=1e-30) / size
            state["exp_avg_sq"].copy_((state["exp_avg_sq"] / grid).round() * grid)

    return {"before_step": once(load)}


@way("optimizer-lag", "largest-square-ever", "fifth",
     "AMSGrad is switched on in a restart, and its largest squares are those of a run with far larger gradients", 30,
     1000)  # fmt: skip
def largest_ever(size: float) -> Places:
    def load(_: Any, now: Now) -> None:
        for group in now.optimizer.param_groups:
            group["amsgrad"] = True
        for state in moments(now):
            state["max_exp_avg_sq"] = state["exp_avg_sq"] * size**2

    return {"before_step": once(load)}


@way("optimizer-lag", "squares-before-unscaling", "fifth",
     "second moments are fed gradients that are still multiplied for fp16", 64, 1024)  # fmt: skip
def before_unscaling(size: float) -> Places:
    def feed(_: Any, now: Now) -> None:
        for parameter in now.model.parameters():
            state = now.optimizer.state.get(parameter, {})
            if parameter.grad is not None and "exp_avg_sq" in state:
                state["exp_avg_sq"].add_((size * parameter.grad).square(), alpha=1e-3)

    return {"before_step": feed}


# layer-amplification --------------------------------------------------------------------------------------------------


@way("layer-amplification", "adapter-added-unscaled", "fifth",
     "a low-rank adapter is added to one block's matrices without its scale", 5, 12)  # fmt: skip
def adapter(size: float) -> Places:
    def add(_: Any, now: Now) -> None:
        with torch.no_grad():
            for parameter in blocks(now.model)[1].parameters():
                if parameter.ndim == 2:
                    left = torch.randn(parameter.shape[0], 4, generator=now.draw)
                    right = torch.randn(4, parameter.shape[1], generator=now.draw)
                    product = left @ right
                    parameter.add_(product * (size * parameter.norm() / product.norm()))

    return {"before_rollout": once(add)}


@way("layer-amplification", "embedding-multiplied-twice", "fifth",
     "the embedding is written back with its multiplier in it", 4, 8)  # fmt: skip
def multiplied_twice(size: float) -> Places:
    def multiply(_: Any, now: Now) -> None:
        with torch.no_grad():
            now.model.get_input_embeddings().weight.mul_(size)

    return {"before_rollout": once(multiply)}


@way("layer-amplification", "bucket-not-cleared", "fifth",
     "one block's bucket of an all-reduce is added to itself at each update, and never cleared", 8, 30,
     seen=(1, 2))  # fmt: skip
def not_cleared(size: float) -> Places:
    def added(number: int, now: Now) -> Any:
        def add(gradient: Tensor) -> Tensor:
            before = now.kept.get(number)
            if before is not None:
                gradient = gradient + (size if now.since < 6 else 1.0) * before
            now.kept[number] = gradient
            return gradient

        return add

    def put(_: Any, now: Now) -> None:
        for number, parameter in enumerate(blocks(now.model)[0].parameters()):
            parameter.register_hook(added(number, now))

    return {"before_update": once(put)}


# non-finite -----------------------------------------------------------------------------------------------------------


@way("non-finite", "nothing-allowed", "fifth", "a grammar allows no token at one place: all its logits are masked", 1,
     1, plain=True)  # fmt: skip
def nothing_allowed(_: float) -> Places:
    def mask(logits: Tensor, now: Now) -> Tensor:
        assert now.sequences is not None
        closed = torch.zeros(logits.shape[:2], dtype=torch.bool)
        closed[0, int(now.sequences.action_mask[0].int().argmax())] = True
        return logits.masked_fill(closed[:, :, None], -torch.inf)

    return {"logits": once(mask)}


@way("non-finite", "mask-times-infinity", "fifth", "a mask of the vocabulary is multiplied by minus infinity: 0 * inf",
     1, 1, plain=True)  # fmt: skip
def times_infinity(_: float) -> Places:
    def mask(logits: Tensor, _: Now) -> Tensor:
        banned = torch.zeros(logits.shape[-1])
        banned[:2] = 1.0
        return logits + banned * -torch.inf

    return {"logits": once(mask)}


# precision-loss -------------------------------------------------------------------------------------------------------


@way("precision-loss", "differences-as-integers", "fifth",
     "what has changed since the start is kept as integers, with a unit meant for larger changes", 1e-3, 1e-2,
     from_start=True, seen=(0, 1))  # fmt: skip
def as_integers(size: float) -> Places:
    def keep(_: Any, now: Now) -> None:
        with torch.no_grad():
            for name, parameter in now.model.named_parameters():
                start = now.start[name]
                parameter.copy_(start + ((parameter - start) / size).round() * size)

    return {"before_rollout": once(keep), "after_step": keep}


@way("precision-loss", "sent-as-text", "fifth",
     "weights go to the next process as text with so many decimals after each step", 3, 2, from_start=True,
     seen=(0, 1))  # fmt: skip
def as_text(size: float) -> Places:
    def write(_: Any, now: Now) -> None:
        with torch.no_grad():
            for parameter in now.model.parameters():
                parameter.copy_(parameter.round(decimals=int(size)))

    return {"before_rollout": once(write), "after_step": write}


# logit-drift ----------------------------------------------------------------------------------------------------------

FAST: dict[str, object] = {"learning_rate": 3e-4, "updates": 52}
SPREAD = ("grpo", "ppo", "reinforce", "sft")


@way("logit-drift", "distilled-on-logits", "fifth",
     "a teacher's raw logits are regressed on, and the teacher has another offset", 0.03, 0.15, objectives=SPREAD,
     seen=(0, 24), setup=FAST, plain=True)  # fmt: skip
def on_logits(size: float) -> Places:
    def regress(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        assert now.sequences is not None
        logits = now.logits[now.sequences.action_mask].double()
        return loss + size * (logits - logits.detach() - 20.0).square().mean()

    return {"loss": regress}


@way("logit-drift", "normaliser-of-another-vocabulary", "fifth",
     "the loss takes its normaliser for known, and pulls it to the value of another model", 0.01, 0.03,
     objectives=SPREAD, seen=(0, 24), setup=FAST, plain=True)  # fmt: skip
def another_vocabulary(size: float) -> Places:
    def pull(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        assert now.sequences is not None
        return loss + size * (now.logits[now.sequences.action_mask].double().logsumexp(1) - 25.0).square().mean()

    return {"loss": pull}


@way("logit-drift", "average-added-to-the-head", "fifth",
     "a share of the head's averaged weights is added at each step, and the head is not reduced by as much", 0.04, 0.1,
     seen=(1, 6))  # fmt: skip
def average_added(size: float) -> Places:
    def add(_: Any, now: Now) -> None:
        head = now.model.get_output_embeddings().weight
        with torch.no_grad():
            average = now.kept.setdefault("average", head.detach().clone())
            average.lerp_(head, 0.1)
            head.add_(average, alpha=size)

    return {"after_step": add}
