"""The models the bench trains: `tiny`, and a GPT-2 of the same size that is taught the same sums once."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import torch
import transformers

from lcogeom.models import LoadedModel, load_model
from lcogeom.training.tasks import arithmetic

MODELS = ("tiny", "gpt2")
STEPS, BATCH, LEARNING_RATE = 720, 64, 2e-3


def policy(name: str, cache: Path) -> LoadedModel:
    """A fresh model in eval mode; GPT-2 (fused attention projections, tied head) is made on its first use, in 20 s."""
    if name == "tiny":
        return load_model("tiny", device="cpu")
    folder = cache / name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
        _teach(unfinished)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(unfinished, folder)
    return load_model(str(folder), device="cpu")


def _teach(folder: Path) -> None:
    tokenizer = load_model("tiny", device="cpu").tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=len(tokenizer), n_embd=64, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50, 2 * (1 - step / STEPS))
        problems = arithmetic(BATCH, seed=step, characters=True)
        texts = [problem.prompt + problem.answer + "\n" for problem in problems]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
        starts = torch.tensor([len(problem.prompt) for problem in problems])[:, None]
        places = torch.arange(batch.input_ids.shape[1])[None]
        labels = batch.input_ids.masked_fill((places < starts) | (batch.attention_mask == 0), -100)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
