"""The third series' faults of the step: learning rate, optimiser state, weights, precision, gradients on their way."""

from __future__ import annotations

import math
from typing import Any

import torch
from catalogue import once, way
from faults_of_losses import row_that_counts
from faults_of_steps import blocks, moments
from plain_loop import SAMPLES, Alter, Now
from torch import Tensor

Places = dict[str, Alter]


def final_norm(model: Any) -> torch.nn.Module:
    norm: torch.nn.Module = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    return norm


# step-too-large -------------------------------------------------------------------------------------------------------


@way("step-too-large", "warmup-upside-down", "third",
     "the warmup falls from a peak to the rate instead of rising to it",
     100, 400, setup={"warmup": 0}, from_start=True, always=True)  # fmt: skip
def upside_down(size: float) -> Places:
    return {"rate": lambda rate, now: rate * size ** max(0.0, 1 - now.since / 8)}


@way("step-too-large", "adaptive-rate", "third",
     "the rate adapts to the KL, which it always reads as 0: it is raised at each update",
     2, 4, seen=(1, 5))  # fmt: skip
def adaptive(size: float) -> Places:
    return {"rate": lambda rate, now: rate * min(size ** (now.since + 1), 1000.0)}


@way("step-too-large", "times-tokens", "third",
     "the rate is meant for a sum over tokens, and is scaled by their number",
     0.2, 1)  # fmt: skip
def times_tokens(size: float) -> Places:
    def scaled(rate: float, now: Now) -> float:
        assert now.sequences is not None
        return rate * size * int(now.sequences.action_mask.sum())

    return {"rate": scaled}


# optimizer-lag --------------------------------------------------------------------------------------------------------


@way("optimizer-lag", "moments-of-others", "third",
     "the optimiser's state is loaded in another order of the parameters", 0.3, 0.7)  # fmt: skip
def of_others(size: float) -> Places:
    """All second moments as one row of numbers, rolled by a share of its length."""

    def load(_: Any, now: Now) -> None:
        states = moments(now)
        flat = torch.cat([state["exp_avg_sq"].flatten() for state in states])
        flat = flat.roll(int(size * len(flat)))
        for state in states:
            count = state["exp_avg_sq"].numel()
            state["exp_avg_sq"].copy_(flat[:count].view_as(state["exp_avg_sq"]))
            flat = flat[count:]

    return {"before_step": once(load)}


@way("optimizer-lag", "no-memory-of-squares", "third",
     "Adam's second beta is read from a field that is empty: the squares are forgotten at each step",
     0.1, 0.0)  # fmt: skip
def no_memory(size: float) -> Places:
    def forget(_: Any, now: Now) -> None:
        for group in now.optimizer.param_groups:
            group["betas"] = (group["betas"][0], size)

    return {"before_step": once(forget)}


@way("optimizer-lag", "epsilon", "third", "Adam's epsilon is given in another unit, and outweighs the second moments",
     0.1, 1)  # fmt: skip
def epsilon(size: float) -> Places:
    def outweigh(_: Any, now: Now) -> None:
        for group in now.optimizer.param_groups:
            group["eps"] = size

    return {"before_step": outweigh}


# layer-amplification --------------------------------------------------------------------------------------------------


@way("layer-amplification", "embedding-summed", "third",
     "the embedding's gradient is summed over the ranks instead of averaged", 100, 1000)  # fmt: skip
def embedding_summed(size: float) -> Places:
    def add_up(_: Any, now: Now) -> None:
        now.model.get_input_embeddings().weight.grad.mul_(size)

    return {"backward_done": add_up}


@way("layer-amplification", "final-norm-summed", "third",
     "the final normalisation's gradient is added up over the shards of a sequence", 300, 3000)  # fmt: skip
def norm_summed(size: float) -> Places:
    def add_up(_: Any, now: Now) -> None:
        for parameter in final_norm(now.model).parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(size)

    return {"backward_done": add_up}


@way("layer-amplification", "block-made-anew", "third",
     "a block's name is missing in the file that is loaded, and it is made anew, far too large", 5, 10)  # fmt: skip
def made_anew(size: float) -> Places:
    def make(_: Any, now: Now) -> None:
        with torch.no_grad():
            for parameter in blocks(now.model)[-1].parameters():
                if parameter.ndim == 2:
                    spread = size * parameter.square().mean().sqrt()
                    parameter.copy_(torch.randn(parameter.shape, generator=now.draw) * spread)

    return {"before_rollout": once(make)}


# non-finite -----------------------------------------------------------------------------------------------------------


@way("non-finite", "zero-over-zero", "third", "a prompt's completions are weighed by a share of nothing: 0 / 0", 1, 1,
     plain=True)  # fmt: skip
def zero_over_zero(_: float) -> Places:
    def divide(weights: Tensor, now: Now) -> Tensor:
        group = int(torch.randint(len(weights) // SAMPLES, (), generator=now.draw)) * SAMPLES
        weights = weights.clone()
        weights[group : group + SAMPLES] *= torch.tensor(0.0) / torch.tensor(0.0)
        return weights

    return {"weights": once(divide)}


@way("non-finite", "mean-of-nothing", "third", "an auxiliary loss is the mean over an empty selection of tokens", 1, 1)
def mean_of_nothing(_: float) -> Places:
    return {"loss": once(lambda loss, _: loss + 0.01 * torch.empty(0).mean())}


@way("non-finite", "root-of-zero", "third", "a penalty is the root of a square that is 0: a finite loss, no gradient",
     1, 1, plain=True)  # fmt: skip
def root_of_zero(_: float) -> Places:
    def add(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        apart = now.logits - now.logits.detach()
        return loss + apart.square().sum().sqrt()

    return {"loss": once(add)}


@way("non-finite", "no-epsilon", "third", "Adam's epsilon is 0, and so are moments of tokens that never come", 1, 1)
def no_epsilon(_: float) -> Places:
    def take_away(_: Any, now: Now) -> None:
        for group in now.optimizer.param_groups:
            group["eps"] = 0.0

    return {"before_step": take_away}


# precision-loss -------------------------------------------------------------------------------------------------------


@way("precision-loss", "requantised", "third",
     "weights are put back on an integer grid of so many bits after each step",
     10, 8, from_start=True, seen=(0, 1))  # fmt: skip
def requantised(size: float) -> Places:
    """At an ordinary learning rate."""

    def quantise(_: Any, now: Now) -> None:
        with torch.no_grad():
            for parameter in now.model.parameters():
                grid = parameter.abs().max() / (2 ** (size - 1) - 1)
                parameter.copy_((parameter / grid).round() * grid)

    return {"before_rollout": once(quantise), "after_step": quantise}


@way("precision-loss", "engine-shares-weights", "third",
     "a sampling engine that holds the same memory rounds the weights to bf16 before each rollout, at a small rate",
     2e-6, 2e-7, from_start=True, rollout=True, setup=lambda rate: {"learning_rate": rate}, seen=(0, 2),
     plain=True)  # fmt: skip
def engine_shares(_: float) -> Places:
    def round_weights(_: Any, now: Now) -> None:
        if now.step % now.setup.inner_epochs == 0:
            with torch.no_grad():
                for parameter in now.model.parameters():
                    parameter.copy_(parameter.bfloat16())

    return {"before_rollout": round_weights}


# logit-drift ----------------------------------------------------------------------------------------------------------


@way("logit-drift", "value-read-off-logits", "third",
     "a critic shares the head: it is the mean of the logits, and its targets are large", 0.03, 0.3, seen=(0, 24),
     setup={"learning_rate": 2e-4, "updates": 52}, plain=True)  # fmt: skip
def value_off_logits(size: float) -> Places:
    def regress(loss: Tensor, now: Now) -> Tensor:
        assert now.logits is not None
        assert now.sequences is not None
        return loss + size * (now.logits[now.sequences.action_mask].mean(1) - 100).square().mean()

    return {"loss": regress}


@way("logit-drift", "multiplier-compounds", "third",
     "the multiplier of the last hidden states is applied once more at each update",
     0.03, 0.1, seen=(1, 6))  # fmt: skip
def compounds(size: float) -> Places:
    def put(_: Any, now: Now) -> None:
        def multiply(_: Any, __: Any, hidden: Tensor) -> Tensor:
            return hidden * math.exp(now.since * math.log1p(size))

        final_norm(now.model).register_forward_hook(multiply)

    return {"before_update": once(put)}


# dominant-sequence, made last: a way in front of others would give them other models and seeds ------------------------


@way("dominant-sequence", "importance-not-truncated", "third",
     "completions are weighed by the ratio of two engines' probabilities, which nothing bounds from above",
     1.6, 3)  # fmt: skip
def not_truncated(size: float) -> Places:
    """Logarithms of the ratios are normal, `size` wide; the largest one falls on a completion that has a gradient."""

    def weigh(weights: Tensor, now: Now) -> Tensor:
        ratios = (size * torch.randn(len(weights), generator=now.draw)).exp().double()
        row, largest = row_that_counts(now), int(ratios.argmax())
        ratios[[row, largest]] = ratios[[largest, row]]
        return weights * ratios[:, None]

    return {"weights": weigh}
