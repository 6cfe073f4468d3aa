"""The hard cases of one token batch, shared by the tests of gradient, Hessian, inertia and recorder."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

import lcogeom as lg

TOKENS = 5
LOGITS = ("flat", "random", "peaked", "saturated", "tied", "half")


@dataclass(frozen=True)
class Case:
    vocab: int
    logits: str
    advantage: float
    log_ratio: float
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        kind = "" if self.dtype == torch.float64 else f"-{str(self.dtype).removeprefix('torch.')}"
        return f"V{self.vocab}-{self.logits}-A{self.advantage:g}-r{self.log_ratio:g}{kind}"

    def build(self, device: torch.device) -> tuple[torch.Tensor, lg.TokenBatch]:
        """(logits (N, V), batch). Rows differ; every optional field is filled, top-k advantages are not."""
        rng = torch.Generator().manual_seed(self.vocab * 31 + LOGITS.index(self.logits))
        logits = make_logits(self.logits, self.vocab, rng)
        actions = torch.randint(self.vocab, (TOKENS,), generator=rng)
        if self.logits in ("peaked", "saturated", "half"):
            actions[: TOKENS - 2] = 0  # most rows act on the heavy token, the last two on another
            actions[TOKENS - 2 :] = self.vocab - 1
        logits = logits.to(self.dtype)
        logprobs = torch.log_softmax(logits.double(), 1).gather(1, actions[:, None]).squeeze(1)
        old_logits = logits.double() + 0.3 * torch.randn(TOKENS, self.vocab, generator=rng, dtype=torch.float64)
        advantages = self.advantage * (1 + 0.5 * torch.rand(TOKENS, generator=rng, dtype=torch.float64))
        batch = lg.TokenBatch(
            actions=actions.to(device),
            advantages=advantages.to(device),
            old_logprobs=(logprobs - self.log_ratio).to(device),
            ref_logprobs=(logprobs - 0.1).to(device),
            old_logits=old_logits.to(device),
            ref_logits=(old_logits.flip(0) + 0.5 * logits.double()).to(device),
            sequences=torch.tensor([4, 4, 4, 9, 9], device=device),
            pairs=torch.tensor([2, 2, 2, 1, 1], device=device),
            chosen=torch.tensor([True, False, True, False, True], device=device),
        )
        return logits.to(device), batch

    def dense(self, device: torch.device) -> tuple[torch.Tensor, lg.TokenBatch]:
        """The same with advantages of both signs on min(5, V) ids of each token, its action not always among them."""
        logits, batch = self.build(device)
        rng = torch.Generator().manual_seed(self.vocab)
        count = min(5, self.vocab)
        ids = torch.stack([torch.randperm(self.vocab, generator=rng)[:count] for _ in range(TOKENS)])
        ids[0] = torch.arange(count)
        advantages = self.advantage * torch.randn(ids.shape, generator=rng, dtype=torch.float64)
        return logits, replace(batch, advantages=advantages.to(device), advantage_ids=ids.to(device))


def make_logits(kind: str, vocab: int, rng: torch.Generator) -> torch.Tensor:
    noise = torch.randn(TOKENS, vocab, generator=rng, dtype=torch.float64)
    if kind == "flat":
        return torch.full((TOKENS, vocab), 1.5, dtype=torch.float64)
    if kind == "random":
        return 3 * noise
    if kind == "tied":
        return noise.round()
    if kind == "half":  # p_0 = 1/2 -+ 1e-9 and exactly 1/2
        rest = noise.clone()
        rest[:, 0] = torch.logsumexp(rest[:, 1:], dim=1)
        rest[:, 0] += torch.tensor([4e-9, -4e-9, 0.0, 4e-9, -4e-9], dtype=torch.float64)
        return rest
    noise[:, 0] = noise[:, 1:].max() + (6.0 if kind == "peaked" else 60.0)
    return noise


CASES = [
    Case(vocab, logits, advantage, log_ratio)
    for vocab, logits, (advantage, log_ratio) in itertools.product(
        (2, 3, 17, 400),
        LOGITS,
        ((1.0, 0.0), (-1.0, 0.0), (0.0, 0.3), (2.0, 0.1), (1.0, 0.5), (-2.0, -0.5), (1e4, 0.01), (-1e-8, 13.8)),
    )
] + [Case(17, kind, 1.0, 0.0, dtype) for kind in LOGITS for dtype in (torch.bfloat16, torch.float32)]
