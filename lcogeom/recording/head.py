"""The way from the last hidden state to the logits, and back for gradients, of a Hugging Face causal LM."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
MULTIPLIES_LOGITS_SCALING = ("hyperclovax",)  # where Granite divides
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2, RecurrentGemma, xLSTM
IGNORED = {"mpt": "logit_scale", "gemma3": "final_logit_softcapping"}  # in their configs, not in their forward


@dataclass(frozen=True, eq=False)
class OutputHead:
    """logits = cap * tanh(scale * (W h + b) / cap), its first `vocabulary` entries; no cap where `cap` is None."""

    module: torch.nn.Module
    scale: float
    cap: float | None
    vocabulary: int
    """Rows of W, less those that only pad it."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, d) -> (M, V), in the head's own dtype: what the model's forward computes."""
        weight, bias = self._parameters()
        raw = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias) * self.scale
        return raw if self.cap is None else self.cap * torch.tanh(raw / self.cap)

    def gathered(self) -> OutputHead:
        """The same with its whole weight, where FSDP2 shards it: every process calls it, and it costs one gathering."""
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        if not isinstance(weight, DTensor):
            return self
        whole = torch.nn.Module()
        whole.register_buffer("weight", weight.full_tensor().detach())
        whole.register_buffer("bias", bias.full_tensor().detach() if isinstance(bias, DTensor) else bias)
        return replace(self, module=whole)

    def pull_back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """d / d logits (M, V) -> d / d hidden (M, d), float64."""
        weight, _ = self._parameters()
        slope = self.scale if self.cap is None else self.scale * (1 - (logits.double() / self.cap).square())
        precise = torch.promote_types(weight.dtype, torch.float32)
        return ((gradient * slope).to(precise) @ weight.to(precise)).double()

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        assert isinstance(weight, Tensor)
        return weight[: self.vocabulary], bias[: self.vocabulary] if isinstance(bias, Tensor) else None


def output_head(model: torch.nn.Module) -> OutputHead | None:
    """The head of a causal LM; None where it has several on one hidden state (MusicGen: one for each codebook).

    Raises:
        TypeError: not a Hugging Face model, or one without an output embedding.
    """
    weights = _weights(model)
    assert isinstance(model, transformers.PreTrainedModel)
    if len(weights) > 1:
        return None
    config = model.config.get_text_config(decoder=True)
    ignored = IGNORED.get(model.config.model_type)
    factor = _first(config, FACTORS, ignored)
    divisor = _first(config, DIVISORS, ignored)
    if config.model_type in MULTIPLIES_LOGITS_SCALING:
        factor, divisor = divisor, None
    return OutputHead(
        model.get_output_embeddings(),
        scale=(factor or 1.0) / (divisor or 1.0),
        cap=_first(config, CAPS, ignored),
        vocabulary=vocabulary_size(model),
    )


def vocabulary_size(model: torch.nn.Module) -> int:
    """Width of the logits.

    Raises:
        TypeError: not a Hugging Face model, or one without an output embedding.
    """
    rows = int(_weights(model)[0].shape[0])
    assert isinstance(model, transformers.PreTrainedModel)
    unpadded = getattr(model.config.get_text_config(decoder=True), "unpadded_vocab_size", None)
    return min(rows, unpadded or rows)  # Inkling drops the logits of its padding


def _weights(model: torch.nn.Module) -> list[Tensor]:
    """Of every output embedding, at least one."""
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model: {type(model).__name__} is not a transformers model. Pass the AutoModelForCausalLM itself."
        )
    module = model.get_output_embeddings()
    heads = list(module) if isinstance(module, torch.nn.ModuleList) else [module]
    weights = [weight for head in heads if isinstance(weight := getattr(head, "weight", None), Tensor)]
    if not weights:
        raise TypeError(
            f"model: {type(model).__name__} has no LM head (get_output_embeddings() gives none), so it has no logits. "
            "Load it with AutoModelForCausalLM."
        )
    return weights


def _first(config: transformers.PretrainedConfig, names: tuple[str, ...], ignored: str | None) -> float | None:
    """The first of these fields that is set and not 0."""
    values = (getattr(config, name, None) for name in names if name != ignored)
    return next((float(value) for value in values if value), None)
