"""Run folders written from formulas: a GRPO loop with two updates a rollout whose every number is what theory says.

A fault changes the numbers it would change, and no others, so that what a rule must find is known.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lcogeom.runs import RunWriter

UPDATES, SEQUENCES, LENGTH, VOCABULARY = 24, 16, 6, 16
LAYERS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
META = {
    "labels": {},
    "objective": {"name": "grpo", "options": {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.0}},
    "optimizer": "AdamW",
    "optimizer_options": {"betas": "(0.9, 0.999)", "eps": 1e-8},
    "weights": {"float32": 100_000},
    "vocabulary": VOCABULARY,
    "temperature": 1.0,
}
Columns = dict[str, Any]
Fault = Callable[[int, Columns, Columns, Columns], None]
"""(update, its tokens, its row of `updates`, its rows of `norms`): changes them in place, before what follows from them
(f', norms, ratios) is computed."""


def write(path: Path, fault: Fault | None = None, *, seed: int = 0, updates: int = UPDATES, **meta: Any) -> Path:
    """A run folder. The fault changes advantages, old log-probabilities, weights in the loss, norms and so on."""
    rng = np.random.default_rng(seed)
    writer = RunWriter(path, META | meta)
    rollout: Columns = {}
    for update in range(updates):
        if update % 2 == 0:
            rollout = sample(rng)
        tokens = {name: np.array(column) for name, column in rollout.items()}
        if update % 2:  # the policy has moved a little, as the advantages want it
            moved = 0.02 * tokens["advantage"] + 0.02 * rng.normal(size=len(tokens["logprob"]))
            tokens["logprob"] = np.minimum(tokens["logprob"] + moved, -1e-6)
        row: Columns = {
            "step": update,
            "loss": 0.01 * rng.normal(),
            "learning_rate": 1e-4 * min(1.0, (update + 1) / 4),
            "weight_norm": 20.0,
            "moved_between": 0.0,
            "step_undone": 0.0,
            "logsumexp": 9.0 + 0.1 * rng.normal(),
            "reward": 0.5 + 0.05 * rng.normal(),
            "outside_share": 0.0,
            "loss_factor": 1.0,
            "gradient_scale": 100 * np.exp(0.3 * rng.normal()),
        }
        norms: Columns = {
            "share": np.array([0.6, 0.6, 0.5, 0.05, 0.15]) * np.exp(0.1 * rng.normal(size=len(LAYERS))),
            "weight_norm": np.array([4.0, 12.0, 12.0, 8.0, 5.0]),
            "received": np.ones(len(LAYERS)),
            "moved_between": np.zeros(len(LAYERS)),
        }
        if fault is not None:
            fault(update, tokens, row, norms)
        _finish(update, tokens, row, norms)
        writer.add("tokens", tokens | {"step": [update] * len(tokens["token_id"])})
        writer.add("norms", norms | {"step": [update] * len(LAYERS), "scope": ["layer"] * len(LAYERS), "name": LAYERS})
        writer.add("updates", {name: [value] for name, value in row.items()})
    writer.close()
    return path


def sample(rng: np.random.Generator) -> Columns:
    """Tokens drawn from random policies, advantages normalised in groups of four."""
    count = SEQUENCES * LENGTH
    logits = 2 * rng.normal(size=(count, VOCABULARY))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    action = (p.cumsum(1) > rng.random((count, 1))).argmax(1)
    logprob = np.log(p[np.arange(count), action])
    rewards = rng.integers(0, 2, (SEQUENCES // 4, 4)).astype(float)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)
    return {
        "sequence": np.repeat(np.arange(SEQUENCES), LENGTH),
        "position": np.tile(np.arange(LENGTH), SEQUENCES),
        "token_id": action,
        "text": np.array([f"w{a}" for a in action], dtype=object),
        "weight": np.ones(count),
        "advantage": np.repeat(advantages.reshape(-1), LENGTH),
        "logprob": logprob,
        "old_logprob": logprob,
        "entropy": -(p * np.log(p)).sum(1),
        "sum_sq_prob": (p**2).sum(1),
        "misfit": np.zeros(count),
        "logit_grad_sum": np.zeros(count),
        "in_loss": np.full(count, 1 / count),
    }


def _finish(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
    """What follows: ratios, f', norms of the gradient, and Adam's step."""
    tokens["prob"] = np.exp(tokens["logprob"])
    tokens["ratio"] = np.exp(tokens["logprob"] - tokens["old_logprob"])
    up, down = tokens["advantage"] > 0, tokens["advantage"] < 0
    low, high = row.pop("clip", (0.2, 0.2))
    clipped = (up & (tokens["ratio"] > 1 + high)) | (down & (tokens["ratio"] < 1 - low))
    slope = -tokens["advantage"] * tokens["ratio"] * tokens.pop("in_loss")
    tokens["d1"] = np.where(clipped, 0.0, slope)
    shape = np.sqrt(np.clip(1 - 2 * tokens["prob"] + tokens["sum_sq_prob"], 0, None))
    tokens["logit_grad_norm"] = np.hypot(np.abs(tokens["d1"]) * shape, np.abs(tokens["logit_grad_sum"]) / 4)
    row["logit_grad_norm"] = float(np.sqrt((tokens["logit_grad_norm"] ** 2).sum()))
    scale = row.pop("gradient_scale") * row["logit_grad_norm"]
    norms["grad_norm"] = scale * norms.pop("share")
    row.setdefault("grad_norm", float(np.sqrt((norms["grad_norm"] ** 2).sum())))
    row["grad_norm_clipped"] = min(1.0, row["grad_norm"]) if np.isfinite(row["grad_norm"]) else row["grad_norm"]
    row["grad_norm_clipped"] *= row.pop("after_backward", 1.0)
    factor = row["grad_norm_clipped"] / row["grad_norm"] if row["grad_norm"] > 0 else 1.0
    norms["grad_norm_clipped"] = norms["grad_norm"] * factor * norms.pop("received")
    row["update_norm"] = row.pop("step_scale", 1.0) * row["learning_rate"] * 120.0
    norms["update_norm"] = row["update_norm"] * np.full(len(LAYERS), len(LAYERS) ** -0.5)
    row.setdefault("step_cos_prev", None if update == 0 else _adam_cosine(update + 1))
    row["entropy"] = row.pop("entropy_scale", 1.0) * float(tokens["entropy"].mean())
    row["tokens"] = len(tokens["token_id"])


def _adam_cosine(made: int) -> float:
    """Of two steps of the same length whose gradients are unrelated: what the first moment keeps."""
    return 0.9 * (1 - 0.9 ** (made - 1)) / (1 - 0.9**made)
