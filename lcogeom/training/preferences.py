"""Preference pairs, and models trained on them: Q-RM verifiers and DPO models, which `dense` turns into advantages.

The losses are those of the registry ("qrm", "simpo", "dpo"), on the completion tokens of both answers of each pair.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

from lcogeom.objectives import TokenBatch, objective
from lcogeom.training.problems import Problem
from lcogeom.training.replay import completion_logits
from lcogeom.training.rollout import Sample, Sequences, pad_id, side_by_side
from lcogeom.training.task_files import records, text

LOSSES = ("qrm", "simpo", "dpo")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the first is preferred."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PairAccuracy:
    """How often a model prefers the chosen answer."""

    share: float
    low: float
    """Lower end of the 95 % interval (Wilson)."""
    high: float
    pairs: int


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs from a .jsonl or .parquet file whose records hold the texts `prompt`, `chosen` and `rejected`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a record that is not such an object, named by its place; both answers equal; no pair at all.
    """
    pairs = []
    for place, record in records(Path(path), "pairs"):
        try:
            pair = Pair(text(record, "prompt"), text(record, "chosen"), text(record, "rejected"))
            if pair.chosen == pair.rejected:
                raise ValueError("'chosen' and 'rejected' are the same")
        except ValueError as error:
            raise ValueError(f"pairs: {place}: {error}. It needs the texts prompt, chosen and rejected.") from error
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"pairs: {Path(path).name} holds no pair.")
    return pairs


def q_rm_loss(
    logits: Tensor, batch: TokenBatch, *, beta: float = 0.2, gamma: float = 2.0, cross_entropy: float = 0.0
) -> Tensor:
    """Q-RM's training loss, the mean over pairs of

        -log sigmoid(beta (mean over the chosen answer of Z[a_t] - mean over the rejected of Z[a_t]) - gamma)

    on raw logits Z, plus `cross_entropy` times the mean of -log p(a_t) over the chosen answers' tokens. Without the
    latter it is the objective "qrm": convex in the logits. [systems.md 14, confirmed; the LCO authors' variant has
    log-probabilities in place of Z, the objective "simpo", and cross_entropy = 1]

    Args:
        logits: the verifier's at the completion tokens, (M, V).
        batch: `pairs`, `chosen` and the tokens' ids.

    Returns:
        A scalar, differentiable; float32 unless the logits are float64.

    Raises:
        ValueError: beta not finite and > 0, cross_entropy < 0, pairs or chosen missing.
    """
    return _mean_over_pairs("qrm", {"beta": beta, "gamma": gamma}, logits, batch, cross_entropy)


@dataclass(frozen=True, eq=False)
class PairTokens:
    """P pairs as 2 P sequences: chosen and rejected of the first pair, of the second, ..."""

    sequences: Sequences
    tokens: TokenBatch
    """`actions`, `pairs` and `chosen` of the M completion tokens, in the order of `action_mask.nonzero()`."""


def pair_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, pairs: Sequence[Pair], device: torch.device
) -> PairTokens:
    """The pairs as tensors. The end-of-sequence token is put behind an answer that does not end in it.

    Raises:
        ValueError: no pair, or a prompt without a token.
    """
    if not pairs:
        raise ValueError("pairs: none.")
    samples = []
    for pair in pairs:
        prompt = tuple(tokenizer(pair.prompt).input_ids)
        if not prompt:
            raise ValueError(f"pairs: the prompt {pair.prompt!r} has no token.")
        for answer, reward in ((pair.chosen, 1.0), (pair.rejected, 0.0)):
            ids = tuple(tokenizer(answer, add_special_tokens=False).input_ids)
            if tokenizer.eos_token_id is not None and ids[-1:] != (tokenizer.eos_token_id,):
                ids += (int(tokenizer.eos_token_id),)
            samples.append(Sample(Problem(pair.prompt, pair.chosen), prompt, ids, answer, reward))
    sequences = side_by_side(samples, pad_id(tokenizer), device)
    rows = sequences.action_mask.nonzero()[:, 0]
    actions = sequences.input_ids[sequences.action_mask]
    return PairTokens(sequences, TokenBatch(actions, pairs=rows // 2, chosen=rows % 2 == 0))


def train_reward_model(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    loss: str = "qrm",
    reference: transformers.PreTrainedModel | None = None,
    updates: int,
    learning_rate: float,
    pairs_per_update: int = 32,
    seed: int = 0,
    beta: float | None = None,
    gamma: float | None = None,
    cross_entropy: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train a causal LM in place on preference pairs, by AdamW without weight decay; the losses, one an update.

    Args:
        model: what becomes the verifier ("qrm", "simpo") or the DPO model ("dpo").
        pairs: drawn with `seed`; none a second time before all were drawn.
        loss: "qrm" on raw logits; "simpo" on log-probabilities; "dpo".
        reference: pi_ref of DPO, which needs it; it must not share its parameters with `model`.
        beta, gamma: of the loss; None: the objective's own.
        cross_entropy: weight of -log p(a) on the chosen answers.
        progress: called with (updates done, of how many).

    Raises:
        ValueError: an unknown loss, DPO without a reference, a number out of range, no pair.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss: {loss!r}; must be one of {', '.join(LOSSES)}.")
    if loss == "dpo" and (reference is None or reference is model):
        raise ValueError("reference: DPO needs the model before training, as one of its own (copy.deepcopy(model)).")
    if not pairs:
        raise ValueError("pairs: none.")
    for name, number in (("updates", updates), ("pairs_per_update", pairs_per_update)):
        if number < 1:
            raise ValueError(f"{name}: {number}; must be at least 1.")
    options = {key: value for key, value in (("beta", beta), ("gamma", gamma)) if value is not None}
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    source = random.Random(seed)
    waiting: list[Pair] = []
    losses = []
    for update in range(updates):
        while len(waiting) < pairs_per_update:
            waiting += source.sample(pairs, len(pairs))
        drawn, waiting = waiting[:pairs_per_update], waiting[pairs_per_update:]
        batch = pair_tokens(tokenizer, drawn, model.device)
        tokens = batch.tokens
        if reference is not None:
            tokens = replace(tokens, ref_logprobs=sampled_logprobs(reference, batch))
        value = _mean_over_pairs(loss, options, completion_logits(model, batch.sequences), tokens, cross_entropy)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
        if progress is not None:
            progress(update + 1, updates)
    return torch.stack(losses).tolist()


@torch.no_grad()
def sampled_logprobs(model: transformers.PreTrainedModel, batch: PairTokens) -> Tensor:
    """log p of each completion token, (M,) float32."""
    logprobs = torch.log_softmax(completion_logits(model, batch.sequences).float(), dim=1)
    return logprobs.gather(1, batch.tokens.actions[:, None]).squeeze(1)


@torch.no_grad()
def pair_margins(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    loss: str = "qrm",
    reference: transformers.PreTrainedModel | None = None,
    pairs_at_once: int = 64,
) -> Tensor:
    """By how much the model prefers the chosen answers, (P,) float64: the margin of its loss, without beta and gamma.

    qrm: mean of Z[a] over the chosen answer minus that over the rejected; simpo: the same of log p(a); dpo: the sum of
    log p(a) - log p_ref(a) over the chosen answer minus that over the rejected.

    Raises:
        ValueError: an unknown loss, DPO without a reference, no pair.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss: {loss!r}; must be one of {', '.join(LOSSES)}.")
    if loss == "dpo" and reference is None:
        raise ValueError("reference: DPO's margin needs the model before training.")
    found = []
    for start in range(0, len(pairs), pairs_at_once):
        batch = pair_tokens(tokenizer, pairs[start : start + pairs_at_once], model.device)
        if loss == "qrm":
            logits = completion_logits(model, batch.sequences)
            values = logits.gather(1, batch.tokens.actions[:, None]).squeeze(1)
        else:
            values = sampled_logprobs(model, batch)
        if loss == "dpo" and reference is not None:
            values = values - sampled_logprobs(reference, batch)
        rows = batch.sequences.action_mask.nonzero()[:, 0]
        sums = torch.zeros(len(batch.sequences.input_ids), dtype=torch.float64, device=values.device)
        sums.index_add_(0, rows, values.double())
        if loss != "dpo":
            sums /= batch.sequences.action_mask.sum(dim=1)
        found.append(sums[0::2] - sums[1::2])
    if not found:
        raise ValueError("pairs: none.")
    return torch.cat(found)


def pair_accuracy(margins: Tensor) -> PairAccuracy:
    """The share of positive margins, (P,), with its 95 % interval; a margin of exactly 0 counts half."""
    count = len(margins)
    share = float((margins > 0).double().mean() + 0.5 * (margins == 0).double().mean())
    z = 1.959963984540054
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return PairAccuracy(share, middle - half, middle + half, count)


def _mean_over_pairs(
    name: str, options: dict[str, float], logits: Tensor, batch: TokenBatch, cross_entropy: float
) -> Tensor:
    if not 0 <= cross_entropy < math.inf:
        raise ValueError(f"cross_entropy: {cross_entropy}; must be a finite number >= 0.")
    batch.require(name, "pairs", "chosen")
    assert batch.pairs is not None
    assert batch.chosen is not None
    value = objective(name, **options).loss(logits, batch).sum() / len(torch.unique(batch.pairs))
    if cross_entropy:
        chosen = batch.chosen.bool()
        value = value + cross_entropy * objective("sft").loss(logits, batch)[chosen].mean()
    return value
