"""Small causal LMs in float64 for curvature: tied and untied, and one whose Hessian fits into memory whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

import lcogeom as lg

COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 23,
    "intermediate_size": 24,
}
GEMMA = {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
CONFIGS: dict[str, Callable[[bool], transformers.PretrainedConfig]] = {
    "gpt2": lambda tied: transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=23, n_positions=16, tie_word_embeddings=tied
    ),
    "llama": lambda tied: transformers.LlamaConfig(**COMMON, num_key_value_heads=1, tie_word_embeddings=tied),
    "qwen2": lambda tied: transformers.Qwen2Config(**COMMON, num_key_value_heads=2, tie_word_embeddings=tied),
    "gemma2": lambda tied: transformers.Gemma2Config(**COMMON, **GEMMA, tie_word_embeddings=tied),
}
MODELS = [(name, tied) for name in CONFIGS for tied in (False, True)]


@dataclass(frozen=True, eq=False)
class Case:
    """A model, its parameters, and a batch of completion tokens."""

    model: transformers.PreTrainedModel
    input_ids: Tensor
    mask: Tensor
    batch: lg.TokenBatch

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def logits(self) -> Tensor:
        found: Tensor = self.model(input_ids=self.input_ids).logits[:, :-1][self.mask[:, 1:]]
        return found

    def loss(self, objective: lg.Objective) -> Callable[[], Tensor]:
        return lambda: objective.loss(self.logits(), self.batch).mean()

    def rows(self, some: slice) -> Case:
        chosen = self.mask.nonzero()[:, 0]
        kept = (chosen >= some.start) & (chosen < some.stop)
        return Case(self.model, self.input_ids[some], self.mask[some], self.batch[kept])


def case(
    config: transformers.PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    attention: str = "eager",
) -> Case:
    """Random weights, three sequences of nine tokens with completions of different lengths."""
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.eval().to(device=device, dtype=dtype)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 2 else 0.1
            parameter.add_(spread * torch.randn(parameter.shape, generator=rng).to(parameter))
    ids = torch.randint(config.vocab_size, (3, 9), generator=rng)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for row in range(3):
        mask[row, 3 : 9 - row] = True
    actions, sequences = ids[mask], mask.nonzero()[:, 0]
    old = -0.5 - torch.rand(len(actions), generator=rng, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)[sequences]
    old_logits = torch.randn(len(actions), config.vocab_size, generator=rng, dtype=torch.float64)
    given = {"actions": actions, "advantages": advantages, "old_logprobs": old, "sequences": sequences}
    batch = lg.TokenBatch(**{name: value.to(device) for name, value in given.items()}, old_logits=old_logits.to(device))
    return Case(model, ids.to(device), mask.to(device), batch)


def small_gpt2(device: torch.device) -> Case:
    """A LayerNorm model of 1,000 parameters."""
    return case(transformers.GPT2Config(n_embd=6, n_layer=1, n_head=1, vocab_size=11, n_positions=9), device)


def random_like(params: list[Tensor], seed: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p) for p in params]


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def flat(a: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in a])


def differences(
    function: Callable[[], list[Tensor]], params: list[Tensor], vector: list[Tensor], step: float
) -> Tensor:
    """Fourth-order central difference of a list-valued function, flat float64: independent of the package's own."""
    start = [p.detach().clone() for p in params]
    total = torch.zeros(1)
    for shift, weight in ((1, 8 / 12), (-1, -8 / 12), (2, -1 / 12), (-2, 1 / 12)):
        with torch.no_grad():
            for p, s, v in zip(params, start, vector, strict=True):
                p.copy_(s + shift * step * v)
        total = total.to(params[0].device) + weight * flat(function()).double() / step
    with torch.no_grad():
        for p, s in zip(params, start, strict=True):
            p.copy_(s)
    return total
