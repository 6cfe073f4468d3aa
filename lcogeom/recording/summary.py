"""Measured tokens -> columns of the tokens table -> the token-level columns of the update's row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from lcogeom.objectives import TokenBatch
from lcogeom.recording.tokens import Candidates, TokenRows

QUANTILES = {"ratio_q05": 0.05, "ratio_median": 0.5, "ratio_q95": 0.95}
MEANS = {"logprob": "logprob", "action_prob": "prob", "entropy": "entropy", "convex_share": "convex"}


def token_columns(measured: list[tuple[Candidates, TokenRows]]) -> dict[str, np.ndarray]:
    """Columns of the tokens table, NaN where a value is not known; {} without tokens."""
    if not measured:
        return {}
    columns: dict[str, list[np.ndarray]] = {}

    def add(name: str, value: Tensor) -> None:
        columns.setdefault(name, []).append(value.detach().cpu().numpy())

    for some, rows in measured:
        unknown = torch.full_like(rows.logprob, float("nan"))
        batch = some.batch
        for name in ("sequence", "position", "weight"):
            add(name, getattr(some, name))
        add("token_id", some.actions)
        add("advantage", _sampled_advantage(batch, unknown))
        old = unknown if batch is None or batch.old_logprobs is None else batch.old_logprobs.double()
        add("old_logprob", old)
        add("ratio", (rows.logprob - old).exp())
        add(
            "convex", torch.where(rows.negative_count.isnan(), rows.negative_count, (rows.negative_count == 0).double())
        )
        for field in fields(TokenRows):
            add(field.name, getattr(rows, field.name))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _sampled_advantage(batch: TokenBatch | None, unknown: Tensor) -> Tensor:
    """A of the sampled action; NaN where dense advantages do not cover it."""
    if batch is None or batch.advantages is None:
        return unknown
    if batch.advantage_ids is None:
        return batch.advantages.double()
    hit = batch.advantage_ids == batch.actions[:, None]
    found = torch.where(hit, batch.advantages.double(), 0.0).sum(1)
    return torch.where(hit.any(1), found, unknown)


def summarise(tokens: Mapping[str, np.ndarray]) -> dict[str, object]:
    """Weighted means and quantiles over the recorded tokens, and again for each sign of the advantage.

    Args:
        tokens: columns of the tokens table of one update, NaN where a value is not known.

    Returns:
        Column of `updates` -> value; columns without data are absent.
    """
    if not tokens:
        return {}
    row = _summary(tokens, "")
    advantages = tokens["advantage"]
    for end, chosen in (("_positive", advantages > 0), ("_negative", advantages < 0)):
        if chosen.any():
            part = {name: values[chosen] for name, values in tokens.items()}
            row |= _summary(part, end)
            row["tokens" + end] = round(float(part["weight"].sum()))
    return row


def _summary(tokens: Mapping[str, np.ndarray], end: str) -> dict[str, object]:
    weight = tokens["weight"]
    row: dict[str, object] = {}
    for column, source in MEANS.items():
        known = ~np.isnan(tokens[source])
        if known.any():
            row[column + end] = float(np.average(tokens[source][known], weights=weight[known]))
    norm = tokens["logit_grad_norm"]
    if not np.isnan(norm).any():
        row["logit_grad_norm" + end] = float(np.sqrt(np.sum(weight * norm**2)))
    ratio = tokens["ratio"]
    known = ~np.isnan(ratio)
    if known.any():
        ordered = np.argsort(ratio[known])
        values, mass = ratio[known][ordered], weight[known][ordered]
        reached = np.cumsum(mass) / mass.sum()
        for column, level in QUANTILES.items():
            row[column + end] = float(values[min(np.searchsorted(reached, level), len(values) - 1)])
        row["ratio_min" + end], row["ratio_max" + end] = float(values[0]), float(values[-1])
    return row
