"""A tiny random model of every type in transformers' causal-LM mapping."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MAPPING: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model type -> name of its class, 189 types in transformers 5.23."""

VOCABULARY, UNPADDED = 41, 37

SMALL: dict[str, Any] = {
    # width
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "dim"], 32),
    **dict.fromkeys(["word_embed_proj_dim", "embedding_size", "input_embedding_size", "output_embedding_size"], 32),
    **dict.fromkeys(["hidden_size_global", "attention_hidden_size", "lru_width", "backbone_hidden_size"], 32),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"], 48),
    **dict.fromkeys(["ffn_hidden_size", "dff", "dim_ff", "d_inner", "feed_forward_size", "mlp_dim"], 48),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["shared_intermediate_size", "moe_shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["dense_intermediate_size", "intermediate_size_mlp", "shared_experts_intermediate_size"], 16),
    # depth
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_decoder_layers", "num_layers_per_stack", "num_blocks", "depth", "num_global_layers"], 2),
    **dict.fromkeys(["encoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_nextn_predict_layers"], 0),
    # heads
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "swa_num_attention_heads", "linear_num_heads"], 4),
    **dict.fromkeys(["linear_num_value_heads", "mamba_num_heads", "index_n_heads", "mamba_n_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["linear_num_key_heads", "n_mamba_heads"], 2),
    **dict.fromkeys(["head_dim", "dim_head", "d_head", "d_kv", "attention_head_size", "swa_head_dim"], 8),
    **dict.fromkeys(["linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim"], 8),
    **dict.fromkeys(["v_head_dim", "qk_nope_head_dim", "kv_channels", "global_head_dim"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim"], 4),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank", "adapter_rank"], 8),
    # experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    # state spaces and convolutions
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state"], 8),
    **dict.fromkeys(["mamba_n_groups", "n_groups", "mamba_ngroups"], 2),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_headdim"], 16),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank"], 4),
    # vocabulary and length
    "vocab_size": VOCABULARY,
    **dict.fromkeys(["vocab_size_per_layer_input", "decoder_vocab_size"], VOCABULARY),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 64),
    **dict.fromkeys(["max_target_positions", "max_source_positions", "model_max_length"], 64),
    **dict.fromkeys(["sliding_window", "attention_window_size", "sliding_window_size", "window_size"], 8),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size", "attention_chunk_size", "local_attention"], 8),
    **dict.fromkeys(["pad_token_id"], 0),
    **dict.fromkeys(["bos_token_id", "cls_token_id", "decoder_start_token_id"], 1),
    **dict.fromkeys(["eos_token_id", "sep_token_id", "forced_eos_token_id"], 2),
    # what a head does to its logits, none of it neutral
    **dict.fromkeys(["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"], 3.0),
    **dict.fromkeys(["logit_scale", "lm_head_multiplier"], 0.25),
    **dict.fromkeys(["logits_scaling", "logits_mup_width_multiplier"], 4.0),
    **dict.fromkeys(["lm_head_bias"], True),
    "dim_model_base": 8,
    "unpadded_vocab_size": UNPADDED,
    "is_decoder": True,  # BERT and its kin attend in both directions without it
    # Gemma 3n and 4
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}
"""What the recipe makes of a field, wherever a config has it."""

PATTERNS = ("layer_types", "mlp_layer_types", "layers_block_type")
"""Fields with one entry a layer: one layer of each kind is kept."""


SLIDING = {  # of dots3's sliding attention
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "head_dim": 12,
    "qk_nope_head_dim": 8, "v_head_dim": 4,
}  # fmt: skip
QSA = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2
}  # fmt: skip
ASSISTANT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "global_head_dim": 8, "intermediate_size": 48, "vocab_size": VOCABULARY, "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {f"swa_{name}": value for name, value in SLIDING.items()},
    "dots3_note": {f"text_config.swa_{name}": value for name, value in SLIDING.items()}
    | {
        "vision_config.adapter_in_dim": 32,
        "vision_config.adapter_out_dim": 32,
        "audio_config.adapter_out_dim": 32,
        "audio_config.adapter_input_size": 32,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": {"text_config.final_logit_softcapping": None},  # Gemma3ForConditionalGeneration does not cap
    "gemma4_assistant": {"text_config": ASSISTANT | {"model_type": "gemma4_text"}},
    "gemma4_unified_assistant": {"text_config": ASSISTANT | {"model_type": "gemma4_unified_text"}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": QSA,
    "qwen4_exp": {f"text_config.{name}": value for name, value in QSA.items()},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {  # its random numbers come from torch.seed(), which no seed repeats: none are drawn
        "is_decoder": True,
        "axial_pos_embds": False,
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "roc_bert": {"pronunciation_vocab_size": 41, "shape_vocab_size": 41},
    "xlstm": {"chunk_size": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""By model type, what the recipe does not know; a name with a dot belongs to the sub-config before it."""

DECODER_ALONE = ("musicgen", "musicgen_melody")
"""Their class takes the decoder's config, which AutoModelForCausalLM does not pick out."""

NOT_BUILT = {
    "gemma3n": "timm",  # its vision tower is a timm model; gemma3n_text is the rest
    # Its config demands that every layer shares keys, its decoder refuses a model without a layer that makes them.
    "gemma4_assistant": "layer types producing a cache",
    "gemma4_unified_assistant": "layer types producing a cache",
}
"""Types of transformers 5.23 that no small config builds, with a part of the error."""

ROWS = {"musicgen": 8, "musicgen_melody": 8}
"""Sequences in a batch where it is not 2: four codebooks of each."""


def small_config(model_type: str) -> transformers.PretrainedConfig:
    """The type's config, shrunk: one layer of each kind it has, width 32."""
    return _shrink(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def build(model_type: str, device: torch.device | str = "cpu") -> transformers.PreTrainedModel:
    """A random model of the type in float32, in training mode, with logits spread enough to be interesting."""
    config = small_config(model_type)
    torch.manual_seed(0)
    if model_type in DECODER_ALONE:
        model = getattr(transformers, MAPPING[model_type])._from_config(config.decoder, attn_implementation="eager")
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.train()


def _shrink(kind: type, overrides: dict[str, Any]) -> transformers.PretrainedConfig:
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    values = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known and "num_key_value_heads" in known:  # latent attention: a key for every query
        values["num_key_value_heads"] = values["num_attention_heads"]
    outer = {key: value for key, value in overrides.items() if "." not in key}
    if kind.sub_configs or known & set(PATTERNS):
        full = kind(**{key: value for key, value in outer.items() if key in kind.sub_configs})
        values |= _one_layer_of_each_kind(full, known)
        for name in kind.sub_configs:
            part = getattr(full, name, None)
            if part is not None and name not in outer:
                inner = {key.partition(".")[2]: v for key, v in overrides.items() if key.startswith(name + ".")}
                values[name] = _shrink(type(part), inner)
    return kind(**(values | outer))


def _one_layer_of_each_kind(full: transformers.PretrainedConfig, known: set[str]) -> dict[str, Any]:
    kinds = {name: list(dict.fromkeys(getattr(full, name, None) or [])) for name in PATTERNS if name in known}
    kinds = {name: found for name, found in kinds.items() if found}
    if not kinds:
        return {}
    count = max(2, *(len(found) for found in kinds.values()))
    patterns = {name: [found[place % len(found)] for place in range(count)] for name, found in kinds.items()}
    return patterns | ({"num_hidden_layers": count} if "num_hidden_layers" in known else {})
