"""Settings of healthy runs that people use, beside those of the catalogue's HEALTHY: objective by objective."""

from __future__ import annotations

Kind = dict[str, object]

COMMON: tuple[Kind, ...] = (
    {"schedule": "cosine", "warmup": 3},
    {"schedule": "cosine", "learning_rate": 2e-5, "updates": 40},
    {"schedule": "linear", "warmup": 0},
    {"weight_decay": 0.01, "betas": (0.9, 0.95)},
    {"betas": (0.9, 0.99), "clip_norm": 0.3},
    {"betas": (0.8, 0.999)},
    {"prompts": 4},
    {"prompts": 16, "accumulation": 2},
    {"prompts": 16, "samples": 4},
    {"prompts": 4, "samples": 16, "reduction": "sequence"},
    {"inner_epochs": 3, "learning_rate": 5e-5},
    {"task": "addition-1", "learning_rate": 5e-5, "inner_epochs": 1},
    {"task": "addition-2"},
    {"tap": "hidden", "accumulation": 2},
    {"tap": "logits", "reduction": "sequence", "schedule": "linear"},
    {"optimizer": "sgd", "learning_rate": 3e-3, "warmup": 0},
    {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 5e-4},
    {"learning_rate": 2e-4, "warmup": 10, "schedule": "cosine"},
    {"learning_rate": 1e-5, "warmup": 0, "clip_norm": None},
)
UNCLIPPED: Kind = {"clip_low": None, "clip_high": None}
OWN: dict[str, tuple[Kind, ...]] = {
    "grpo": (
        {"options": {"clip_high": 0.28}, "reduction": "token"},
        {"options": {"beta": 0.04}},
        {"options": {"beta": 0.001}, "inner_epochs": 1, "schedule": "cosine"},
        {"options": UNCLIPPED, "inner_epochs": 1},
        {"advantages": "dr-grpo"},
        {"entropy_bonus": 0.003},
    ),
    "ppo": (
        {"options": {"dual_clip": 3.0}},
        {"options": {"clip_low": 0.1, "clip_high": 0.1}},
        {"options": UNCLIPPED},
        {"entropy_bonus": 0.01},
    ),
    "dapo": ({"advantages": "group"}, {"advantages": "group", "inner_epochs": 3, "clip_norm": None}),
    "lco-kld": ({"options": {"beta": 1.0}}, {"options": {"beta": 5.0}}, {"options": {"negative_beta_scale": 100.0}}),
    "lco-mse": ({"options": {"beta": 4.0}}, {"options": {"negative_beta_scale": 100.0}}),
    "lco-lch": ({}, {"options": {"beta": 4.0}}),
    "reinforce": ({"advantages": "rloo"}, {"entropy_bonus": 0.01}, {"advantages": "group", "tap": "hidden"}),
    "sft": ({"learning_rate": 5e-4, "warmup": 8}, {"prompts": 2, "learning_rate": 5e-5}),
}
IN_LIBRARIES: tuple[Kind, ...] = ({"learning_rate": 3e-5, "warmup": 0}, {"warmup": 8}, {"learning_rate": 5e-5})


def kinds() -> list[tuple[str, Kind]]:
    """(objective, its settings)."""
    found = [(objective, kind) for objective in OWN if objective != "dapo" for kind in COMMON]
    return [*found, *((objective, kind) for objective, own in OWN.items() for kind in own)]
