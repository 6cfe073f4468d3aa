"""The recorded tokens of one update, with each one's part of the gradient: what heat map and phase diagram draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lcogeom.diagnosis.page.text import escaped, figure, numbers, percent
from lcogeom.runs import Run

MOST_TOKENS = 1500
"""Of one update, embedded in the page: those with the largest gradient."""
SHADES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""From these shares of the update's squared gradient on, a token is one shade darker."""


@dataclass(frozen=True, eq=False)
class Heavy:
    """Tokens of one update, heaviest first; every array is (N,) and NaN where nothing was recorded."""

    update: int
    recorded: int
    """Rows the run has of this update, of which N are here."""
    stands_for: float
    """Completion tokens that the rows recorded stand for; more than `recorded` where the rest was not looked at."""
    key: np.ndarray
    """Number of each token on the page."""
    sequence: np.ndarray
    position: np.ndarray
    text: list[str]
    advantage: np.ndarray
    prob: np.ndarray
    logprob: np.ndarray
    old_logprob: np.ndarray
    ratio: np.ndarray
    entropy: np.ndarray
    d1: np.ndarray
    d2: np.ndarray
    norm: np.ndarray
    weight: np.ndarray
    share: np.ndarray
    """Of the squared gradient norm in the logits of the whole update; NaN where the gradient is not finite."""
    convex: np.ndarray
    """1, 0 or NaN."""
    negative: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    @property
    def pull(self) -> np.ndarray:
        """Where the update pushes the token's log-probability: the sign of -f', of A where f' is not known."""
        return np.sign(np.where(np.isnan(self.d1), self.advantage, -self.d1))


def heavy_tokens(run: Run, update: int, *, start: int) -> Heavy:
    """The tokens of an update with the largest gradient, at most MOST_TOKENS.

    Args:
        run: the run.
        update: `step`.
        start: number of the first token on the page.
    """
    rows = run.tokens
    rows = rows[numbers(rows, "step") == update] if "step" in rows.columns else rows.iloc[:0]
    norm, weight = numbers(rows, "logit_grad_norm"), np.nan_to_num(numbers(rows, "weight"), nan=1.0)
    size = np.where(np.isfinite(norm), norm, 0.0)
    scale = size.max(initial=0) or 1.0  # squares of 1e200 overflow
    total = float((weight * (size / scale) ** 2).sum())
    share = np.where(np.isfinite(norm), (size / scale) ** 2 / total, np.nan) if total else np.full(len(rows), np.nan)
    order = np.argsort(-np.nan_to_num(norm, nan=0.0, posinf=np.inf), kind="stable")
    order = order[:MOST_TOKENS]
    chosen = rows.iloc[order]
    return Heavy(
        update=update,
        recorded=len(rows),
        stands_for=float(weight.sum()),
        key=start + np.arange(len(chosen)),
        sequence=numbers(chosen, "sequence"),
        position=numbers(chosen, "position"),
        text=_texts(chosen),
        advantage=numbers(chosen, "advantage"),
        prob=numbers(chosen, "prob"),
        logprob=numbers(chosen, "logprob"),
        old_logprob=numbers(chosen, "old_logprob"),
        ratio=numbers(chosen, "ratio"),
        entropy=numbers(chosen, "entropy"),
        d1=numbers(chosen, "d1"),
        d2=numbers(chosen, "d2"),
        norm=norm[order],
        weight=weight[order],
        share=share[order],
        convex=_truth(chosen, "convex"),
        negative=numbers(chosen, "negative_count"),
    )


def shade(heavy: Heavy, row: int) -> str:
    """The CSS class of a token: u0 ... u5 where it is pushed up, d0 ... d5 down; bad or unknown without a number."""
    if np.isnan(heavy.norm[row]):
        return "unknown"
    if np.isinf(heavy.norm[row]):
        return "bad"
    level = int(np.searchsorted(SHADES, np.nan_to_num(heavy.share[row]), side="right"))
    return f"{'d' if heavy.pull[row] < 0 else 'u'}{level}"


def hover(heavy: Heavy, row: int) -> str:
    """The attributes that a token's box is filled from; the labels of the numbers are DETAILS."""
    convex = {1.0: "yes", 0.0: "no"}.get(float(heavy.convex[row]), "–")
    if convex == "no" and np.isfinite(heavy.negative[row]):
        convex += f", {figure(int(heavy.negative[row]))} negative eigenvalue{'s' if heavy.negative[row] != 1 else ''}"
    values = (
        figure(heavy.advantage[row]),
        f"{figure(heavy.prob[row])}   (log {figure(heavy.logprob[row])})",
        f"{figure(heavy.ratio[row])}   (log π_old {figure(heavy.old_logprob[row])})",
        figure(heavy.d1[row]),
        figure(heavy.d2[row]),
        convex,
        f"{figure(heavy.norm[row])}   ({percent(heavy.share[row])} of the update, squared)",
        f"{figure(heavy.entropy[row])} nat",
        f"sequence {figure(heavy.sequence[row])}, position {figure(heavy.position[row])}",
    )
    return f'data-k="{heavy.key[row]}" data-t="{escaped(heavy.text[row])}" data-d="{escaped("|".join(values))}"'


DETAILS = (
    "advantage A",
    "probability π",
    "ratio r",
    "f′",
    "f″",
    "convex",
    "gradient norm",
    "entropy",
    "place",
)


def _texts(rows: pd.DataFrame) -> list[str]:
    ids = numbers(rows, "token_id")
    texts = rows["text"] if "text" in rows.columns else [None] * len(rows)
    return [
        text if isinstance(text, str) else "?" if np.isnan(number) else f"#{int(number)}"
        for text, number in zip(texts, ids, strict=True)
    ]


def _truth(rows: pd.DataFrame, name: str) -> np.ndarray:
    if name not in rows.columns:
        return np.full(len(rows), np.nan)
    return np.array([np.nan if pd.isna(value) else float(bool(value)) for value in rows[name]], dtype=np.float64)
