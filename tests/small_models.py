"""Tiny random causal LMs of several architectures, and one plain update on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

import lcogeom as lg

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 41}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, intermediate_size=48),
    "llama-gqa-tied": lambda: transformers.LlamaConfig(
        **COMMON, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=41, n_positions=64),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**COMMON, intermediate_size=48),
    "phi3": lambda: transformers.Phi3Config(**COMMON, intermediate_size=48, num_key_value_heads=2, pad_token_id=0),
    "gemma2-softcap": lambda: transformers.Gemma2Config(
        **COMMON, intermediate_size=48, head_dim=8, num_key_value_heads=2, final_logit_softcapping=3.0
    ),
    "cohere-scale": lambda: transformers.CohereConfig(**COMMON, intermediate_size=48, logit_scale=0.25),
    "granite-scale": lambda: transformers.GraniteConfig(**COMMON, intermediate_size=48, logits_scaling=4.0),
}


def build(name: str, device: torch.device, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model in eval mode, with logits spread enough to be interesting."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


@dataclass(frozen=True, eq=False)
class Task:
    """B sequences with completions of different lengths."""

    input_ids: Tensor
    mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    old_logits: Tensor
    """(M, V) at the masked tokens."""

    def tokens(self) -> lg.TokenBatch:
        return lg.TokenBatch(
            self.input_ids[self.mask],
            self.advantages[self.mask],
            self.old_logprobs[self.mask],
            old_logits=self.old_logits,
        )

    def rows(self, some: slice) -> Task:
        at = self.mask.nonzero()[:, 0]
        chosen = (at >= some.start) & (at < some.stop)
        return Task(
            self.input_ids[some],
            self.mask[some],
            self.advantages[some],
            self.old_logprobs[some],
            self.old_logits[chosen],
        )


def make_task(model: transformers.PreTrainedModel, sequences: int = 4, length: int = 12, seed: int = 0) -> Task:
    rng = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size
    ids = torch.randint(vocab, (sequences, length), generator=rng)
    mask = torch.zeros(sequences, length, dtype=torch.bool)
    for row in range(sequences):
        mask[row, 4 : length - row % 3] = True
    signs = torch.tensor([1.0, -1.0, 0.0, 2.0])[torch.arange(sequences) % 4]
    ids, mask = ids.to(model.device), mask.to(model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1][mask[:, 1:]].float()
    logits = logits + 0.3 * torch.randn(logits.shape, generator=rng).to(logits)
    old = torch.zeros(ids.shape, device=model.device)
    old[mask] = torch.log_softmax(logits, 1).gather(1, ids[mask][:, None]).squeeze(1)
    return Task(ids, mask, signs[:, None].expand(ids.shape).contiguous().to(model.device), old, logits)


def loss_of(model: transformers.PreTrainedModel, task: Task, objective: lg.Objective) -> Tensor:
    logits = model(input_ids=task.input_ids).logits[:, :-1][task.mask[:, 1:]]
    return objective.loss(logits, task.tokens()).mean()


def tell(probe: lg.Probe, task: Task, loss: Tensor | None = None) -> None:
    probe.batch(
        input_ids=task.input_ids,
        action_mask=task.mask,
        advantages=task.advantages,
        old_logprobs=task.old_logprobs,
        old_logits=task.old_logits,
        loss=loss,
    )
