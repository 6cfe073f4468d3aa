"""The fourth series' healthy runs: settings that people use, of which none is in HEALTHY or in the third series."""

from __future__ import annotations

Kind = dict[str, object]

COMMON: tuple[Kind, ...] = (
    {"schedule": "cosine", "warmup": 0, "learning_rate": 5e-5},
    {"schedule": "linear", "warmup": 8, "weight_decay": 0.01},
    {"betas": (0.9, 0.98)},
    {"betas": (0.95, 0.999), "warmup": 8},
    {"clip_norm": 0.5, "accumulation": 8},
    {"clip_norm": 0.1},
    {"clip_norm": 5.0, "inner_epochs": 1, "learning_rate": 5e-5},
    {"prompts": 4, "samples": 16, "learning_rate": 5e-5},
    {"prompts": 12, "accumulation": 3},
    {"prompts": 24, "samples": 4, "reduction": "sequence"},
    {"samples": 12, "schedule": "linear"},
    {"max_new_tokens": 8},
    {"max_new_tokens": 12, "reduction": "sequence", "inner_epochs": 1},
    {"weight_decay": 0.05, "schedule": "cosine"},
    {"inner_epochs": 3, "learning_rate": 3e-5, "reduction": "sequence"},
    {"inner_epochs": 6, "learning_rate": 2e-5, "updates": 30},
    {"task": "addition-2", "inner_epochs": 1, "schedule": "linear"},
    {"task": "addition-1", "prompts": 4, "samples": 12, "learning_rate": 7e-5},
    {"tap": "logits", "accumulation": 2, "weight_decay": 0.1},
    {"told": False, "learning_rate": 5e-5},
)
OWN: dict[str, tuple[Kind, ...]] = {
    "grpo": (
        {"options": {"beta": 0.01}, "schedule": "cosine"},
        {"options": {"clip_low": 0.1, "clip_high": 0.3}, "prompts": 12},
        {"advantages": "rloo", "inner_epochs": 1},
        {"advantages": "dr-grpo", "reduction": "sequence", "learning_rate": 5e-5},
        {"entropy_bonus": 0.001, "accumulation": 2},
    ),
    "ppo": (
        {"options": {"clip_low": 0.3, "clip_high": 0.3}, "inner_epochs": 3, "learning_rate": 5e-5},
        {"advantages": "group", "clip_norm": 0.5},
        {"advantages": "rloo", "schedule": "linear"},
    ),
    "dapo": ({"advantages": "group", "schedule": "cosine"}, {"advantages": "group", "prompts": 16, "accumulation": 2}),
    "lco-kld": ({"options": {"beta": 3.0}, "schedule": "cosine"}, {"options": {"beta": 2.0}, "prompts": 16}),
    "lco-mse": ({"options": {"beta": 3.0}, "prompts": 12},),
    "lco-lch": ({"options": {"beta": 3.0}, "schedule": "linear"},),
    "reinforce": ({"advantages": "rloo", "prompts": 16}, {"entropy_bonus": 0.003, "schedule": "cosine"}),
    "sft": ({"learning_rate": 3e-4, "schedule": "cosine"}, {"prompts": 1, "learning_rate": 3e-5}),
}
IN_LIBRARIES: tuple[Kind, ...] = ({"learning_rate": 2e-5, "warmup": 6}, {"learning_rate": 7e-5, "warmup": 2})


def kinds() -> list[tuple[str, Kind]]:
    """(objective, its settings)."""
    rl = ("grpo", "ppo", "lco-kld", "lco-mse", "reinforce", "sft")
    own_rate: dict[str, Kind] = {"lco-mse": {"learning_rate": 3e-5}}  # at 1e-4 its reward falls, slowly
    found = [
        (objective, {**own_rate.get(objective, {}), **kind})
        for objective in rl
        for kind in COMMON
        if not (objective == "sft" and "told" in kind)
    ]
    return [*found, *((objective, kind) for objective, own in OWN.items() for kind in own)]
