"""One update's token columns -> the token-level columns of its row in `updates`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

QUANTILES = {"ratio_q05": 0.05, "ratio_median": 0.5, "ratio_q95": 0.95}
MEANS = {
    "logprob": "logprob",
    "action_prob": "prob",
    "entropy": "entropy",
    "convex_share": "convex",
    "logsumexp": "logsumexp",
}


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
