"""Is every fault in its run, and nothing of the kind before it? From the recorded tables alone, without any diagnosis.

python analysis/faults/check_runs.py OUT [--half held-out] [--only TEXT]          (half a minute)

One mark a cause, by update, with the bound from which it is plain; the marks are crude, and much is plain before they
say so. Printed: runs whose own mark does not pass its bound in `seen`, or does before; and marks of other causes that
pass theirs at the fault's first update or before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from make_runs import FOLDERS

import lcogeom as lg

Marks = pd.Series
EARLIER = 5
"""Updates that one is compared with."""


def jump(values: pd.Series) -> Marks:
    """How many times larger or smaller than the mean of the updates before it; 1 at the first."""
    values = values.astype(float)
    before = values.rolling(EARLIER, min_periods=1).mean().shift(1)
    ratio = (values / before).replace([np.inf, 0.0], np.nan).fillna(1.0)
    return np.maximum(ratio, 1 / ratio)


def factor(tokens: pd.DataFrame) -> pd.Series:
    """d1 / (A r) of each token: what its loss is multiplied by beside advantage and ratio."""
    advantage = tokens["advantage"].fillna(1.0).replace(0.0, np.nan)
    return (tokens["d1"] / advantage / tokens["ratio"].fillna(1.0)).abs()


def shares(tokens: pd.DataFrame, which: pd.Series) -> Marks:
    """The share of the squared gradient at the logits that lies on some tokens."""
    squares = tokens["logit_grad_norm"] ** 2 * tokens["weight"]
    return (squares.where(which, 0.0).groupby(tokens["step"]).sum() / squares.groupby(tokens["step"]).sum()).fillna(0.0)


def advantage_outlier(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    sizes = run.tokens["advantage"].astype(float).abs().groupby(run.tokens["step"])
    return sizes.max() / sizes.max().cummax().shift(1).fillna(np.inf)


def behaviour_mismatch(run: Any, updates: pd.DataFrame, setup: dict[str, Any]) -> Marks:
    apart = (run.tokens["ratio"] - 1).abs().groupby(run.tokens["step"]).max()
    return apart.where(apart.index % setup["inner_epochs"] == 0, 0.0)


def clip_saturation(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    asked = run.tokens[run.tokens["advantage"].astype(float).abs() > 0]
    share = (asked["logit_grad_norm"] == 0).groupby(asked["step"]).mean()
    moved = (run.tokens["ratio"] - 1).abs().groupby(run.tokens["step"]).max() > 1e-4
    return share.where(moved.reindex(share.index), 0.0)


def dominant_sequence(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    """By how much the sequence with the largest factor, or gradient where that is not known, exceeds the median."""
    sizes = run.tokens["logit_grad_norm"] if run.tokens["d1"].isna().all() else factor(run.tokens)
    rows = sizes.groupby([run.tokens["step"], run.tokens["sequence"]]).max().groupby("step")
    return rows.max() / rows.median().replace(0.0, np.nan)


def entropy_collapse(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    return updates["entropy"].iloc[:5].mean() / updates["entropy"].rolling(3, min_periods=1).mean()


def layer_amplification(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    """By how much the layer whose gradient or weights have grown most has outgrown the median layer."""
    layers = run.norms[run.norms["scope"] == "layer"]
    found = []
    for column, bound in (("grad_norm", 1.0), ("grad_norm_clipped", 1.0), ("weight_norm", 3.0)):
        wide = layers.pivot_table(index="step", columns="name", values=column)
        grown = wide / wide.rolling(EARLIER, min_periods=1).mean().shift(1)
        found.append(bound * grown.max(axis=1) / grown.median(axis=1))
    return pd.concat(found, axis=1).max(axis=1)


def logit_drift(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    return (updates["logsumexp"] - updates["logsumexp"].iloc[:5].mean()).abs()


def loss_scale_jump(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    median = factor(run.tokens).where(lambda values: values > 0).groupby(run.tokens["step"]).median()
    count = updates["tokens"].reindex(median.index)
    if run.tokens["d1"].isna().all():
        median = updates["logit_grad_norm"]
    found = [jump(median * count), jump(updates["loss_factor"]).reindex(median.index)]
    # a scaler that is out of sight, or gradients multiplied behind the logits
    layers = run.norms[run.norms["scope"] == "layer"].groupby("step")["grad_norm"].median()
    found.append(jump(layers / updates["logit_grad_norm"]))
    return pd.concat(found, axis=1).max(axis=1)


def negative_rare_token(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    return shares(run.tokens, (run.tokens["advantage"].astype(float) < 0) & (run.tokens["prob"] < 0.003))


def no_signal(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    return (run.tokens["advantage"].astype(float).abs().groupby(run.tokens["step"]).max() < 1e-6).astype(float)


def non_finite(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    seen = updates[["loss", "grad_norm", "grad_norm_clipped", "update_norm", "weight_norm", "logprob"]].astype(float)
    return (~np.isfinite(seen)).any(axis=1).astype(float)


def optimizer_lag(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    return jump(updates["update_norm"] / updates["learning_rate"])


def precision_loss(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    """The share of a step that is taken back before the next one."""
    return updates["step_undone"].fillna(0.0)


def ratio_blow_up(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    return updates["ratio_max"].fillna(1.0)


def step_too_large(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    return updates["update_norm"] / updates["weight_norm"]


def unmasked_tokens(run: Any, updates: pd.DataFrame, _: dict[str, Any]) -> Marks:
    return updates["outside_share"].fillna(0.0)


MARKS: dict[str, tuple[Callable[[Any, pd.DataFrame, dict[str, Any]], Marks], float]] = {
    "advantage-outlier": (advantage_outlier, 5.0),
    "behaviour-mismatch": (behaviour_mismatch, 0.02),
    "clip-saturation": (clip_saturation, 0.5),
    "dominant-sequence": (dominant_sequence, 10.0),
    "entropy-collapse": (entropy_collapse, 3.3),
    "layer-amplification": (layer_amplification, 8.0),
    "logit-drift": (logit_drift, 1.0),
    "loss-scale-jump": (loss_scale_jump, 4.0),
    "negative-rare-token": (negative_rare_token, 0.5),
    "no-signal": (no_signal, 0.5),
    "non-finite": (non_finite, 0.5),
    "optimizer-lag": (optimizer_lag, 3.0),
    "precision-loss": (precision_loss, 0.5),
    "ratio-blow-up": (ratio_blow_up, 5.0),
    "step-too-large": (step_too_large, 0.01),
    "unmasked-tokens": (unmasked_tokens, 0.01),
}
NO_ADVANTAGES = ("advantage-outlier", "behaviour-mismatch", "clip-saturation", "negative-rare-token", "no-signal",
                 "ratio-blow-up")  # fmt: skip
"""Not in a supervised run."""


def first_past(folder: Path, setup: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """(cause -> (first update at which its mark passes the bound, the mark there)), where it does."""
    run = lg.load_run(folder / "run")
    updates = run.updates.set_index("step")
    found = {}
    for cause, (mark, bound) in MARKS.items():
        if setup["objective"] == "sft" and cause in NO_ADVANTAGES:
            continue
        values = mark(run, updates, setup)
        there = values[values > bound]
        if len(there):
            found[cause] = (int(there.index[0]), float(there.iloc[0]))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--half", choices=FOLDERS, default="held-out")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    root = arguments.out / FOLDERS[arguments.half]
    for file in sorted(root.rglob("fault.json")):
        name = str(file.parent.relative_to(root))
        if arguments.only not in name:
            continue
        fault = json.loads(file.read_text())
        found = first_past(file.parent, fault["setup"])
        cause, limit = fault["cause"], fault["update"]
        own = found.pop(cause, None)
        told = []
        if cause != "healthy":
            first, last = fault["seen"]
            if own is None:
                told.append("NO MARK")
            elif not first - 1 <= own[0] <= last + 1:
                told.append(f"MARK AT {own[0]}")
        others = {other: at for other, at in found.items() if cause == "healthy" or at[0] <= (fault["seen"][0])}
        told += [f"{other} at {step}: {value:.3g}" for other, (step, value) in others.items()]
        setup = fault["setup"]
        print(
            f"{'--' if not told else '!!'} {name} [{setup['objective']}, {setup['model']}] update {limit} "
            f"seen {fault['seen']} own {own} | {'; '.join(told)}"
        )
