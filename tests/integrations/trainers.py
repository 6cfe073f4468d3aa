"""Real trainers on `tiny`, small enough for a second each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
import transformers
import trl

from lcogeom.models import LoadedModel, load_model

COMMON = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "seed": 0,
}
PROMPTS = ["1+3=", "3+4=", "5+1=", "7+8=", "2*3=", "9-4=", "6+6=", "8-1="]
ANSWERS = ["4", "7", "6", "15", "6", "5", "12", "7"]
LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_alpha=8)
HEAD_TOO = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])


def reward(completions: Sequence[str], **_: Any) -> list[float]:
    """Different for different completions, so that no group is without advantages for long."""
    return [sum(ord(c) for c in text) % 17 + 0.1 * len(text) for text in completions]


def tiny(adapter: peft.LoraConfig | None = None) -> LoadedModel:
    loaded = load_model("tiny", device="cpu")
    if adapter is None:
        return loaded
    transformers.set_seed(0)
    return LoadedModel("tiny", peft.get_peft_model(loaded.model, adapter), loaded.tokenizer)


def plain(folder: Path, updates: int, adapter: peft.LoraConfig | None = None, **options: Any) -> transformers.Trainer:
    loaded = tiny(adapter)
    rows = [loaded.tokenizer(p + a + "\n", return_token_type_ids=False) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        row["labels"] = [-100] * len(prompt) + row["input_ids"][len(prompt) :]
    callbacks = options.pop("callbacks", None)
    args = transformers.TrainingArguments(output_dir=str(folder), max_steps=updates, **settings(options))
    return transformers.Trainer(
        model=loaded.model,
        args=args,
        train_dataset=datasets.Dataset.from_list([dict(row) for row in rows]),
        data_collator=transformers.DataCollatorForSeq2Seq(loaded.tokenizer),
        processing_class=loaded.tokenizer,
        callbacks=callbacks,
    )


def sft(folder: Path, updates: int, adapter: peft.LoraConfig | None = None, **options: Any) -> transformers.Trainer:
    loaded = tiny(adapter)
    rows = [{"prompt": p, "completion": a + "\n"} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    callbacks = options.pop("callbacks", None)
    args = trl.SFTConfig(output_dir=str(folder), max_steps=updates, **settings(options))
    return trl.SFTTrainer(
        model=loaded.model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=loaded.tokenizer,
        callbacks=callbacks,
    )


def dpo(folder: Path, updates: int, adapter: peft.LoraConfig | None = None, **options: Any) -> transformers.Trainer:
    loaded = tiny(adapter)
    rows = [
        {"prompt": p, "chosen": a + "\n", "rejected": "99" + a[::-1] + "\n"}
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    callbacks = options.pop("callbacks", None)
    args = trl.DPOConfig(output_dir=str(folder), max_steps=updates, **settings(options))
    return trl.DPOTrainer(
        model=loaded.model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=loaded.tokenizer,
        callbacks=callbacks,
    )


def rloo(folder: Path, updates: int, adapter: peft.LoraConfig | None = None, **options: Any) -> transformers.Trainer:
    return _sampled((trl.RLOOTrainer, trl.RLOOConfig), folder, updates, adapter, options)


def grpo(folder: Path, updates: int, adapter: peft.LoraConfig | None = None, **options: Any) -> transformers.Trainer:
    return _sampled((trl.GRPOTrainer, trl.GRPOConfig), folder, updates, adapter, options)


def _sampled(
    kinds: tuple[type, type], folder: Path, updates: int, adapter: peft.LoraConfig | None, options: dict[str, Any]
) -> transformers.Trainer:
    trainer, config = kinds
    loaded = tiny(adapter)
    callbacks = options.pop("callbacks", None)
    defaults = {"num_generations": 4, "max_completion_length": 5}
    args = config(output_dir=str(folder), max_steps=updates, **settings(defaults | options))
    return trainer(  # type: ignore[no-any-return]
        model=loaded.model,
        reward_funcs=reward,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=loaded.tokenizer,
        callbacks=callbacks,
    )


def settings(options: dict[str, Any]) -> dict[str, Any]:
    return {**COMMON, "use_cpu": True, "bf16": False, **options}


def run(trainer: transformers.Trainer) -> transformers.Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own, about its own names
        trainer.train()
    return trainer


MAKERS: dict[str, Callable[..., transformers.Trainer]] = {
    "Trainer": plain,
    "SFTTrainer": sft,
    "DPOTrainer": dpo,
    "RLOOTrainer": rloo,
    "GRPOTrainer": grpo,
}
