"""Runs by name: what `lcogeom train PRESET` starts from. Any field can be set otherwise on the command line.

"Reconstructed" marks what no source at hand tells (systems.md 1.4 and 2.5 say what they do): it is a choice of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lcogeom.training.settings import TrainSettings


@dataclass(frozen=True)
class Preset:
    description: str
    settings: TrainSettings


# One rollout gives two updates on the whole batch, so that ratios move and LCO's target is one to go to.
TINY = TrainSettings(model="tiny", task="addition-1", prompts=16, samples=8, max_new_tokens=5, inner_epochs=2)
SMOLLM2 = TrainSettings(
    model="smollm2",
    task="products",
    prompts=8,
    samples=8,
    max_new_tokens=6,
    stop="\n",
    learning_rate=1e-5,
    updates=20,
    evaluate_every=5,
    held_out=16,
)
MATH = TrainSettings(
    model="Qwen/Qwen2.5-3B",
    task="DigitalLearningGmbH/MATH-lighteval",
    template="{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n",
    held_out=500,
    prompts=16,
    samples=8,
    max_new_tokens=1024,
    generation_batch=64,
    inner_epochs=1,
    mini_batches=4,
    micro_batches=8,
    learning_rate=1e-5,
    updates=400,
    evaluate_every=40,
    checkpoint_every=40,
    dtype="bfloat16",
    gradient_checkpointing=True,
)
CAPO = replace(
    MATH,
    model="Qwen/Qwen2.5-Math-7B",
    objective="grpo",
    objective_options={"beta": 0.0},
    advantages="group",
    reduction="sequence",
    mini_batches=1,
    schedule="cosine",
    warmup=0.1,
)

GRPO: dict[str, Any] = {
    "objective": "grpo",
    "objective_options": {"beta": 0.0},
    "advantages": "group",
    "reduction": "sequence",
}
PPO: dict[str, Any] = {"objective": "ppo", "advantages": "gae", "whiten": True, "reduction": "token"}
REINFORCE: dict[str, Any] = {"objective": "reinforce", "advantages": "reinforce-mean", "reduction": "token"}
SFT: dict[str, Any] = {"objective": "sft", "advantages": "none", "completions": "gold", "reduction": "token"}


def lco(form: str, **options: object) -> dict[str, Any]:
    """The paper's sparse setting: A = +1 for a right answer and -1 for a wrong one at every token. [systems.md 1.2]"""
    return {
        "objective": f"lco-{form}",
        "objective_options": {"beta": 2.0, **options},
        "advantages": "rule",
        "reduction": "token",
    }


def authors(form: str) -> dict[str, Any]:
    """Their code's: beta is 100 times as large for wrong answers, MSE and log-cosh aim at the current logits, KLD at a
    top-5 old policy; MSE has no 1/2, which is half of beta... see `lco_mse`. [systems.md 1.2, 18]
    """
    options: dict[str, object] = {"negative_beta_scale": 100.0}
    if form == "kld":
        return lco(form, **options) | {"old_policy": "topk", "old_k": 5}
    return lco(form, target="current", **options)
