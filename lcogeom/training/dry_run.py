"""A preset's code path in seconds: a tiny model of its architecture, a small task, two updates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import transformers

from lcogeom.models import load_model
from lcogeom.training.settings import TrainSettings

UPDATES = 2
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


def dry_run(settings: TrainSettings, folder: Path) -> TrainSettings:
    """The same settings for a small model, which is saved in `folder`, and a task that needs no download.

    The model has the weights of `tiny`: for presets of a Qwen2 model as a Qwen2 (its biases 0), else as the Llama it
    is. So rewards differ, and gradients are not 0. Batches, lengths and epochs shrink; objective, advantages,
    reduction, intervention, precision and the way batches are cut stay.
    """
    tiny = load_model("tiny", device="cpu")
    model = tiny.model
    if "qwen" in settings.model.lower():
        shape = {name: getattr(model.config, name) for name in SHAPE}
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
        missing, unexpected = model.load_state_dict(tiny.model.state_dict(), strict=False)
        assert not unexpected
        for name in missing:
            torch.nn.init.zeros_(model.get_parameter(name))
    model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    mini = 1 if settings.mini_batches == 1 else 2
    micro = 1 if settings.micro_batches == 1 else 2
    samples = max(2, min(settings.samples, 4))
    return replace(
        settings,
        model=str(folder),
        task="addition-1",
        template=None,
        stop=None,
        held_out=4,
        prompts=4,
        samples=samples,
        max_new_tokens=min(settings.max_new_tokens, 4),
        overlong_buffer=min(settings.overlong_buffer, 2),
        dynamic_sampling=min(settings.dynamic_sampling, 1),
        generation_batch=None if settings.generation_batch is None else samples,
        advantage_model=None if settings.advantage_model is None else str(folder),
        advantage_k=min(settings.advantage_k, len(tiny.tokenizer)),
        mini_batches=mini,
        micro_batches=micro,
        inner_epochs=1 if mini == 2 else min(settings.inner_epochs, 2),
        updates=UPDATES,
        evaluate_every=UPDATES,
        checkpoint_every=0,
    )
