"""Where the query, key and value projections of a model lie in its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

WHOLE = {
    *("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin", "wq", "wk", "wv"),
    *("Wq", "Wk", "Wv", "project_q", "project_k", "project_v", "query_proj", "key_proj", "value_proj"),
    *("q", "k", "v"),  # xLSTM
    *("v_proj_current", "v_proj_delayed"),  # Zaya: half of the value each
    "query_key",  # Reformer's hashed attention: one for both
    "receptance",  # RWKV's query
    "q_b_proj",  # latent attention: from the latent to the heads' queries
}
FUSED = {"qkv_proj", "c_attn", "Wqkv", "W_pack"}  # q | k | v, but for INTERLEAVED_TYPES and CodeGen
INTERLEAVED = {"query_key_value"}  # [q of the group's heads, k, v] for each key/value head
INTERLEAVED_TYPES = {"minimax", "gpt_bigcode"}  # of their fused projections with as many keys as queries
CODEGEN_BLOCKS = 4  # q | v | k for each of so many devices, on however many it runs
BARE = {"q", "k", "v"}  # XLNet's are parameters of the attention itself
QUERY_EXPERTS = ["self_attention", "experts", "input_linear"]  # JetMoe: a query of each expert
NOT_ATTENTION = {"indexer", "compressor", "feed_forward"}  # DeepSeek's choice of tokens; RWKV's channel mixing


@dataclass(frozen=True)
class AttentionLayout:
    """Which rows of one weight belong to queries, keys or values."""

    sizes: tuple[int, ...] = ()
    """Rows of each part in one block; the block's other rows belong to none. Empty: the whole weight is one part."""
    blocks: int = 1
    transposed: bool = False
    """GPT-2's Conv1D: outputs are columns."""


def attention_layouts(model: torch.nn.Module) -> dict[str, AttentionLayout]:
    """The query, key and value weights of a model, by parameter name.

    In latent attention (DeepSeek) they are the projections from the latents to the heads: `q_b_proj`, and keys and
    values of `kv_b_proj`. State-space layers have none.
    """
    config = model.config.get_text_config(decoder=True) if isinstance(model, transformers.PreTrainedModel) else None
    modules = dict(model.named_modules())
    layouts: dict[str, AttentionLayout] = {}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        path = [part for part in name.split(".") if part not in ("weight", "linear")]  # Moshi: q_proj.linear.weight
        if parameter.ndim < 2 or NOT_ATTENTION.intersection(path):
            continue
        if path[-1] in (WHOLE if last == "weight" else BARE) or path[-3:] == QUERY_EXPERTS:
            layouts[name] = AttentionLayout()
        elif last == "weight" and parameter.ndim == 2 and config is not None:
            transposed = isinstance(modules[owner], transformers.pytorch_utils.Conv1D)
            rows = parameter.shape[1 if transposed else 0]
            holder, _, kind = owner.rpartition(".")
            found = _of_layer(kind, modules[holder], rows, config) or _fused(kind, rows, config)
            if found is not None:
                layouts[name] = AttentionLayout(*found, transposed)
    return layouts


def split_attention(gradient: Tensor, layout: AttentionLayout) -> list[Tensor]:
    """The query, key and value parts of a projection's gradient."""
    if not layout.sizes:
        return [gradient]
    rows = gradient.T if layout.transposed else gradient
    blocks = rows.reshape(layout.blocks, -1, rows.shape[1])
    rest = blocks.shape[1] - sum(layout.sizes)
    return list(blocks.split([*layout.sizes, rest], dim=1)[: len(layout.sizes)])


Parts = tuple[tuple[int, ...], int]
"""(sizes, blocks) of an AttentionLayout."""


def _of_layer(kind: str, layer: torch.nn.Module, rows: int, config: transformers.PretrainedConfig) -> Parts | None:
    """Of a projection called `kind` whose parts the layer's own attributes tell: they may differ between layers."""
    if kind == "kv_b_proj":
        sizes = (_size(layer, "qk_nope_head_dim"), _size(layer, "v_head_dim"))
        return sizes, rows // sum(sizes)
    if kind in ("in_proj_qkv", "in_proj_qkvz"):  # gated delta nets; with z, for each key head
        blocks = _size(layer, "num_k_heads") if kind == "in_proj_qkvz" else 1
        key, value = _size(layer, "key_dim") // blocks, _size(layer, "value_dim") // blocks
        return (key, key, value), blocks
    if kind == "q_gate_proj":  # AXK2: each head's query, then its gate
        heads = _size(layer, "num_heads")
        return (_size(layer, "qk_head_dim"),), heads
    if kind == "kv_proj" and config.model_type == "jetmoe":
        return (rows // 2, rows // 2), 1
    if kind == "kv_proj" and config.model_type == "deepseek_v4":  # one head, which is key and value
        return (rows,), 1
    return None


def _fused(kind: str, rows: int, config: transformers.PretrainedConfig) -> Parts | None:
    """Of a projection to queries, keys and values."""
    if kind not in FUSED | INTERLEAVED:
        return None
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    groups = _key_value_heads(config, heads)
    if kind == "qkv_proj" and config.model_type == "codegen":
        return (rows // 3 // CODEGEN_BLOCKS,) * 3, CODEGEN_BLOCKS
    if rows == 3 * heads * size and config.model_type in INTERLEAVED_TYPES:
        return (size, size, size), heads
    if rows != (heads + 2 * groups) * size:  # cross-attention's key and value
        return None
    if kind in INTERLEAVED:
        return (heads // groups * size, size, size), groups
    return (heads * size, groups * size, groups * size), 1


def _size(module: torch.nn.Module, name: str) -> int:
    return int(getattr(module, name))


def _key_value_heads(config: transformers.PretrainedConfig, heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1  # Falcon-7B, GPT-BigCode
    return int(getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads)
