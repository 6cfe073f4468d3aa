"""Sampling completions, and the tensors of one update made of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from lcogeom.training.tasks import Problem, score

PAGE = 256  # tokens of the cache of continuous batching that are given out together


@dataclass(frozen=True)
class Sample:
    """One problem, answered by the model."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Sampled tokens, the one that ended the completion included."""
    completion: str
    reward: float


@dataclass(frozen=True, eq=False)
class Sequences:
    """B samples side by side, padded on the right."""

    input_ids: Tensor
    """(B, T)."""
    attention_mask: Tensor
    """(B, T), 0 on padding."""
    action_mask: Tensor
    """(B, T) bool, true on sampled tokens."""
    first_action: int
    """The first column with a sampled token."""

    def __getitem__(self, rows: Tensor) -> Sequences:
        """Some of the sequences."""
        return Sequences(self.input_ids[rows], self.attention_mask[rows], self.action_mask[rows], self.first_action)


def generate(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    seed: int,
    stop: str | None = None,
    temperature: float = 1.0,
    synced: bool = False,
    continuous: bool = False,
) -> list[Sample]:
    """Sample one completion for each problem from the full distribution.

    Args:
        stop: a completion ends at the first token whose text contains it, or at the end-of-sequence token.
        seed: of the sampling; the global generators are left as they were.
        temperature: the distribution is softmax(logits / temperature).
        synced: several processes hold shards of the model: go on until the longest completion of all of them.
        continuous: by transformers' continuous batching, over pages of a cache; other random numbers.

    Raises:
        ValueError: no problem, a prompt without a token, a tokenizer without a token to pad with.
    """
    if not problems:
        raise ValueError("problems: none to complete.")
    pad = pad_id(tokenizer)
    prompts = [tokenizer(problem.prompt).input_ids for problem in problems]
    empty = [number for number, ids in enumerate(prompts, start=1) if not ids]
    if empty:
        raise ValueError(f"problems: the prompt of problem {empty[0]} has no token; a completion needs one before it.")
    stops = stop_ids(tokenizer, stop)
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,  # some models bring their own
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=list(stops) or None,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if continuous:
            rows = _continuously(model, prompts, config, seed)
        else:
            rows = _side_by_side(model, prompts, config, synced)
    samples = []
    for problem, prompt, row in zip(problems, prompts, rows, strict=True):
        end = next((place for place, token in enumerate(row) if token in stops), len(row) - 1)
        kept = row[: end + 1]
        text = tokenizer.decode(kept, skip_special_tokens=True)
        samples.append(Sample(problem, tuple(prompt), tuple(kept), text, score(text, problem)))
    return samples


def _side_by_side(
    model: transformers.PreTrainedModel,
    prompts: Sequence[list[int]],
    config: transformers.GenerationConfig,
    synced: bool,
) -> list[list[int]]:
    """One batch, padded on the left. The new tokens of each prompt; what comes after its end is padding."""
    width = max(map(len, prompts))
    pad = config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=model.device)
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    tokens = model.generate(input_ids=ids, attention_mask=attention, generation_config=config, synced_gpus=synced)
    rows: list[list[int]] = tokens[:, width:].tolist()
    return rows


def _continuously(
    model: transformers.PreTrainedModel, prompts: Sequence[list[int]], config: transformers.GenerationConfig, seed: int
) -> list[list[int]]:
    """A completion that ends makes room for the next prompt. The new tokens of each prompt.

    Raises:
        RuntimeError: not all completions came back.
    """
    blocks = None
    if model.device.type == "cpu":  # else it would take most of the memory there is
        longest = max(map(len, prompts)) + config.max_new_tokens
        blocks = len(prompts) * -(-longest // PAGE)
    batching = transformers.ContinuousBatchingConfig(seed=seed, page_size=PAGE, num_blocks=blocks)
    found = model.generate_batch(
        list(prompts), generation_config=config, continuous_batching_config=batching, progress_bar=False
    )
    failed = [output.error for output in found.values() if output.error is not None]
    if failed or len(found) != len(prompts):
        raise RuntimeError(
            f"continuous_batching: {len(found)} of {len(prompts)} completions came back"
            f"{f'; the first error: {failed[0]}' if failed else ''}. Train without it, or sample fewer at once "
            "(generation_batch)."
        )
    return [output.generated_tokens for output in found.values()]


def side_by_side(samples: Sequence[Sample], pad: int, device: torch.device) -> Sequences:
    """The samples as one batch of sequences: prompt, completion, padding."""
    rows = [sample.prompt_ids + sample.completion_ids for sample in samples]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    attention = torch.zeros_like(ids)
    actions = torch.zeros_like(ids, dtype=torch.bool)
    for place, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        ids[place, : len(row)] = torch.tensor(row)
        attention[place, : len(row)] = 1
        actions[place, len(sample.prompt_ids) : len(row)] = True
    first = min(len(sample.prompt_ids) for sample in samples)
    return Sequences(ids.to(device), attention.to(device), actions.to(device), first)


def pad_id(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """The token to pad with."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} has neither a pad nor an eos token; set pad_token.")
    return int(pad)


def stop_ids(tokenizer: transformers.PreTrainedTokenizerBase, stop: str | None) -> tuple[int, ...]:
    """Tokens that end a completion: the end-of-sequence token, and every token whose text contains `stop`."""
    ends = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    return tuple(sorted(ends if stop is None else ends | _tokens_with(tokenizer, stop)))


@functools.lru_cache(maxsize=8)
def _tokens_with(tokenizer: transformers.PreTrainedTokenizerBase, stop: str) -> frozenset[int]:
    """Decoding a vocabulary takes a second, and every rollout asks."""
    every = range(len(tokenizer))
    texts = tokenizer.batch_decode([[i] for i in every])
    return frozenset(i for i, text in zip(every, texts, strict=True) if stop in text)
