"""Everything that decides a training run, in one place: `TrainSettings`, and `field=value` read by a field's type."""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Union, get_args, get_origin, get_type_hints

from lcogeom.objectives import Objective, intervention, objective
from lcogeom.objectives.base import objective_names

SEQUENCE_ADVANTAGES = ("group", "dr-grpo", "rloo", "reinforce", "reinforce-mean", "rule", "adora")
DENSE_ADVANTAGES = ("dpo-log-ratio", "q-rm", "adpa")
ADVANTAGES = ("none", *SEQUENCE_ADVANTAGES, "gae", *DENSE_ADVANTAGES)
REDUCTIONS = ("token", "sequence", "sum", "constant")
CHOICES = {
    "completions": ("sampled", "gold"),
    "advantages": ADVANTAGES,
    "reduction": REDUCTIONS,
    "old_policy": ("hidden", "topk"),
    "schedule": ("constant", "linear", "cosine"),
    "dtype": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class TrainSettings:
    """One training run. An update is one optimiser step; a rollout gives `inner_epochs * mini_batches` of them."""

    model: str = "tiny"
    """`tiny`, `smollm2`, a local folder of a causal LM, or a hub id."""
    task: str = "addition-1"
    """What `load_task` knows: addition-1, addition-2, products, reasoning-gym:NAME, a file, a datasets id."""
    held_out: int = 200
    """Problems kept out of training; the held-out reward is measured on them."""
    held_out_samples: int = 1
    """Completions of each of them in an evaluation."""
    template: str | None = None
    """The prompt of a file's or data set's problem, with {question} in it; None: the form's own."""
    completions: str = "sampled"
    """`sampled` from the policy, or `gold`: the task's own answers, as many problems as a rollout has completions."""

    objective: str = "grpo"
    """A name of the registry, `lcogeom.objective_names()`."""
    objective_options: Mapping[str, object] = field(default_factory=dict)
    """Its options, for example {"beta": 2.0}."""
    loss_factor: float = 1.0
    """What the objective is multiplied by."""
    entropy_bonus: float = 0.0
    """c in loss - c * entropy."""
    intervention: str | None = None
    """A rule that drops tokens or sets clip bounds: capo, bapo, ... (`lcogeom.intervention_names()`)."""
    intervention_options: Mapping[str, object] = field(default_factory=dict)
    """Its options."""
    reduction: str = "token"
    """How token losses become one: `token` (sum / tokens), `sequence` (mean over each completion, then over
    completions), `sum` (sum over each completion, mean over completions), `constant` (sum / (completions *
    max_new_tokens), Dr. GRPO)."""

    advantages: str = "group"
    """How rewards become advantages: none, group, dr-grpo, rloo, reinforce, reinforce-mean, rule (+1 / -1), adora, gae
    (with a critic), or token by token from `advantage_model`: dpo-log-ratio, q-rm, adpa."""
    advantage_model: str | None = None
    """The DPO-trained model, or Q-RM's verifier, that dense advantages are read from; a folder or a hub id."""
    advantage_k: int = 5
    """Ids per token that dense advantages cover."""
    whiten: bool = False
    """Shift and scale the advantages of a rollout's tokens to mean 0 and standard deviation 1."""
    gamma: float = 1.0
    """Discount of GAE."""
    lam: float = 1.0
    """lambda of GAE."""
    critic_learning_rate: float = 1e-4
    """Of the critic's AdamW."""
    critic_clip: float | None = None
    """How far a value may move from the rollout's before its loss is clipped; None: no clipping."""
    dynamic_sampling: int = 0
    """DAPO: replace groups whose rewards are all equal by new ones, in at most so many further rounds; 0: keep them."""
    overlong_buffer: int = 0
    """DAPO: completions longer than max_new_tokens minus this are punished, up to -1 at max_new_tokens; 0: none."""

    old_policy: str = "hidden"
    """What a rollout keeps of the old logits where an objective asks for them: `hidden` states and the old head, or the
    authors' fp16 `topk`."""
    old_k: int = 5
    """k of `topk`."""

    prompts: int = 16
    """Problems per rollout."""
    samples: int = 8
    """Completions of each."""
    max_new_tokens: int = 8
    """Longest completion."""
    stop: str | None = None
    """A completion ends at a token that contains this text, or at the model's end of sequence."""
    temperature: float = 1.0
    """Of sampling; the policy trained and evaluated is softmax(logits / temperature)."""
    generation_batch: int | None = None
    """Completions sampled at once; None: all of a process."""
    continuous_batching: bool = False
    """Sample by transformers' continuous batching, where no completion waits for the longest of its batch: for GPUs."""

    updates: int = 100
    """Optimiser steps of the run."""
    inner_epochs: int = 1
    """Passes over a rollout."""
    mini_batches: int = 1
    """Updates that one pass is cut into."""
    micro_batches: int = 1
    """Backward passes that one update is cut into (gradient accumulation)."""
    learning_rate: float = 3e-4
    """Peak of the schedule; AdamW."""
    schedule: str = "constant"
    """`constant`, `linear` or `cosine`, to 0 at the last update."""
    warmup: float = 0.0
    """Share of the updates in which the learning rate rises linearly."""
    weight_decay: float = 0.0
    """Of AdamW."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    clip_norm: float | None = 1.0
    """The gradient's norm is clipped to this; None: not."""
    dtype: str = "float32"
    """`bfloat16`: passes run in bf16 by autocast, parameters stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank on all linear layers but the head; 0: all parameters."""
    fsdp: bool = False
    """Several processes: shard parameters (FSDP2) instead of copying them (DDP)."""
    seed: int = 0
    """Of problems, samples, adapters and critic."""

    evaluate_every: int = 10
    """Updates between two held-out evaluations; there is one before the first update and after the last, too."""
    checkpoint_every: int = 0
    """Updates between two checkpoints; 0: one at the end only."""
    keep_checkpoints: int = 2
    """How many are kept."""

    record: bool = True
    """Attach the recorder."""
    tokens_per_update: int = 256
    """Tokens it looks at."""
    audit_every: int | None = None
    """Take every k-th update apart; None: none."""
    sketch: int = 16384
    """Numbers kept of each gradient and step; 0: none."""
    black_box: int = 4
    """Updates whose batches are kept for the case that something goes wrong; 0: none."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r}; must be one of {', '.join(allowed)}.")
        self._check_numbers()
        minimised(self)
        if self.intervention is not None:
            intervention(self.intervention, **self.intervention_options)
        elif self.intervention_options:
            raise ValueError("intervention_options: given without an intervention; set intervention, too.")
        steps = self.inner_epochs * self.mini_batches
        if self.updates % steps:
            raise ValueError(
                f"updates: {self.updates} is no multiple of {steps}, the updates made from one rollout "
                f"(inner_epochs {self.inner_epochs} x mini_batches {self.mini_batches})."
            )
        parts = self.mini_batches * self.micro_batches
        if self.rollout_size % parts:
            raise ValueError(
                f"micro_batches: {self.rollout_size} completions (prompts x samples) cannot be cut into {parts} equal "
                "parts (mini_batches x micro_batches)."
            )
        self._check_combinations()

    def _check_numbers(self) -> None:
        at_least = {
            1: (
                *(
                    "held_out",
                    "held_out_samples",
                    "advantage_k",
                    "old_k",
                    "prompts",
                    "samples",
                    "max_new_tokens",
                    "generation_batch",
                ),
                *("updates", "inner_epochs", "mini_batches", "micro_batches", "evaluate_every", "keep_checkpoints"),
                *("tokens_per_update", "audit_every"),
            ),
            0: ("dynamic_sampling", "overlong_buffer", "lora_rank", "checkpoint_every", "black_box", "sketch", "seed"),
        }
        for least, names in at_least.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ValueError(f"{name}: {value}; must be at least {least}.")
        for name in ("learning_rate", "critic_learning_rate", "temperature", "clip_norm", "critic_clip", "loss_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value}; must be a finite number > 0.")
        for name in ("gamma", "lam", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)}; must be in [0, 1].")
        for name in ("weight_decay", "entropy_bonus"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)}; must be a finite number >= 0.")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas: {self.adam_betas}; must be two numbers in [0, 1).")

    def _check_combinations(self) -> None:
        if self.completions == "gold" and self.advantages != "none":
            raise ValueError(
                f"advantages: {self.advantages!r} with completions='gold', which are all right; set advantages=none."
            )
        if (self.advantages in DENSE_ADVANTAGES) != (self.advantage_model is not None):
            raise ValueError(
                f"advantage_model: {self.advantage_model!r} with advantages={self.advantages!r}; dense advantages "
                f"({', '.join(DENSE_ADVANTAGES)}) need one, the others none."
            )
        if self.advantages in ("group", "dr-grpo", "rloo", "adora") and self.samples < 2:
            raise ValueError(f"samples: {self.samples}; advantages={self.advantages!r} compare at least 2 per prompt.")
        if self.whiten and self.advantages in ("none", *DENSE_ADVANTAGES):
            raise ValueError(f"whiten: there is one advantage per token to whiten, not with {self.advantages!r}.")
        if self.continuous_batching and self.fsdp:
            raise ValueError("continuous_batching: not with parameters that are sharded; leave fsdp or it out.")
        if self.overlong_buffer >= self.max_new_tokens:
            raise ValueError(f"overlong_buffer: {self.overlong_buffer}; must be below max_new_tokens.")
        if self.audit_every is not None and self.intervention is not None:
            raise ValueError("audit_every: an audit knows no interventions; leave one of the two out.")

    @property
    def rollout_size(self) -> int:
        """Completions of one rollout, B."""
        return self.prompts * self.samples

    @property
    def updates_per_rollout(self) -> int:
        return self.inner_epochs * self.mini_batches

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as json keeps them."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> TrainSettings:
        """The way back.

        Raises:
            ValueError: a field that is unknown.
        """
        known = {one.name for one in fields(cls)}
        unknown = sorted(set(record) - known)
        if unknown:
            raise ValueError(f"settings: no field {unknown[0]!r}; written by another version of lcogeom?")
        betas = tuple(record.get("adam_betas", cls.adam_betas))
        return cls(**{**record, "adam_betas": betas})


def minimised(settings: TrainSettings) -> Objective:
    """The objective with its options, less the entropy bonus."""
    if settings.objective not in objective_names():
        objective(settings.objective)  # says what there is
    base = objective(settings.objective, **settings.objective_options)
    base = settings.loss_factor * base if settings.loss_factor != 1 else base
    return base - settings.entropy_bonus * objective("entropy") if settings.entropy_bonus else base


def override(settings: TrainSettings, assignments: Iterable[str]) -> TrainSettings:
    """The settings with `field=value` or `objective_options.beta=2` applied, each read by its field's type.

    Raises:
        ValueError: no such field, a value of another type, a result that `TrainSettings` refuses.
    """
    hints = get_type_hints(TrainSettings)
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name, text = name.strip(), text.strip()
        if not equals:
            raise ValueError(f"--set: {assignment!r}; write it as field=value.")
        group, dot, option = name.partition(".")
        if group not in hints:
            near = difflib.get_close_matches(group, hints, n=1)
            raise ValueError(f"--set: no field {group!r}.{f' Did you mean {near[0]!r}?' if near else ''}")
        if dot:
            if get_origin(hints[group]) is not Mapping:
                raise ValueError(f"--set: {group!r} has no options; write {group}=value.")
            changes[group] = {**changes.get(group, getattr(settings, group)), option: _any_value(text)}
        else:
            changes[group] = _value(group, text, hints[group])
    return replace(settings, **changes)


def _value(name: str, text: str, kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        if text.lower() == "none":
            return None
        (kind,) = (one for one in get_args(kind) if one is not type(None))
    if kind is str:
        return text.encode().decode("unicode_escape") if "\\" in text else text  # stop=\n
    try:
        if get_origin(kind) in (Mapping, tuple):
            value = json.loads(text)
            return tuple(value) if get_origin(kind) is tuple else dict(value)
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError, TypeError):
        wanted = {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "JSON")
        raise ValueError(f"--set: {name}={text!r}; must be {wanted}.") from None


def _any_value(text: str) -> object:
    """JSON where it is that, or none; anything else is text."""
    try:
        return None if text.lower() == "none" else json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text
