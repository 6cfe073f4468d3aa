"""LCO inside TRL's GRPOTrainer: its rollouts, rewards, vLLM, PEFT and parallelism, with a loss of lcogeom's.

Written against TRL 1.16, whose internals it relies on; tests/integrations/test_trl_lco.py fails where they have moved.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal

import torch
import trl
from torch import Tensor

from lcogeom.integrations.trl import VERSION, completions, weighted_k3
from lcogeom.objectives import Objective, TokenBatch, objective
from lcogeom.recording.head import output_head
from lcogeom.recording.unwrap import require_plain_head, unwrap_model
from lcogeom.training.advantages import rule_reward
from lcogeom.training.chunked_loss import in_blocks
from lcogeom.training.old_policy import OldPolicy, eval_mode, keep_old_policy, require_image
from lcogeom.training.rollout import Sequences

OVERRIDDEN: Mapping[str, tuple[str, ...]] = {
    "_compute_loss": ("self", "model", "inputs"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
}
"""Methods of GRPOTrainer that are overridden, with their arguments."""
AVERAGES = ("grpo", "bnpo", "dr_grpo", "dapo")
"""Values of loss_type that say how a sum over tokens is averaged; the others are losses of their own."""
ROWS = "lcogeom_rows"  # among a micro-batch's inputs: its sequences' places in the rollout


def require_trl(found: str) -> None:
    """Raise ImportError unless this version of TRL is the one that LCOTrainer was written against."""
    if not found.startswith(VERSION + "."):
        raise ImportError(
            f"lcogeom.integrations.trl.LCOTrainer overrides internals of TRL {VERSION}; this is TRL {found}. "
            f"Install 'trl=={VERSION}.*', or train with `lcogeom train`."
        )


require_trl(version("trl"))


class LCOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer, minimising an objective of lcogeom instead of the clipped surrogate.

    The loss is `lg.objective(...)` on the logits of the completion tokens, divided by the sampling temperature. Old
    logits are the current ones where TRL updates once on a rollout; where it updates more often (num_iterations,
    steps_per_generation) they are made anew from the hidden states of the rollout policy (`keep_old_policy`).

    What the GRPOConfig means here:

    - loss_type says how tokens are averaged, as in TRL: "dapo" over all tokens (the authors' mean over tokens), "grpo"
      over each completion first, "bnpo" over each micro-batch, "dr_grpo" with max_completion_length. epsilon is unused.
    - beta is TRL's: the factor of the k3 penalty towards the reference model, with use_bias_correction_kl times the
      ratio. LCO's own beta is the objective's.
    - vLLM's importance weights multiply the loss, as in TRL.
    - What LCO has no place for raises ValueError: an entropy bonus, ratios of whole completions, masks by entropy or by
      distance from the sampling policy, delta, a mixture of experts' auxiliary loss, images.

    Like TRL's, the loss is computed inside the model's forward and block by block: [tokens, V] is not held, old logits
    included. Only a recorder beside it has the old logits of a micro-batch made whole. Objectives that couple tokens
    (`gspo`, `minpro`, pairs) raise ValueError at the first loss.

    Args:
        *args, **options: of GRPOTrainer.
        objective: a registry name or an objective; it may read actions, advantages, old and reference log-probabilities
            and old logits.
        advantages: "group" takes TRL's; "rule" +1 where the weighted sum of rewards is above 0.5, else -1, the authors'
            sparse setting (with `negative_beta_scale=100`) [systems.md 1.2, CODE].
        old_policy: "hidden", or "topk" for the authors' float16 top k, then on the first update as well.
        old_k: how many logits "topk" keeps.

    Raises:
        ImportError: on import, another minor version of TRL.
        RuntimeError: TRL's internals are not those of the version that it says it is.
        ValueError: settings that do not go together, named.
        TypeError (at the first rollout): DeepSpeed ZeRO-3 or FSDP1 with more than one update on a rollout.
    """

    _tag_names = ["trl", "lco"]  # noqa: RUF012 (TRL's)
    _name = "LCO"

    def __init__(
        self,
        *args: Any,
        objective: str | Objective = "lco-kld",
        advantages: Literal["group", "rule"] = "group",
        old_policy: Literal["hidden", "topk"] = "hidden",
        old_k: int = 5,
        **options: Any,
    ) -> None:
        require_internals(trl.GRPOTrainer)
        if advantages not in ("group", "rule"):
            raise ValueError(f"advantages: {advantages!r}; must be 'group' or 'rule'.")
        if old_policy not in ("hidden", "topk"):
            raise ValueError(f"old_policy: {old_policy!r}; must be 'hidden' or 'topk'.")
        super().__init__(*args, **options)
        self.minimised = _by_name(objective)
        self.advantage_kind, self.old_form, self.old_k = advantages, old_policy, old_k
        self._old: OldPolicy | None = None
        self._rewards: Tensor | None = None
        self._said: tuple[Any, ...] = ()
        for reason, present in self._unsupported():
            if present:
                raise ValueError(f"args: {reason}")
        add_blocks(unwrap_model(self.model))

    def _unsupported(self) -> list[tuple[str, bool]]:
        level = self.importance_sampling_level
        return [
            (f"loss_type={self.loss_type!r}; must be one of {', '.join(AVERAGES)}.", self.loss_type not in AVERAGES),
            (f"importance_sampling_level={level!r}; LCO has no ratios, leave it at 'token'.", level != "token"),
            (
                "entropy_coef, use_adaptive_entropy: add lcogeom's entropy to the objective.",
                self._entropy_bonus_enabled,
            ),
            (f"top_entropy_quantile={self.top_entropy_quantile}; must be 1.0.", self.top_entropy_quantile < 1.0),
            ("off_policy_mask_threshold: must be None.", self.off_policy_mask_threshold is not None),
            (f"delta={self.args.delta}: LCO has no clip; must be None.", self.args.delta is not None),
            ("output_router_logits: a mixture of experts' auxiliary loss is not added here.", self.aux_loss_enabled),
        ]

    @property
    def objective(self) -> Objective:
        """What is minimised, the reference penalty included."""
        return self.minimised + float(self.beta) * self._penalty() if self.beta else self.minimised

    def _penalty(self) -> Objective:
        return weighted_k3() if self.args.use_bias_correction_kl else objective("k3")

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = rewards  # (completions of all processes, functions)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout, with the advantages asked for and the old policy where it is needed later."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if "pixel_values" in output:
            raise ValueError("train_dataset: it holds images, which LCOTrainer does not take.")
        count = len(output["prompt_ids"])
        if self.advantage_kind == "rule":
            output["advantages"] = self._rule_advantages()[self.accelerator.process_index * count :][:count]
        if self.model.training and self._old_logits_needed():
            mask = _mask(output)
            with self.accelerator.autocast():
                self._old = keep_old_policy(
                    self.model,
                    Sequences(
                        torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
                        torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
                        torch.cat([torch.zeros_like(output["prompt_mask"]), mask], 1).bool(),
                        output["prompt_ids"].shape[1],
                    ),
                    form=self.old_form,
                    k=self.old_k,
                    rows_per_pass=self.args.per_device_train_batch_size,
                    temperature=self.temperature,
                )
            output[ROWS] = torch.arange(count, device=mask.device)  # TRL shuffles and splits it like the rest
        return output

    def _old_logits_needed(self) -> bool:
        """As TRL decides it for old log-probabilities: some update on a rollout comes after another one."""
        several = self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) != 0
        return several or self.old_form == "topk"

    def _rule_advantages(self) -> Tensor:
        """Of the completions of all processes; 0 where no reward function scored one."""
        assert self._rewards is not None
        weights = self.reward_weights.to(self._rewards)
        scored = ~self._rewards.isnan().all(1)
        return rule_reward((self._rewards * weights).nansum(1)) * scored

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        mask = _mask(inputs).bool()
        mode = "train" if self.model.training else "eval"
        batch, weights = self._token_batch(inputs, mask)
        reader = self._old_reader(inputs, mask)

        def of_logits(logits: Tensor, some: slice) -> Tensor:
            """(m, 3): loss, penalty, entropy. logits (m, V), of the sampled policy: divided by the temperature."""
            logp = torch.log_softmax(logits.detach().float(), 1)
            entropy = -(logp.exp() * logp).sum(1)
            if batch is None:  # without a token the sum is 0, but every process goes backward
                return torch.stack([logits.float().sum(1), entropy, entropy], 1)
            known = batch[some]
            if known.old_logprobs is None:  # of the first update on a rollout
                known = replace(known, old_logprobs=logp.gather(1, known.actions[:, None]).squeeze(1))
            old = logits.detach() if reader is None else reader(some) / self.temperature
            loss = self.minimised.loss(logits, replace(known, old_logits=old))
            penalty = self._penalty().loss(logits, known) if self.beta else torch.zeros_like(loss)
            return torch.stack([loss, penalty, entropy.to(loss)], 1)

        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        whole = torch.cat([torch.zeros_like(inputs["prompt_mask"]).bool(), mask], 1)
        with self.accelerator.autocast():
            found, hidden = model(
                input_ids=ids, attention_mask=attention, lcogeom_blocks=(of_logits, whole, self.temperature)
            )
        per_token, penalty, entropy = found.unbind(1)
        if weights is not None:
            per_token = per_token * weights
        if self.beta:
            per_token = per_token + self.beta * penalty
            self._note(mode, "kl", penalty.detach())
        self._note(mode, "entropy", entropy.detach())
        self._said = (inputs, mask, batch, reader, hidden.detach())
        return self._averaged(torch.zeros(mask.shape).to(per_token).masked_scatter(mask, per_token), mask, inputs, mode)

    def said(self) -> dict[str, Any] | None:
        """Of the last loss: arguments of Probe.batch. Old logits are made whole for it, [tokens, V]."""
        inputs, mask, batch, reader, hidden = self._said
        if batch is None:
            return None
        head = output_head(unwrap_model(self.model))
        assert head is not None
        with torch.no_grad(), self.accelerator.autocast():
            now = head.gathered().logits(hidden) / self.temperature
            old = now if reader is None else reader(slice(None)) / self.temperature
        values = {"advantages": inputs["advantages"], "old_logprobs": inputs.get("old_per_token_logps")}
        if values["old_logprobs"] is None:
            found = torch.log_softmax(now.float(), 1).gather(1, batch.actions[:, None]).squeeze(1)
            values["old_logprobs"] = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, found)
        if self.beta:
            values["ref_logprobs"] = inputs["ref_per_token_logps"]
        return completions(inputs, mask, values) | {"old_logits": old}

    def _old_reader(self, inputs: dict[str, Any], mask: Tensor) -> Callable[[slice], Tensor] | None:
        """Old logits of some of the M completion tokens, undivided; None where the current ones are the old ones."""
        if ROWS not in inputs:
            return None
        assert self._old is not None
        prompt = torch.zeros_like(inputs["prompt_mask"]).bool()
        return self._old.blocks(inputs[ROWS], torch.cat([prompt, mask], 1))

    def _token_batch(self, inputs: dict[str, Any], mask: Tensor) -> tuple[TokenBatch | None, Tensor | None]:
        """(what the objective reads, but old logits; None without a token. vLLM's importance weights, (M,))."""
        ratio = inputs.get("importance_sampling_ratio")
        weights = None if ratio is None else _wide(ratio, mask)[mask]
        actions = inputs["completion_ids"][mask]
        if len(actions) == 0:
            return None, weights
        values = {"advantages": inputs["advantages"]}
        if "old_per_token_logps" in inputs:
            values["old_logprobs"] = inputs["old_per_token_logps"]
        if self.beta:
            values["ref_logprobs"] = inputs["ref_per_token_logps"]
        return TokenBatch(actions, **{name: _wide(value, mask)[mask] for name, value in values.items()}), weights

    def _averaged(self, per_token: Tensor, mask: Tensor, inputs: dict[str, Any], mode: str) -> Tensor:
        """The loss of a micro-batch from that of its tokens (B, C), 0 off the mask, as TRL averages each loss_type."""
        steps = float(self.current_gradient_accumulation_steps) if mode == "train" else 1.0
        if self.loss_type == "dapo":
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            return per_token.sum() / (tokens * (steps / self.args.steps_per_generation if mode == "train" else 1.0))
        if self.loss_type == "grpo":
            return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean() / steps
        if self.loss_type == "bnpo":
            return per_token.sum() / mask.sum().clamp(min=1) / steps
        longest: int = self.args.max_completion_length
        return per_token.sum() / (len(mask) * longest) / steps

    def _note(self, mode: str, name: str, values: Tensor) -> None:
        """The mean over all processes' tokens goes to the trainer's log."""
        totals = self.accelerator.reduce(torch.stack([values.sum(), values.new_tensor(len(values))]), reduction="sum")
        self._metrics[mode][name].append((totals[0] / totals[1].clamp(min=1.0)).item())


def require_internals(trainer: type) -> None:
    """Raise RuntimeError unless this GRPOTrainer has what LCOTrainer overrides."""
    for name, arguments in OVERRIDDEN.items():
        method: Callable[..., Any] | None = getattr(trainer, name, None)
        found = () if method is None else tuple(inspect.signature(method).parameters)
        if found != arguments:
            raise RuntimeError(
                f"LCOTrainer: TRL {version('trl')}'s GRPOTrainer.{name} takes {found or 'nothing: it is gone'}, where "
                f"{arguments} was expected. Install 'trl=={VERSION}.*'."
            )


def add_blocks(model: torch.nn.Module) -> None:
    """Give a causal LM's forward the argument `lcogeom_blocks`: (a function for `in_blocks`, (B, T) mask, temperature).

    With it, forward returns (the function's values (M, n), what the head sees (M, d)) instead of logits. It runs inside
    the forward, because there FSDP and DDP have parameters and gradients in place.
    """
    before = model.forward  # TRL's, which knows fused_lm_head
    understood: list[bool] = []

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, lcogeom_blocks: tuple[Any, Tensor, float] | None = None, **options: Any) -> Any:
        if lcogeom_blocks is None:
            return before(*args, **options)
        of_logits, mask, temperature = lcogeom_blocks
        require_plain_head(self)
        head = output_head(self)
        if head is None:
            raise TypeError(f"model: {type(self).__name__} has several output heads.")
        if not understood:  # once, without dropout
            last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(self).forward).parameters else {}
            with torch.no_grad(), eval_mode(self):
                logits = before(*args, **options, **last, use_cache=False).logits
                hidden = self.base_model(*args, **options, use_cache=False).last_hidden_state
            require_image(head.gathered(), hidden, logits, mask)
            understood.append(True)
        hidden = self.base_model(*args, **options, use_cache=False).last_hidden_state
        rows = hidden[:, :-1][mask[:, 1:]]
        return in_blocks(of_logits, rows, head, temperature=temperature), rows

    model.forward = types.MethodType(forward, model)


def _by_name(chosen: str | Objective) -> Objective:
    return objective(chosen) if isinstance(chosen, str) else chosen


def _mask(inputs: Mapping[str, Any]) -> Tensor:
    """(B, C): completion tokens that the model itself wrote."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _wide(values: Tensor, mask: Tensor) -> Tensor:
    """Of sequences (B,) or (B, 1), or of tokens (B, C) -> (B, C)."""
    return (values[:, None] if values.ndim == 1 else values).expand(mask.shape)
