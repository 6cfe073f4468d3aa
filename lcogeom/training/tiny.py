"""Train the `tiny` model that ships with the package: a 133k-parameter Llama over characters that adds, badly.

    python -m lcogeom.training.tiny OUT_FOLDER        (half a minute on 2 cores)

It stops early on purpose: right about half of the time, its samples hold both rewards, which is what policy
optimisation needs. The prompts are those of `arithmetic(characters=True)`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import track

from lcogeom.training.rollout import generate
from lcogeom.training.tasks import arithmetic

CHARACTERS = "0123456789+-*= \n"
STEPS = 600
BATCH = 128
LEARNING_RATE = 1e-3
HELD_OUT_SEED = 1_000_003


def character_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a character; the line break ends a text."""
    special = ["<pad>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *CHARACTERS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="\n", clean_up_tokenization_spaces=False
    )


def tiny_config(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.LlamaConfig:
    """Two layers of width 64, untied head."""
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )


def train(out: Path, steps: int = STEPS, seed: int = 0) -> float:
    """Supervised training on random problems; saves model and tokenizer, returns the sampled accuracy."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    model = transformers.LlamaForCausalLM(tiny_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    for step in track(range(steps), "training", console=Console(stderr=True)):
        problems = arithmetic(BATCH, seed=seed * steps + step, characters=True)
        texts = [problem.prompt + problem.answer + "\n" for problem in problems]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
        starts = torch.tensor([len(problem.prompt) for problem in problems])[:, None]
        places = torch.arange(batch.input_ids.shape[1])[None]
        labels = batch.input_ids.masked_fill((places < starts) | (batch.attention_mask == 0), -100)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    held_out = arithmetic(1000, seed=HELD_OUT_SEED, characters=True)
    samples = generate(model.eval(), tokenizer, held_out, max_new_tokens=5, seed=0, stop="\n")
    return sum(sample.reward for sample in samples) / len(samples)


if __name__ == "__main__":
    print(f"sampled accuracy on 1,000 problems: {train(Path(sys.argv[1])):.3f}")
