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
TINY = TrainSettings(
    model="tiny", task="addition-1", prompts=16, samples=8, max_new_tokens=5, inner_epochs=2, held_out_samples=10
)
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
    held_out_samples=4,
)
MATH = TrainSettings(
    model="Qwen/Qwen2.5-3B",
    task="DigitalLearningGmbH/MATH-lighteval",
    held_out=500,
    prompts=16,
    samples=8,
    max_new_tokens=1024,
    generation_batch=64,
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
    """Their code's: beta 100 times as large for wrong answers; KLD towards a top-5 old policy, MSE and log-cosh towards
    the current logits; MSE without 1/2. [systems.md 1.2, 18]
    """
    options: dict[str, object] = {"negative_beta_scale": 100.0}
    if form == "kld":
        return lco(form, **options) | {"old_policy": "topk", "old_k": 5}
    return lco(form, target="current", **options) | {"loss_factor": 2.0 if form == "mse" else 1.0}


KNOWN = "lr 1e-5 and beta 2 are the authors'; batch, lengths and number of updates reconstructed"
ADDITION, PRODUCTS = "one-digit addition, seconds on a CPU", "SmolLM2-135M, one-digit products, minutes on a CPU"
FAST: dict[str, Any] = {
    "learning_rate": 1.5e-5,
    "prompts": 12,
    "micro_batches": 24,
    "updates": 100,
    "evaluate_every": 10,
}
SLOW: dict[str, Any] = {"learning_rate": 3e-6, "prompts": 144, "micro_batches": 288, "updates": 52, "evaluate_every": 4}
TOP_50: dict[str, Any] = {"top_k": 50}  # the published code's, which samples from 50 as well
DR_GRPO: dict[str, Any] = {
    "objective": "dr-grpo",
    "objective_options": {},
    "advantages": "dr-grpo",
    "reduction": "constant",
}
PLAIN_REINFORCE: dict[str, Any] = {"objective": "reinforce", "objective_options": {}, "advantages": "reinforce"}

PRESETS: Mapping[str, Preset] = {
    "tiny-sft": Preset(f"SFT; {ADDITION}", replace(TINY, **SFT)),
    "tiny-reinforce": Preset(f"REINFORCE, mean reward as baseline; {ADDITION}", replace(TINY, **REINFORCE)),
    "tiny-ppo": Preset(f"PPO with a critic; {ADDITION}", replace(TINY, **PPO, lam=0.95, critic_learning_rate=1e-3)),
    "tiny-grpo": Preset(f"GRPO; {ADDITION}", replace(TINY, **GRPO)),
    "tiny-lco-kld": Preset(f"LCO-KLD; {ADDITION}", replace(TINY, **lco("kld"))),
    "tiny-lco-mse": Preset(f"LCO-MSE; {ADDITION}", replace(TINY, **lco("mse"))),
    "tiny-lco-lch": Preset(f"LCO-LCH; {ADDITION}", replace(TINY, **lco("lch"))),
    "smollm2-grpo": Preset(f"GRPO; {PRODUCTS}", replace(SMOLLM2, **GRPO)),
    "smollm2-lco-kld": Preset(f"LCO-KLD; {PRODUCTS}", replace(SMOLLM2, **lco("kld"))),
    "smollm2-ppo": Preset(f"PPO with a critic; {PRODUCTS}", replace(SMOLLM2, **PPO, critic_learning_rate=1e-5)),
    "smollm2-sft": Preset(f"SFT; {PRODUCTS}", replace(SMOLLM2, **SFT)),
    "qwen2.5-3b-math-lco-kld": Preset(f"LCO-KLD as the paper writes it; {KNOWN}", replace(MATH, **lco("kld"))),
    "qwen2.5-3b-math-lco-mse": Preset(f"LCO-MSE as the paper writes it; {KNOWN}", replace(MATH, **lco("mse"))),
    "qwen2.5-3b-math-lco-lch": Preset(f"LCO-LCH as the paper writes it; {KNOWN}", replace(MATH, **lco("lch"))),
    "qwen2.5-3b-math-lco-kld-authors": Preset(
        f"their code: beta x 100 where A < 0, and an old policy cut to its top 5 logits in fp16; {KNOWN}",
        replace(MATH, **authors("kld")),
    ),
    "qwen2.5-3b-math-lco-mse-authors": Preset(
        f"their code: beta x 100 where A < 0, a target that moves with the current logits, no 1/2; {KNOWN}",
        replace(MATH, **authors("mse")),
    ),
    "qwen2.5-3b-math-lco-lch-authors": Preset(
        f"their code: beta x 100 where A < 0, a target that moves with the current logits; {KNOWN}",
        replace(MATH, **authors("lch")),
    ),
    "qwen2.5-3b-math-ppo": Preset(
        "PPO with a critic; gamma .9, lambda .8 and clip .2 are the authors'; the rest reconstructed",
        replace(MATH, **PPO, gamma=0.9, lam=0.8, critic_learning_rate=1e-5),
    ),
    "qwen2.5-3b-math-grpo": Preset(
        "GRPO; clip .2 and k3 weight .01 are the authors'; the rest reconstructed",
        replace(MATH, **GRPO | {"objective_options": {"beta": 0.01}}),
    ),
    "qwen2.5-3b-math-sft": Preset("SFT on the data's own solutions; reconstructed", replace(MATH, **SFT)),
    "grpo-aggressive": Preset(
        "CAPO's baseline, Qwen2.5-Math-7B: lr 1.5e-5, 96 completions an update", replace(CAPO, **FAST)
    ),
    "grpo-conservative": Preset(
        "CAPO's baseline, Qwen2.5-Math-7B: lr 3e-6, 1152 completions an update", replace(CAPO, **SLOW)
    ),
    "capo-aggressive": Preset(
        "CAPO on GRPO: lr 1.5e-5, 96 completions an update; |m_H| < .01, m_F < 1e-4",
        replace(CAPO, **FAST, intervention="capo", intervention_options=TOP_50),
    ),
    "capo-conservative": Preset(
        "CAPO on GRPO: lr 3e-6, 1152 completions an update; |m_H| < .01, m_F < 1e-4",
        replace(CAPO, **SLOW, intervention="capo", intervention_options=TOP_50),
    ),
    "dr-capo-aggressive": Preset(
        "Dr.CAPO on Dr. GRPO: |m_H| < 5e-4, m_F < 1e-3",
        replace(CAPO, **FAST | DR_GRPO, intervention="dr-capo", intervention_options=TOP_50),
    ),
    "rein-capo-aggressive": Preset(
        "ReinCAPO on REINFORCE without a baseline: |m_H| < .1, m_F < 1e-5",
        replace(CAPO, **FAST | PLAIN_REINFORCE, intervention="rein-capo", intervention_options=TOP_50),
    ),
}


def preset(name: str) -> TrainSettings:
    """The settings of a preset.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"preset: no preset {name!r}.{hint} There are: {', '.join(PRESETS)}.")
    return PRESETS[name].settings
