"""The way from the last hidden state to the logits, and back for gradients, of a Hugging Face causal LM."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, eq=False)
class OutputHead:
    """logits = cap * tanh(scale * (W h + b) / cap); no cap where `cap` is None."""

    module: torch.nn.Module
    scale: float
    cap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, d) -> (M, V), in the head's own dtype: what the model's forward computes."""
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        assert isinstance(weight, Tensor)
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
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        slope = self.scale if self.cap is None else self.scale * (1 - (logits.double() / self.cap).square())
        precise = torch.promote_types(weight.dtype, torch.float32)
        return ((gradient * slope).to(precise) @ weight.to(precise)).double()


def output_head(model: torch.nn.Module) -> OutputHead:
    """The head of a causal LM.

    Raises:
        TypeError: not a Hugging Face model, or one without an output embedding.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model: {type(model).__name__} is not a transformers model. Pass the AutoModelForCausalLM itself."
        )
    module = model.get_output_embeddings()
    if module is None or not hasattr(module, "weight"):
        raise TypeError(
            f"model: {type(model).__name__} has no LM head (get_output_embeddings() gives none), so it has no logits. "
            "Load it with AutoModelForCausalLM."
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    return OutputHead(module, scale, getattr(config, "final_logit_softcapping", None))  # Gemma 2
