"""From what a trainer holds to what the recorder reads: the causal LM and the optimiser inside their wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from lcogeom.recording.taps import TapError

COMPILED = (
    "model: it is compiled already, and hooks registered after torch.compile never fire. Call "
    "lcogeom.attach(model, ...) first, then torch.compile(model)."
)
DEEPSPEED = (
    "DeepSpeed keeps gradients in buffers of its own (param.grad stays None), so the recorder has nothing to read. "
    "Train this run with DDP or FSDP2, or log log-probabilities and advantages and run `lcogeom audit` on them."
)


def unwrap_model(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model whose forward runs: out of DistributedDataParallel and PEFT. FSDP2 shards in place.

    Raises:
        TapError: compiled already.
        TypeError: a wrapper that hides the gradients (DeepSpeed, FSDP1, DataParallel), PEFT's prompt learning, or an
            adapter on the LM head.
    """
    while True:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise TapError(COMPILED)
        if _comes_from("deepspeed", model):
            raise TypeError(f"model: {DEEPSPEED}")
        if isinstance(model, FullyShardedDataParallel):
            raise TypeError(
                "model: FSDP1 flattens parameters, so that layers cannot be told apart. Shard with FSDP2 "
                "(torch.distributed.fsdp.fully_shard; in Accelerate, fsdp_version: 2)."
            )
        if isinstance(model, torch.nn.DataParallel):
            raise TypeError(
                "model: DataParallel runs copies of the model, which carry no hooks. Use DistributedDataParallel "
                "(torchrun), or show one GPU only (CUDA_VISIBLE_DEVICES=0)."
            )
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif _comes_from("peft", model) and hasattr(model, "get_base_model"):
            wrapped: Any = model
            if getattr(wrapped.active_peft_config, "is_prompt_learning", False):
                raise TypeError(
                    "model: PEFT's prompt learning puts virtual tokens before the input, and what it trains lies "
                    "outside the causal LM. The recorder reads adapters inside the model, such as LoRA."
                )
            model = wrapped.get_base_model()
        else:
            break
    base = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    if getattr(base, "_compiled_call_impl", None) is not None or hasattr(base, "_orig_mod"):
        raise TapError(COMPILED)
    return model


def require_plain_head(model: Any) -> None:
    """The LM head's weight is all that makes logits of hidden states; a copy that PEFT trains (modules_to_save) is.

    Raises:
        TypeError: an adapter adds to it.
    """
    head = model.get_output_embeddings()
    if _comes_from("peft", head) and not hasattr(head, "modules_to_save"):
        raise TypeError(
            f"model: PEFT put an adapter ({type(head).__module__}.{type(head).__name__}) on the LM head, which then is "
            "not its weight alone. Use tap='logits', leave the head out of target_modules, or train it whole "
            "(modules_to_save=['lm_head'])."
        )


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser whose step() makes the updates, out of Accelerate's wrapper.

    Raises:
        TypeError: DeepSpeed's.
    """
    while True:
        if _comes_from("deepspeed", optimizer) or type(optimizer).__name__ == "DeepSpeedOptimizerWrapper":
            raise TypeError(f"optimizer: {DEEPSPEED}")
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            return optimizer
        optimizer = inner


def _comes_from(package: str, thing: object) -> bool:
    """Whether a class of the package stands among the thing's own; the package need not be installed."""
    return any(kind.__module__.split(".")[0] == package for kind in type(thing).__mro__)
