"""The paper's dynamics experiment: many updates on one fixed batch, from the same weights, under each objective.

Sample completions of a model, score them, keep a few; then for each objective start from the same weights, make N
updates on those completions, and record everything. What differs between two runs of a replay is the objective alone.
(After the authors' policy_train_policy_gradient_norm_visualize.py, systems.md 1.4, which reuses one batch as well.)
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from lcogeom.models import LoadedModel, load_model
from lcogeom.objectives import Objective, TokenBatch, objective
from lcogeom.recording import Probe, attach
from lcogeom.recording.unwrap import unwrap_model
from lcogeom.runs import COLLECTION, create_folder
from lcogeom.training.rollout import Sample, Sequences, generate, pad_id, side_by_side
from lcogeom.training.tasks import Problem, arithmetic, read_problems

DEFAULT_OBJECTIVES = (
    "sft",
    "reinforce:negative",
    "ppo-unclipped:positive",
    "ppo-unclipped:negative",
    "ppo",
    "lco-kld",
    "lco-mse",
    "lco-lch",
)
SIGNS = {"positive": 1.0, "negative": -1.0}
PROMPTS_A_ROUND = 32
LEARNING_RATE, TINY_LEARNING_RATE = 1e-5, 3e-4

Progress = Callable[[str, int, int], None]
"""(what is being done, updates or samples done, of how many)."""


@dataclass(frozen=True)
class ReplaySettings:
    """One replay."""

    model: str = "tiny"
    """`tiny`, `smollm2`, a local folder or a hub id."""
    objectives: tuple[str, ...] = DEFAULT_OBJECTIVES
    """Registry names, and `ppo-unclipped`. A = 2 * reward - 1 for every token of a completion, unless `:positive` or
    `:negative` behind the name sets A = +1 or -1 for all."""
    problems: str = "arithmetic"
    """`arithmetic` (for `tiny` in its own form), `arithmetic-characters` (that form), or a JSONL file."""
    select: str = "mixed"
    """Which completions are kept: `positive` (reward 1), `negative` (reward 0), `mixed` (half and half)."""
    sequences: int = 6
    """How many completions are kept."""
    updates: int = 30
    """Updates under each objective."""
    seeds: int = 1
    """Repetitions, with other problems and samples: seeds 0, 1, ..."""
    learning_rate: float | None = None
    """Of AdamW without weight decay; None: 3e-4 for `tiny`, else 1e-5."""
    beta: float | None = None
    """Of the LCO objectives; None: their default."""
    max_new_tokens: int = 24
    """Longest completion."""
    stop: str | None = None
    """A completion ends at a token that contains this text, or at the model's end of sequence."""
    sampling_rounds: int = 40
    """Give up after so many rounds of 32 samples without enough completions of the kind asked for."""
    tap: str = "logits"
    """Where the recorder reads: `logits` or `hidden`."""
    audit_every: int | None = None
    """Take every k-th update apart (`audit_step`); None: none."""

    def __post_init__(self) -> None:
        for name in ("sequences", "updates", "seeds", "max_new_tokens", "sampling_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; must be at least 1.")
        if self.audit_every is not None and self.audit_every < 1:
            raise ValueError(f"audit_every: {self.audit_every}; must be at least 1, or None for no audit.")
        if self.select not in ("positive", "negative", "mixed"):
            raise ValueError(f"select: {self.select!r}; must be positive, negative or mixed.")
        if self.select == "mixed" and self.sequences < 2:
            raise ValueError("sequences: 1 cannot be mixed; ask for at least 2, or select positive or negative.")
        if self.tap not in ("logits", "hidden"):
            raise ValueError(f"tap: {self.tap!r}; must be logits or hidden.")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: {self.learning_rate}; must be a finite number > 0.")
        for name in self.objectives:
            variant_objective(name, self.beta)
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives: name at least one, and none twice.")


@dataclass(frozen=True, eq=False)
class ReplayBatch:
    """The batch that every update of a replay is made on."""

    samples: tuple[Sample, ...]
    sequences: Sequences
    old_logits: Tensor
    """(M, V), of the starting weights at the M completion tokens."""
    old_logprobs: Tensor
    """(B, T), of the tokens themselves; 0 elsewhere."""

    @property
    def rewards(self) -> Tensor:
        """(B,), on the batch's device."""
        return torch.tensor([sample.reward for sample in self.samples], device=self.old_logits.device)

    def advantages(self, fixed: float | None = None) -> Tensor:
        """(B, T): `fixed` everywhere; None: 2 * reward - 1 of the completion."""
        per_sequence = 2 * self.rewards - 1 if fixed is None else torch.full_like(self.rewards, fixed)
        return per_sequence[:, None].expand(self.sequences.input_ids.shape)


def variant_objective(name: str, beta: float | None = None) -> tuple[Objective, float | None]:
    """`lco-kld`, `ppo-unclipped:positive`, ... -> (the objective, the advantage of every token; None: the reward's).

    Raises:
        ValueError: an unknown name or sign.
    """
    base, _, sign = name.partition(":")
    if sign and sign not in SIGNS:
        raise ValueError(f"objectives: {name!r} ends in {sign!r}; only ':positive' and ':negative' may follow a name.")
    options: dict[str, object] = {"clip_low": None, "clip_high": None} if base == "ppo-unclipped" else {}
    if beta is not None and base.startswith("lco-"):
        options["beta"] = beta
    return objective("ppo" if base == "ppo-unclipped" else base, **options), SIGNS.get(sign)


def replay(settings: ReplaySettings, run: str | Path, progress: Progress | None = None) -> Path:
    """Run the experiment and record it: a collection of run folders, one for each objective and seed.

    Raises:
        FileExistsError: `run` exists.
        FileNotFoundError, ValueError: a model or problems that cannot be used; too few completions of the kind asked.
    """
    tell = progress or (lambda *_: None)
    if Path(run).exists():
        raise FileExistsError(f"run: {str(run)!r} exists already. Give another folder, or remove it first.")
    read_source(settings, 1, 0)  # a broken file is said before a model is loaded
    loaded = load_model(settings.model)
    rate = settings.learning_rate or (TINY_LEARNING_RATE if settings.model == "tiny" else LEARNING_RATE)
    start = {name: tensor.detach().clone() for name, tensor in loaded.model.state_dict().items()}
    batch = make_batch(loaded, settings, 0, tell)  # before the folder: too few completions leave nothing behind
    folder = create_folder(run, {"replay": asdict(settings), "learning_rate": rate}, kind=COLLECTION)
    for seed in range(settings.seeds):
        if seed > 0:
            loaded.model.load_state_dict(start)
            batch = make_batch(loaded, settings, seed, tell)
        _write_samples(folder / f"samples-seed-{seed}.json", batch)
        for name in settings.objectives:
            loaded.model.load_state_dict(start)
            minimised, fixed = variant_objective(name, settings.beta)
            optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=rate, weight_decay=0.0)
            with attach(
                loaded.model,
                optimizer,
                run=folder / name.replace(":", "-") / f"seed-{seed}",
                objective=minimised,
                tap=settings.tap,
                tokenizer=loaded.tokenizer,
                labels={"model": settings.model, "variant": name, "seed": seed},
                audit_every=settings.audit_every,
                copies=True,
            ) as probe:
                tell(f"{name}, seed {seed}", 0, settings.updates)
                for update in range(settings.updates):
                    one_update(loaded.model, optimizer, minimised, batch, advantage=fixed, probe=probe)
                    tell(f"{name}, seed {seed}", update + 1, settings.updates)
    return folder


def make_batch(loaded: LoadedModel, settings: ReplaySettings, seed: int, progress: Progress) -> ReplayBatch:
    """Sample until enough completions of each kind are there, and score the kept ones under the starting weights."""
    wanted = {
        "positive": {1.0: settings.sequences},
        "negative": {0.0: settings.sequences},
        "mixed": {1.0: (settings.sequences + 1) // 2, 0.0: settings.sequences // 2},
    }[settings.select]
    kept: dict[float, list[Sample]] = {reward: [] for reward in wanted}
    for attempt in range(settings.sampling_rounds):
        progress(f"sampling, seed {seed}", sum(map(len, kept.values())), settings.sequences)
        samples = generate(
            loaded.model,
            loaded.tokenizer,
            read_source(settings, PROMPTS_A_ROUND, seed * settings.sampling_rounds + attempt),
            max_new_tokens=settings.max_new_tokens,
            seed=seed * settings.sampling_rounds + attempt,
            stop=settings.stop,
        )
        for sample in samples:
            if sample.reward in kept and len(kept[sample.reward]) < wanted[sample.reward]:
                kept[sample.reward].append(sample)
        if all(len(kept[reward]) == count for reward, count in wanted.items()):
            break
    else:
        found = ", ".join(f"{len(kept[r])} of {n} with reward {r:g}" for r, n in wanted.items())
        raise ValueError(
            f"select: after {settings.sampling_rounds * PROMPTS_A_ROUND} samples there are {found}. "
            "Choose another selection, easier or harder problems, or fewer sequences."
        )
    progress(f"sampling, seed {seed}", settings.sequences, settings.sequences)
    return score_batch(loaded, [sample for group in kept.values() for sample in group])


def score_batch(loaded: LoadedModel, samples: list[Sample]) -> ReplayBatch:
    """The samples as tensors, with the logits and log-probabilities of the model as it is now."""
    sequences = side_by_side(samples, pad_id(loaded.tokenizer), loaded.model.device)
    with torch.no_grad():
        logits = completion_logits(loaded.model, sequences).float()
    chosen = sequences.input_ids[sequences.action_mask]
    old_logprobs = torch.zeros(sequences.input_ids.shape, device=logits.device)
    old_logprobs[sequences.action_mask] = torch.log_softmax(logits, 1).gather(1, chosen[:, None]).squeeze(1)
    return ReplayBatch(tuple(samples), sequences, logits, old_logprobs)


def completion_logits(model: transformers.PreTrainedModel, sequences: Sequences) -> Tensor:
    """The logits that predict the completion tokens, (M, V), in the order of `action_mask.nonzero()`."""
    options: dict[str, object] = {"attention_mask": sequences.attention_mask, "use_cache": False}
    kept = sequences.input_ids.shape[1] - sequences.first_action + 1
    if "logits_to_keep" in inspect.signature(unwrap_model(model).forward).parameters:
        options["logits_to_keep"] = kept  # prompts need no logits
    logits: Tensor = model(input_ids=sequences.input_ids, **options).logits[:, -kept:-1]
    return logits[sequences.action_mask[:, 1 - kept :]]


def token_batch(batch: ReplayBatch, advantage: float | None = None) -> TokenBatch:
    """The completion tokens as an objective needs them, in the order of `action_mask.nonzero()`.

    advantage: of every token; None takes 2 * reward - 1 of the token's completion.
    """
    mask = batch.sequences.action_mask
    return TokenBatch(
        actions=batch.sequences.input_ids[mask],
        advantages=batch.advantages(advantage)[mask],
        old_logprobs=batch.old_logprobs[mask],
        old_logits=batch.old_logits,
        sequences=mask.nonzero()[:, 0],
    )


def mean_loss(
    model: transformers.PreTrainedModel, minimised: Objective, batch: ReplayBatch, *, advantage: float | None = None
) -> Tensor:
    """Mean loss over the batch's completion tokens, differentiable. advantage: as in `one_update`."""
    return minimised.loss(completion_logits(model, batch.sequences), token_batch(batch, advantage)).mean()


def one_update(
    model: transformers.PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    minimised: Objective,
    batch: ReplayBatch,
    *,
    advantage: float | None = None,
    probe: Probe | None = None,
) -> Tensor:
    """One optimiser step on the mean loss over the batch's completion tokens; returns that loss.

    advantage: of every token; None takes 2 * reward - 1 of the token's completion.
    """
    loss = mean_loss(model, minimised, batch, advantage=advantage)
    if probe is not None:
        probe.batch(
            input_ids=batch.sequences.input_ids,
            action_mask=batch.sequences.action_mask,
            advantages=batch.advantages(advantage),
            old_logprobs=batch.old_logprobs,
            old_logits=batch.old_logits,
            loss=loss,
        )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def read_source(settings: ReplaySettings, count: int, seed: int) -> list[Problem]:
    """`count` problems; a file's problems are taken in order, from another place for each seed."""
    if settings.problems in ("arithmetic", "arithmetic-characters"):
        characters = settings.model == "tiny" or settings.problems.endswith("characters")
        return arithmetic(count, seed, characters=characters)
    problems = read_problems(settings.problems)
    return [problems[(seed * count + place) % len(problems)] for place in range(count)]


def _write_samples(path: Path, batch: ReplayBatch) -> None:
    records: list[Mapping[str, object]] = [
        {"prompt": s.problem.prompt, "answer": s.problem.answer, "completion": s.completion, "reward": s.reward}
        for s in batch.samples
    ]
    path.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
