"""Plain logs of training: TRL's `log_history`, and CSV as W&B and verl export it, as columns of `updates`.

A log has one row for each logged update and knows neither tokens nor layers: causes that need them are named as not
decided.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lcogeom.diagnosis.signals import Signals

NAMES: Mapping[str, tuple[str, ...]] = {
    "step": ("step", "global_step", "training/global_step", "train/global_step", "_step", "trainer/global_step"),
    "loss": ("loss", "train/loss", "actor/loss", "actor/pg_loss", "train_loss"),
    "grad_norm": ("grad_norm", "train/grad_norm", "actor/grad_norm", "lcogeom/grad_norm"),
    "grad_norm_clipped": ("lcogeom/grad_norm_clipped",),
    "update_norm": ("lcogeom/update_norm",),
    "step_grad_cos": ("lcogeom/step_grad_cos",),
    "logit_grad_norm": ("lcogeom/logit_grad_norm",),
    "learning_rate": ("learning_rate", "train/learning_rate", "actor/lr", "lr"),
    "entropy": ("entropy", "train/entropy", "actor/entropy", "actor/entropy_loss", "lcogeom/entropy"),
    "reward": ("reward", "train/reward", "critic/rewards/mean", "critic/score/mean", "objective/scores"),
    "ratio_max": ("lcogeom/ratio_max", "sampling/importance_sampling_ratio/max", "actor/ratio_max"),
    "clip_share": ("clip_ratio/region_mean", "actor/pg_clipfrac", "policy/clipfrac_avg", "clip_ratio"),
    "zero_signal_share": ("frac_reward_zero_std",),
    "advantage_max": ("critic/advantages/max",),
    "sampler_gap": (
        "sampling/sampling_logp_difference/mean",
        "training/rollout_probs_diff_mean",
        "rollout_corr/log_ppl_abs_diff",
    ),
}
"""Column of `updates` (or of a log alone) -> the names it has in logs, the first found counts."""
LACKING = {
    "advantage-outlier": ("tokens", "advantage", "whose advantage is out of range"),
    "dominant-sequence": ("tokens", "logit_grad_norm", "which sequence makes the gradient"),
    "negative-rare-token": ("tokens", "prob", "how likely the tokens with negative advantage are"),
    "unmasked-tokens": ("updates", "outside_share", "whether tokens outside the completions get gradient"),
    "layer-amplification": ("norms", "grad_norm", "in which layer the gradient grows"),
    "loss-scale-jump": ("tokens", "d1", "whether the loss's factor changed, or its geometry"),
    "behaviour-mismatch": ("tokens", "old_logprob", "whether ratios begin at 1"),
    "logit-drift": ("updates", "logsumexp", "how far logits move together"),
    "precision-loss": ("updates", "update_norm", "how far weights move"),
    "optimizer-lag": ("updates", "update_norm", "whether steps are in proportion to gradients"),
}


def read_log(path: Path) -> tuple[Signals, list[str]]:
    """What the rules read of a log file, and notes on it.

    Raises:
        ValueError: not JSON or CSV with a row for each update, or no column in it that is known.
    """
    rows = _rows(path)
    found: dict[str, pd.Series] = {}
    used = []
    for column, names in NAMES.items():
        for name in names:
            if column not in found and name in rows and (values := _numbers(rows[name])).notna().any():
                found[column] = values
                used.append(name)
    if not set(found) - {"step"}:
        known = ", ".join(sorted({name for names in NAMES.values() for name in names})[:12])
        raise ValueError(
            f"run: {str(path)!r} has no column that is known of a training log; it has "
            f"{', '.join(map(str, list(rows.columns)[:8]))}. Known are, among others, {known}."
        )
    logged = pd.DataFrame(found)
    logged = logged[logged.drop(columns="step", errors="ignore").notna().any(axis=1)]
    if "step" not in logged:
        logged.insert(0, "step", np.arange(len(logged)))
    logged = logged[logged["step"].notna()].groupby("step", as_index=False).last().sort_values("step")
    if not len(logged):
        raise ValueError(f"run: {str(path)!r} holds no row of an update.")
    steps = logged["step"].to_numpy(dtype=np.int64)
    notes = [
        f"a plain log: {', '.join(used)} were read. Tokens, layers and weights are not in it; record the run with "
        "lcogeom.attach to tell more causes apart"
    ]
    if len(steps) > 1 and (gap := int(np.median(np.diff(steps)))) > 1:
        notes.append(
            f"it has a row for every {gap} updates: what it says of an update may have begun in those before it"
        )
    signals = Signals(str(path), steps, logged.reset_index(drop=True), {}, None, None, table="log")
    for cause, (table, column, why) in LACKING.items():
        if table != "updates" or column not in logged:
            signals.lacks(cause, column, f"{why}; record with lcogeom.attach", table)
    return signals, notes


def _numbers(cells: pd.Series) -> pd.Series:
    """Texts as float64. An empty cell is NaN; a NaN that is spelt out was a number, and stands as infinity."""
    texts = cells.astype("string").str.strip().str.lower()
    infinite = texts.isin(["nan", "inf", "-inf", "infinity", "-infinity"]).fillna(False)
    return pd.to_numeric(texts.where(~infinite), errors="coerce").astype(float).where(~infinite, np.inf)


def _rows(path: Path) -> pd.DataFrame:
    """All cells as texts, null where there is none."""
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"run: {str(path)!r} is empty.")
    if path.suffix.lower() in (".json", ".jsonl"):
        return _json_rows(path, content)
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"run: {str(path)!r} is neither a run folder, nor JSON, nor CSV ({error}).") from None
    # W&B's panels export "run name - column", and __MIN and __MAX beside it.
    plain = [re.sub(r"^.* - (?=\S+$)", "", str(name)) for name in rows.columns]
    return rows if len(set(plain)) < len(plain) else rows.set_axis(plain, axis=1)


def _json_rows(path: Path, content: bytes) -> pd.DataFrame:
    try:
        try:
            found: Any = json.loads(content)
        except ValueError:  # JSON lines
            found = [json.loads(line) for line in content.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"run: {str(path)!r} is not JSON ({error}).") from None
    if isinstance(found, Mapping):
        found = found.get("log_history", found)
    if not isinstance(found, list) or not found or not all(isinstance(row, Mapping) for row in found):
        raise ValueError(f"run: {str(path)!r} holds no list of rows; trainer_state.json has one as 'log_history'.")
    if any(isinstance(row.get("data"), Mapping) for row in found):  # verl's file logger: {"step": 1, "data": {...}}
        found = [{"step": row.get("step"), **row["data"]} for row in found if isinstance(row.get("data"), Mapping)]
    # Evaluations have rows of their own, whose keys begin with eval_; the last row of a run sums it up.
    found = [row for row in found if not any(str(key).startswith(("eval_", "train_runtime")) for key in row)]
    return pd.DataFrame([{str(key): str(cell) for key, cell in row.items() if cell is not None} for row in found])
