"""Faults of the step: learning rate, optimiser state, weights, precision, gradients on their way to the optimiser."""

from __future__ import annotations

from typing import Any

import torch
from catalogue import once, way
from plain_loop import Alter, Now

Places = dict[str, Alter]


def parameters_of(now: Now, ends: str) -> list[torch.nn.Parameter]:
    return [p for name, p in now.model.named_parameters() if name.endswith(ends)]


def blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


# step-too-large -------------------------------------------------------------------------------------------------------


@way("step-too-large", "rate-spike", "first", "one update's learning rate is many times too large", 20, 100)
def rate_spike(size: float) -> Places:
    return {"rate": once(lambda rate, _: rate * size)}


@way("step-too-large", "rate-from-here", "first", "the learning rate jumps and stays", 10, 50)
def rate_from_here(size: float) -> Places:
    return {"rate": lambda rate, _: rate * size}


@way("step-too-large", "rate-from-the-start", "second", "the learning rate is too large from the start", 100, 400,
     from_start=True, setup={"warmup": 0})  # fmt: skip
def rate_from_the_start(size: float) -> Places:
    return {"rate": lambda rate, _: rate * size}


@way("step-too-large", "restart", "second", "a schedule's restart goes to another run's peak and decays from there",
     25, 100)  # fmt: skip
def restart(size: float) -> Places:
    return {"rate": lambda rate, now: rate * (1 + size * 0.5**now.since)}


@way("step-too-large", "sgd-unclipped", "second", "SGD without clipping, and a learning rate meant for Adam's units",
     300, 2000, setup={"optimizer": "sgd", "learning_rate": 3e-4, "clip_norm": None})  # fmt: skip
def sgd_unclipped(size: float) -> Places:
    return {"rate": lambda rate, _: rate * size}


# optimizer-lag --------------------------------------------------------------------------------------------------------


def moments(now: Now) -> list[dict[str, Any]]:
    return [state for state in now.optimizer.state.values() if "exp_avg_sq" in state]


@way("optimizer-lag", "second-moments-lost", "first", "Adam's second moments are nearly lost in a restart", 1e-3, 1e-6)
def second_moments_lost(size: float) -> Places:
    def lose(_: Any, now: Now) -> None:
        for state in moments(now):
            state["exp_avg_sq"].mul_(size)

    return {"before_step": once(lose)}


@way("optimizer-lag", "counter-ahead", "first",
     "the bias correction's counter is loaded from a long run, the moments are young", 500, 5000)  # fmt: skip
def counter_ahead(size: float) -> Places:
    def load(_: Any, now: Now) -> None:
        for state in moments(now):
            state["step"] += size

    return {"before_step": once(load)}


@way("optimizer-lag", "second-moments-stale", "second", "second moments loaded from a run with far larger gradients",
     100, 1000)  # fmt: skip
def second_moments_stale(size: float) -> Places:
    def load(_: Any, now: Now) -> None:
        for state in moments(now):
            state["exp_avg_sq"].mul_(size**2)

    return {"before_step": once(load)}


@way("optimizer-lag", "first-moments-foreign", "second", "first moments loaded from a run with far larger gradients",
     20, 100)  # fmt: skip
def first_moments_foreign(size: float) -> Places:
    def load(_: Any, now: Now) -> None:
        for state in moments(now):
            state["exp_avg"].mul_(size)

    return {"before_step": once(load)}


@way(
    "optimizer-lag",
    "counter-kept",
    "second",
    "second moments reset to zero, the bias correction's counter kept",
    1,
    1,
)
def counter_kept(_: float) -> Places:
    def load(_: Any, now: Now) -> None:
        for state in moments(now):
            state["exp_avg_sq"].zero_()
            state["step"] += 2000

    return {"before_step": once(load)}


# layer-amplification --------------------------------------------------------------------------------------------------


@way("layer-amplification", "gradient-scaled", "first", "one layer's gradient is multiplied (a wrong all-reduce)",
     100, 1000)  # fmt: skip
def gradient_scaled(size: float) -> Places:
    def scale(_: Any, now: Now) -> None:
        for parameter in blocks(now.model)[1].parameters():
            parameter.grad.mul_(size)

    return {"backward_done": scale}


@way("layer-amplification", "weights-scaled", "first", "one layer's weights are multiplied (an adapter merged twice)",
     3, 8)  # fmt: skip
def weights_scaled(size: float) -> Places:
    def scale(_: Any, now: Now) -> None:
        with torch.no_grad():
            for parameter in blocks(now.model)[0].parameters():
                if parameter.ndim == 2:
                    parameter.mul_(size)

    return {"before_rollout": once(scale)}


@way("layer-amplification", "backward-hook", "second", "a custom backward multiplies what passes one block", 50, 500)
def backward_hook(size: float) -> Places:
    def put(_: Any, now: Now) -> None:
        for parameter in blocks(now.model)[0].parameters():
            parameter.register_hook(lambda gradient: gradient * size)

    return {"before_rollout": once(put)}


@way("layer-amplification", "norm-scaled", "second", "one block's normalisation weights are multiplied", 6, 20)
def norm_scaled(size: float) -> Places:
    def scale(_: Any, now: Now) -> None:
        with torch.no_grad():
            for name, parameter in blocks(now.model)[1].named_parameters():
                if "norm" in name or "ln_" in name:
                    parameter.mul_(size)

    return {"before_rollout": once(scale)}


# non-finite -----------------------------------------------------------------------------------------------------------


@way("non-finite", "nan-weight", "first", "one weight becomes NaN", 1, 1)
def nan_weight(_: float) -> Places:
    def spoil(_: Any, now: Now) -> None:
        next(blocks(now.model)[1].parameters()).data.view(-1)[3] = float("nan")

    return {"before_update": once(spoil)}


@way("non-finite", "inf-weight", "second", "one weight of the head becomes infinite", 1, 1)
def inf_weight(_: float) -> Places:
    def spoil(_: Any, now: Now) -> None:
        now.model.get_output_embeddings().weight.data[4, 5] = float("inf")

    return {"before_update": once(spoil)}


@way("non-finite", "nan-gradient", "second", "one entry of one gradient becomes NaN on its way", 1, 1)
def nan_gradient(_: float) -> Places:
    def spoil(_: Any, now: Now) -> None:
        next(blocks(now.model)[0].parameters()).grad.view(-1)[0] = float("nan")

    return {"backward_done": once(spoil)}


@way("non-finite", "log-of-zero", "first", "an entropy term over tokens that are masked to minus infinity", 1, 1,
     plain=True)  # fmt: skip
def log_of_zero(_: float) -> Places:
    def add(loss: torch.Tensor, now: Now) -> torch.Tensor:
        assert now.logits is not None
        assert now.sequences is not None
        logits = now.logits[now.sequences.action_mask].clone()
        logits[:, :2] = -torch.inf
        logp = torch.log_softmax(logits, 1)
        return loss + 0.01 * (logp.exp() * logp).sum(1).mean()

    return {"loss": once(add)}


@way("non-finite", "overflow", "second", "one ratio overflows: an old log-probability of a dropped token is -1000",
     1, 1, objectives=("ppo", "grpo"), setup={"options": {"clip_low": None, "clip_high": None}}, rollout=True,
     also=("ratio-blow-up", "behaviour-mismatch"))  # fmt: skip
def overflow(_: float) -> Places:
    def drop(old: torch.Tensor, now: Now) -> torch.Tensor:
        assert now.sequences is not None
        mask = now.sequences.action_mask
        old[9, int(mask[9].int().argmax())] = -1000.0
        return old

    return {"old_logprobs": once(drop)}


# precision-loss -------------------------------------------------------------------------------------------------------


@way("precision-loss", "bf16-weights", "first", "weights are bf16 and the learning rate is tiny", 1e-6, 1e-8,
     from_start=True, always=True, setup={"dtype": "bfloat16"})  # fmt: skip
def bf16_weights(size: float) -> Places:
    return {"rate": lambda *_: size}


@way("precision-loss", "rounded-after-step", "first", "master weights are lost: weights are rounded after each step",
     1e-6, 1e-7, from_start=True)  # fmt: skip
def rounded(size: float) -> Places:
    def round_weights(_: Any, now: Now) -> None:
        with torch.no_grad():
            for parameter in now.model.parameters():
                parameter.copy_(parameter.bfloat16())

    return {"rate": lambda *_: size, "after_step": round_weights, "before_rollout": once(round_weights)}


@way("precision-loss", "synced-through-fp16", "second", "weights pass through fp16 after each step", 1e-7, 1e-9,
     from_start=True)  # fmt: skip
def through_fp16(size: float) -> Places:
    def pass_through(_: Any, now: Now) -> None:
        with torch.no_grad():
            for parameter in now.model.parameters():
                parameter.copy_(parameter.half())

    return {"rate": lambda *_: size, "after_step": pass_through, "before_rollout": once(pass_through)}


@way("precision-loss", "float32-vanishing", "second", "a schedule in the wrong unit: steps below float32's rounding",
     1e-10, 1e-12)  # fmt: skip
def vanishing(size: float) -> Places:
    return {"rate": lambda *_: size}


# logit-drift ----------------------------------------------------------------------------------------------------------


@way("logit-drift", "normaliser-pushed", "first", "a z-loss with the wrong sign: the normaliser is rewarded", 0.3, 2.0,
     seen=(0, 6), plain=True)  # fmt: skip
def normaliser_pushed(size: float) -> Places:
    def push(loss: torch.Tensor, now: Now) -> torch.Tensor:
        assert now.logits is not None
        assert now.sequences is not None
        return loss - size * now.logits[now.sequences.action_mask].logsumexp(1).mean()

    return {"loss": push}


@way("logit-drift", "head-drifts", "first", "every row of the head moves along one direction at each step", 0.01, 0.05,
     seen=(1, 6))  # fmt: skip
def head_drifts(size: float) -> Places:
    def move(_: Any, now: Now) -> None:
        head = now.model.get_output_embeddings().weight
        with torch.no_grad():
            direction = now.kept.setdefault("direction", mean_hidden(now))
            head.add_(size * direction)

    return {"after_step": move}


def mean_hidden(now: Now) -> torch.Tensor:
    assert now.sequences is not None
    sequences = now.sequences
    with torch.no_grad():
        hidden = now.model.base_model(
            input_ids=sequences.input_ids, attention_mask=sequences.attention_mask, use_cache=False
        ).last_hidden_state[sequences.attention_mask.bool()]
    mean = hidden.mean(0)
    return mean / mean.norm()


@way("logit-drift", "decay-of-the-wrong-sign", "second", "weight decay of the head has the wrong sign: it grows",
     0.02, 0.08, seen=(1, 6))  # fmt: skip
def head_grows(size: float) -> Places:
    def grow(_: Any, now: Now) -> None:
        with torch.no_grad():
            now.model.get_output_embeddings().weight.mul_(1 + size)

    return {"after_step": grow}


@way("logit-drift", "final-norm-grows", "second", "the final normalisation's weight grows at each step", 0.03, 0.1,
     seen=(1, 6))  # fmt: skip
def final_norm_grows(size: float) -> Places:
    def grow(_: Any, now: Now) -> None:
        base = now.model.transformer.ln_f if hasattr(now.model, "transformer") else now.model.model.norm
        with torch.no_grad():
            base.weight.mul_(1 + size)

    return {"after_step": grow}
