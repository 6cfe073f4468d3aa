"""What the trainers of TRL 1.16 say of a batch, and which objective they minimise.

All that the recorder reads of TRL's internals stands in this file. TRL itself is not imported, but with LCOTrainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from lcogeom.integrations.methods import ReplacedMethods
from lcogeom.objectives import ActionObjective, Objective, TokenBatch, objective
from lcogeom.recording import TapError

VERSION = "1.16"
Said = dict[str, Any]
"""Arguments of Probe.batch."""


@dataclass(frozen=True)
class Reading:
    """How one of TRL's trainers is read."""

    names: tuple[str, ...]
    """Attributes and methods that must be there."""
    objective: Callable[[Any], Objective | str]
    """(trainer) -> what it minimises, or why no objective here is that."""
    listen: Callable[[Any, ReplacedMethods], Callable[[Mapping[str, Any]], Said | None]]
    """(trainer, where to replace its methods) -> a function of compute_loss's inputs, called after it."""
    divided_by: Callable[[Any], float] = lambda _: 1.0
    """(trainer) -> what its loss, when compute_loss returns it, is divided by for gradient accumulation."""


def reading_of(trainer: object) -> Reading | None:
    """How to read this trainer; None for one that is not TRL's, or of which nothing special is known.

    Raises:
        TapError: it is one of those known, but of another version of TRL, or it lacks what is read.
    """
    modules = ("trl.trainer.", "lcogeom.integrations.trl_lco")
    kinds = [kind for kind in type(trainer).__mro__ if kind.__module__.startswith(modules)]
    known = next((kind for kind in kinds if kind.__name__ in READINGS), None)
    if known is None:
        return None
    reading = READINGS[known.__name__]
    found = version("trl")
    missing = [name for name in reading.names if not hasattr(trainer, name)]
    if not found.startswith(VERSION + ".") or missing:
        lacks = f" and this one lacks {', '.join(missing)}" if missing else ""
        raise TapError(
            f"trainer: {known.__name__} of TRL {found}, but what is read of it is that of TRL {VERSION}{lacks}. "
            f"Install 'trl=={VERSION}.*', or call lcogeom.attach(trainer.model, ...) from a callback of your own."
        )
    return reading


def labelled(inputs: Mapping[str, Any]) -> Said | None:
    """Completion tokens are those with a label; None where the inputs have no labels."""
    labels, ids = inputs.get("labels"), inputs.get("input_ids")
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.shape != ids.shape:
        return None
    mask = labels != -100
    mask[:, 0] = False  # no logits predict it, and the loss leaves it out
    return {"input_ids": ids, "action_mask": mask}


def _listen_sft(_: Any, __: ReplacedMethods) -> Callable[[Mapping[str, Any]], Said | None]:
    return labelled


def _listen_dpo(_: Any, __: ReplacedMethods) -> Callable[[Mapping[str, Any]], Said | None]:
    return lambda inputs: {"input_ids": inputs["input_ids"], "action_mask": inputs["completion_mask"]}


def _listen_rloo(_: Any, __: ReplacedMethods) -> Callable[[Mapping[str, Any]], Said | None]:
    return lambda inputs: completions(inputs, inputs["completion_mask"], {"advantages": inputs["advantages"]})


def _listen_grpo(trainer: Any, methods: ReplacedMethods) -> Callable[[Mapping[str, Any]], Said | None]:
    latest: list[Tensor] = []

    def keep_latest(original: Callable[..., Any]) -> Callable[..., Any]:
        def scored(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            if found[0].requires_grad:
                latest[:] = [found[0].detach()]
            return found

        return scored

    methods.replace("_get_per_token_logps_and_entropies", keep_latest)

    def said(inputs: Mapping[str, Any]) -> Said:
        current = latest.pop()
        old = inputs.get("old_per_token_logps")
        mask = inputs["completion_mask"]
        values = {"advantages": inputs["advantages"], "old_logprobs": current if old is None else old}
        if trainer.beta != 0.0:
            values["ref_logprobs"] = inputs["ref_per_token_logps"]
        return completions(inputs, mask if "tool_mask" not in inputs else mask * inputs["tool_mask"], values)

    return said


def completions(inputs: Mapping[str, Any], mask: Tensor, values: Mapping[str, Tensor]) -> Said:
    """Prompt and completion joined; mask and values, of the completion or of each sequence, at the tokens' places."""
    prompt = inputs["prompt_ids"]
    nothing = mask.new_zeros(prompt.shape)
    found = {
        "input_ids": torch.cat([prompt, inputs["completion_ids"]], 1),
        "action_mask": torch.cat([nothing, mask], 1),
    }
    for name, value in values.items():
        value = (value[:, None] if value.ndim == 1 else value).expand(mask.shape)  # noqa: PLW2901
        found[name] = torch.cat([nothing.to(value.dtype), value], 1)
    return found


def _listen_lco(trainer: Any, _: ReplacedMethods) -> Callable[[Mapping[str, Any]], Said | None]:
    return lambda _: trainer.said()


def _sft_objective(trainer: Any) -> Objective | str:
    if trainer.args.loss_type != "nll":
        return f"loss_type={trainer.args.loss_type!r}"
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        return "label smoothing or a loss function of your own"
    return objective("sft")


def _dpo_objective(_: Any) -> Objective | str:
    return "DPO's loss couples the tokens of a pair"


def _rloo_objective(_: Any) -> Objective | str:
    return "the ratio that TRL's RLOO clips is that of the whole completion, which couples its tokens"


def _grpo_objective(trainer: Any) -> Objective | str:
    loss_type, args, beta = trainer.loss_type, trainer.args, float(trainer.beta)
    reweighted = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    for reason, present in (
        (f"importance_sampling_level={trainer.importance_sampling_level!r} couples the tokens of a completion",
         trainer.importance_sampling_level != "token"),
        ("the entropy bonus is no function of log pi(a)", trainer._entropy_bonus_enabled),
        ("top_entropy_quantile leaves tokens out", trainer.top_entropy_quantile < 1.0),
        ("off_policy_mask_threshold leaves sequences out", trainer.off_policy_mask_threshold is not None),
        ("vLLM's importance weights multiply the surrogate but not the penalty", bool(beta) and reweighted),
    ):  # fmt: skip
        if present:
            return reason
    low, high = trainer.epsilon_low, trainer.epsilon_high
    if loss_type == "cispo":
        if high < 1:  # TRL clips at epsilon_high itself, the paper at 1 + epsilon_high
            return f"loss_type='cispo' with epsilon_high={high} below 1"
        found = objective("cispo", clip_high=high - 1)
    elif loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo"):
        return f"loss_type={loss_type!r}"
    elif args.delta is not None:
        if args.delta <= 1 + high:
            return f"delta={args.delta} does not lie above 1 + epsilon_high"
        found = objective("ppo", clip_low=low, clip_high=high, dual_clip=args.delta)
    else:
        name = {"bnpo": "grpo", "dr_grpo": "dr-grpo"}.get(loss_type, loss_type)
        found = objective(name, clip_low=low, clip_high=high, **({"beta": 0.0} if name == "grpo" else {}))
    if not beta:
        return found
    return found + beta * (weighted_k3() if args.use_bias_correction_kl else objective("k3"))


def _lco_objective(trainer: Any) -> Objective | str:
    if trainer.beta and trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        return "vLLM's importance weights multiply the objective but not the penalty"
    found: Objective = trainer.objective
    return found


def _grpo_divisor(trainer: Any) -> float:
    if trainer.loss_type in ("cispo", "dapo", "vespo"):  # divided by the tokens of the whole update
        return 1.0
    return float(trainer.current_gradient_accumulation_steps)


def weighted_k3() -> Objective:
    """The k3 penalty times the ratio, which is differentiated too: TRL's use_bias_correction_kl."""
    k3 = objective("k3")
    assert isinstance(k3, ActionObjective)

    def loss(logp: Tensor, batch: TokenBatch) -> Tensor:
        assert batch.old_logprobs is not None
        return (logp - batch.old_logprobs.to(logp)).exp() * k3.function(logp, batch)

    return ActionObjective("r k3", loss, ("old_logprobs", *k3.needs))


READINGS = {
    "SFTTrainer": Reading(("args", "label_smoother", "compute_loss_func"), _sft_objective, _listen_sft),
    "DPOTrainer": Reading(("_compute_loss",), _dpo_objective, _listen_dpo),
    "RLOOTrainer": Reading(("_compute_loss", "temperature"), _rloo_objective, _listen_rloo),
    "GRPOTrainer": Reading(
        (
            "_compute_loss",
            "_get_per_token_logps_and_entropies",
            "_entropy_bonus_enabled",
            "temperature",
            "loss_type",
            "beta",
            "epsilon_low",
            "epsilon_high",
            "importance_sampling_level",
            "top_entropy_quantile",
            "off_policy_mask_threshold",
            "use_vllm",
            "vllm_importance_sampling_correction",
        ),
        _grpo_objective,
        _listen_grpo,
        _grpo_divisor,
    ),
    "LCOTrainer": Reading(("_compute_loss", "temperature", "loss_type"), _lco_objective, _listen_lco, _grpo_divisor),
}


def __getattr__(name: str) -> Any:
    """LCOTrainer, which imports TRL when it is asked for."""
    if name != "LCOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lcogeom.integrations.trl_lco import LCOTrainer

    return LCOTrainer
