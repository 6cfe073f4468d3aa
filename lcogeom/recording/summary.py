"""One update's token columns -> the token-level columns of its row in `updates`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

NEGLIGIBLE = 1e-3
"""Of a sum of squares: it changes the norm by 0.05 %."""
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
    total = _squares(tokens)
    if total is not None:
        row["logit_grad_norm" + end] = float(np.sqrt(total))
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


def _squares(tokens: Mapping[str, np.ndarray]) -> float | None:
    """Sum of the squared gradients; None where tokens whose norm is not known may make more than NEGLIGIBLE of it.

    Those count with f' |e_a - p| (method.md, 2.1), and with what their misfit says is beside that direction.
    """
    weight, norm = tokens["weight"], tokens["logit_grad_norm"]
    unknown = np.isnan(norm)
    found = float(np.sum(weight[~unknown] * norm[~unknown] ** 2))
    if not unknown.any():
        return found
    slope, prob, squares, misfit = (tokens[name][unknown] for name in ("d1", "prob", "sum_sq_prob", "misfit"))
    with np.errstate(divide="ignore", invalid="ignore"):
        there = slope**2 * (1 - 2 * prob + squares).clip(0) / (1 - misfit**2)
    rest = float(np.sum(weight[unknown] * there))
    return found + rest if rest <= NEGLIGIBLE * found else None  # not where it is NaN
