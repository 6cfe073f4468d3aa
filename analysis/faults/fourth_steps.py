"""The fourth series' faults of the step: learning rate, optimiser state, weights, precision, gradients on their way."""

from __future__ import annotations

from typing import Any

import torch
from catalogue import once, way
from faults_of_steps import blocks, moments
from plain_loop import Alter, Now
from torch import Tensor

Places = dict[str, Alter]


# step-too-large -------------------------------------------------------------------------------------------------------


@way("step-too-large", "cyclical-peak", "fourth", "a cyclical schedule rises to a peak that is meant as a multiple", 60,
     200, seen=(0, 3))  # fmt: skip
def cyclical(size: float) -> Places:
    return {"rate": lambda rate, now: rate * (1 + size * (1 - abs(now.since % 8 - 3) / 4))}


@way("step-too-large", "past-its-end", "fourth",
     "a polynomial schedule is read past its end, where its power makes it grow again", 4, 12, seen=(1, 5))  # fmt: skip
def past_its_end(size: float) -> Places:
    return {"rate": lambda rate, now: rate * max(1.0, min((size * now.since) ** 2, 1000.0))}


# optimizer-lag --------------------------------------------------------------------------------------------------------


@way("optimizer-lag", "first-beta-of-another-run", "fourth",
     "Adam's first beta is another's after a restart, and the bias correction takes it for the one so far", 0.99,
     0.999)  # fmt: skip
def first_beta(size: float) -> Places:
    def change(_: Any, now: Now) -> None:
        for group in now.optimizer.param_groups:
            group["betas"] = (size, group["betas"][1])

    return {"before_step": once(change)}


@way("optimizer-lag", "roots-for-squares", "fourth",
     "second moments are loaded from another library's file, which holds a power of them", 0.75, 0.5)  # fmt: skip
def roots(size: float) -> Places:
    def load(_: Any, now: Now) -> None:
        for state in moments(now):
            state["exp_avg_sq"].pow_(size)

    return {"before_step": once(load)}


@way("optimizer-lag", "momentum-summed", "fourth", "SGD's momentum is summed over the ranks as it is loaded", 20, 100,
     setup={"optimizer": "sgd", "momentum": 0.9, "learning_rate": 5e-4})  # fmt: skip
def momentum_summed(size: float) -> Places:
    def load(_: Any, now: Now) -> None:
        for state in now.optimizer.state.values():
            state["momentum_buffer"].mul_(size)

    return {"before_step": once(load)}


# layer-amplification --------------------------------------------------------------------------------------------------


@way("layer-amplification", "hooks-pile-up", "fourth",
     "a hook on one block's gradients is registered once more at each update, and each multiplies", 3, 20,
     seen=(0, 3))  # fmt: skip
def pile_up(size: float) -> Places:
    def put(_: Any, now: Now) -> None:
        if now.since < 6:
            for parameter in blocks(now.model)[1].parameters():
                parameter.register_hook(lambda gradient: gradient * size)

    return {"before_update": put}


@way("layer-amplification", "one-matrix-scaled", "fourth",
     "one matrix of the last block is kept in eight bits, and its gradient's scale is not undone", 300,
     3000)  # fmt: skip
def one_matrix(size: float) -> Places:
    def scale(_: Any, now: Now) -> None:
        [last] = [p for name, p in blocks(now.model)[-1].named_parameters() if p.ndim == 2][-1:]
        last.grad.mul_(size)

    return {"backward_done": scale}


@way("layer-amplification", "head-not-averaged", "fourth",
     "a hook multiplies the head's gradient by the ranks of a group that shares it", 100, 1000)  # fmt: skip
def head_not_averaged(size: float) -> Places:
    def put(_: Any, now: Now) -> None:
        now.model.get_output_embeddings().weight.register_hook(lambda gradient: gradient * size)

    return {"before_update": once(put)}


# non-finite -----------------------------------------------------------------------------------------------------------


@way("non-finite", "rate-of-no-updates", "fourth", "the schedule divides by its number of updates, which is 0", 1,
     1)  # fmt: skip
def no_updates(_: float) -> Places:
    return {"rate": once(lambda *_: float("nan"))}


@way("non-finite", "reduced-in-half", "fourth", "gradients are multiplied ahead of an all-reduce in half precision",
     1e8, 1e10, plain=True)  # fmt: skip
def in_half(size: float) -> Places:
    def reduce(_: Any, now: Now) -> None:
        for parameter in now.model.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_((parameter.grad * size).half().float() / size)

    return {"backward_done": once(reduce)}


# precision-loss -------------------------------------------------------------------------------------------------------


@way("precision-loss", "small-changes-dropped", "fourth",
     "after each step the changes that are small beside their weight are not sent to the copy that goes on", 0.1, 1,
     from_start=True, seen=(0, 1))  # fmt: skip
def changes_dropped(size: float) -> Places:
    def keep(_: Any, now: Now) -> None:
        now.kept["before"] = [p.detach().clone() for p in now.model.parameters()]

    def drop(_: Any, now: Now) -> None:
        with torch.no_grad():
            for parameter, before in zip(now.model.parameters(), now.kept["before"], strict=True):
                small = (parameter - before).abs() < size * before.abs()
                parameter.copy_(torch.where(small, before, parameter))

    return {"before_step": keep, "after_step": drop}


@way("precision-loss", "kept-in-eight-bits", "fourth",
     "weights are kept in an eight-bit floating-point format, with one scale a matrix, after each step", 3, 2,
     from_start=True, seen=(0, 1))  # fmt: skip
def in_eight_bits(size: float) -> Places:
    """Three bits of mantissa, or two, at an ordinary learning rate."""
    kind = torch.float8_e4m3fn if size == 3 else torch.float8_e5m2

    def keep(_: Any, now: Now) -> None:
        with torch.no_grad():
            for parameter in now.model.parameters():
                scale = parameter.abs().max() / 256
                parameter.copy_((parameter / scale).to(kind).float() * scale)

    return {"before_rollout": once(keep), "after_step": keep}


# logit-drift ----------------------------------------------------------------------------------------------------------

FAST: dict[str, object] = {"learning_rate": 3e-4, "updates": 52}


def at_actions(now: Now) -> tuple[Tensor, Tensor]:
    """(N, V) logits and (N,) actions of the completions."""
    assert now.logits is not None
    assert now.sequences is not None
    mask = now.sequences.action_mask
    return now.logits[mask].double(), now.sequences.input_ids[mask]


@way("logit-drift", "logits-for-log-probabilities", "fourth",
     "the loss gathers the answer's logit where its log-probability was meant: nothing normalises it", 0.1, 0.4,
     objectives=("sft",), seen=(0, 24), setup=FAST, plain=True)  # fmt: skip
def raw_logits(size: float) -> Places:
    def gather(loss: Tensor, now: Now) -> Tensor:
        logits, actions = at_actions(now)
        return (1 - size) * loss - size * logits.gather(1, actions[:, None]).mean()

    return {"loss": gather}


@way("logit-drift", "sigmoid-for-softmax", "fourth",
     "the cross-entropy is one of a sigmoid for each token of the vocabulary", 0.1, 0.25, objectives=("sft",),
     seen=(0, 24), setup=FAST, plain=True)  # fmt: skip
def sigmoid(size: float) -> Places:
    def add(loss: Tensor, now: Now) -> Tensor:
        logits, actions = at_actions(now)
        wanted = torch.nn.functional.one_hot(actions, logits.shape[1]).double()
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return loss + size * each.sum(1).mean()

    return {"loss": add}


# loss-scale-jump, of gradients ----------------------------------------------------------------------------------------


@way("loss-scale-jump", "summed-over-ranks", "fourth",
     "all gradients are summed over the ranks where their mean was meant", 20, 100)  # fmt: skip
def over_ranks(size: float) -> Places:
    def put(_: Any, now: Now) -> None:
        for parameter in now.model.parameters():
            parameter.register_hook(lambda gradient: gradient * size)

    return {"before_update": once(put)}
