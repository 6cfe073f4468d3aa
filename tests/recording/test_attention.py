"""The rows of a fused projection that are called query, key or value are what the model uses as such.

The oracle is the model: without queries, as without keys, attention weighs every position alike; without values,
attention returns nothing, as it does without all three.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor

from lcogeom.recording.attention import AttentionLayout, attention_layouts, split_attention
from tests.architectures import MAPPING, NOT_BUILT, build, small_config

STATE_SPACE = {"mamba", "mamba2", "falcon_mamba"}

SOFTMAX = [
    "bloom", "codegen", "dbrx", "falcon", "falcon-grouped", "falcon-per-head", "fuyu", "gpt2", "gpt_bigcode",
    "gpt_bigcode-per-head", "gpt_neox", "gpt_neox_japanese", "mpt", "openai-gpt", "persimmon", "phi3",
]  # fmt: skip
LATENT = ["axk1", "deepseek_v2", "deepseek_v3", "dots3_note_text", "glm4_moe_lite", "minicpm3", "youtu"]
LINEAR = ["minimax", "qwen3_5_text", "qwen3_next", "qwen4_exp_text"]
VARIANTS = {
    "falcon-grouped": {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
    "falcon-per-head": {"num_kv_heads": 4, "multi_query": False},
    "gpt_bigcode-per-head": {"multi_query": False},
}


def model_of(name: str) -> transformers.PreTrainedModel:
    """In eval mode, without the biases of its fused projections."""
    if name in VARIANTS:
        config = small_config(name.partition("-")[0])
        for field, value in VARIANTS[name].items():
            setattr(config, field, value)
        config = type(config).from_dict(config.to_dict())
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            parameter.data.mul_(4.0 if parameter.ndim == 2 else 1.0)
    else:
        model = build(name)
    for layout in fused(model):
        bias = dict(model.named_parameters()).get(layout.removesuffix("weight") + "bias")
        if bias is not None:
            bias.data.zero_()
    return model.eval()


def fused(model: transformers.PreTrainedModel) -> dict[str, AttentionLayout]:
    return {name: layout for name, layout in attention_layouts(model).items() if len(layout.sizes) > 1}


def logits_without(model: transformers.PreTrainedModel, which: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
    """The model's logits with some parts of all its fused projections set to zero; afterwards it is as it was."""
    weights = dict(model.named_parameters())
    layouts = fused(model)
    kept = {name: weights[name].detach().clone() for name in layouts}
    with torch.no_grad():
        for name, layout in layouts.items():
            for part in which(split_attention(weights[name].data, layout)):
                part.zero_()
        ids = torch.arange(3, 27).view(2, 12)
        found = model(input_ids=ids, use_cache=False).logits
        for name, weight in kept.items():
            weights[name].copy_(weight)
    return found


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOFTMAX)
def test_queries_keys_and_values(name: str) -> None:
    model = model_of(name)
    assert fused(model)
    nothing = logits_without(model, lambda parts: parts)
    without = [logits_without(model, lambda parts, part=part: [parts[part]]) for part in range(3)]
    value = 1 if name == "codegen" else 2
    query, key = (part for part in range(3) if part != value)
    assert same(without[value], nothing)
    assert same(without[query], without[key])
    assert not same(without[query], nothing)
    assert not same(without[query], logits_without(model, lambda _: []))


@pytest.mark.parametrize("name", LATENT)
def test_keys_and_values_of_latent_attention(name: str) -> None:
    model = model_of(name)
    assert all(len(layout.sizes) == 2 for layout in fused(model).values())
    nothing = logits_without(model, lambda parts: parts)
    assert same(logits_without(model, lambda parts: parts[1:]), nothing)
    assert not same(logits_without(model, lambda parts: parts[:1]), nothing)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_attention(name: str) -> None:
    """Its state is a sum of products of keys and values: without any of the three nothing is left."""
    model = model_of(name)
    nothing = logits_without(model, lambda parts: parts)
    assert not same(nothing, logits_without(model, lambda _: []))
    for part in range(3):
        assert same(logits_without(model, lambda parts, part=part: [parts[part]]), nothing)


@pytest.mark.parametrize("model_type", sorted(set(MAPPING) - set(NOT_BUILT)))
def test_every_type_but_the_state_spaces_has_all_three(model_type: str) -> None:
    """Parts whose names or layouts say query, key and value; shapes that fit."""
    model = build(model_type)
    layouts = attention_layouts(model)
    assert bool(layouts) == (model_type not in STATE_SPACE)
    weights = dict(model.named_parameters())
    parts = sum(len(layout.sizes) or 1 for layout in layouts.values())
    assert parts == 0 or parts >= 3
    for name, layout in layouts.items():
        split = split_attention(weights[name], layout)
        assert all(part.numel() for part in split)
        assert sum(part.numel() for part in split) <= weights[name].numel()
        assert not any(word in name for word in ("indexer", "mlp", "feed_forward"))
