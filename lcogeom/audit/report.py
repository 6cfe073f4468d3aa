"""What an audit found: the numbers of each group of tokens, and the worst tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcogeom.audit.tally import QUANTILE_ERROR, Tally

QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Group:
    """One group of tokens. A share is None where there is nothing to share out."""

    tokens: int
    convex: int
    """Tokens at which the loss is convex in the logits (V >= 3)."""
    convex_share: float | None
    """convex over the tokens that did not overflow."""
    kl_missing: float
    """Sum of k* over the tokens, in units of forward KL: what all their updates lack together."""
    negative_mass: float | None
    """Sum of k* over the sum of |lowest margin|, in [0, 1]: 0 where every token is convex, 1 where none is. The lowest
    margin is the least curvature per unit of Fisher curvature, min over x of x^T H x / x^T S x, and k* its negative
    part; it grows like 1 / pi at rare tokens, so they dominate it."""
    own_curvature_negative: float | None
    """The same for d^2 L / d z_a^2 = (1 - pi) (-f' pi + f'' (1 - pi)), the curvature along the action's own logit, in
    loss per logit^2: the sum of its negative part over the sum of its size. Rare tokens do not dominate it."""
    infinite: int
    """Tokens whose k* exceeds the range of float64 (pi underflows); counted as not convex, left out of the sums."""
    overflowed: int
    """Tokens whose f' or f'' is not finite, so that nothing can be said of them."""
    kl_needed: Mapping[str, float | None]
    """Quantiles of k* over the tokens, "0.5" ... and "max", to a relative error of QUANTILE_ERROR (max: exact)."""


@dataclass(frozen=True)
class WorstToken:
    """A token that lacks much forward KL. None: not in the file."""

    row: int
    """Line (CSV, JSON lines) or row (parquet) of the file, from 1."""
    sequence: object
    position: object
    """The file's, else the place in the row's list, from 0."""
    token_id: object
    text: object
    advantage: float | None
    logprob: float
    prob: float
    """pi = exp(logprob)."""
    ratio: float | None
    kl_needed: float
    """k*: the smallest weight of a forward KL that makes the token convex."""
    d1: float
    """f'(l)."""
    d2: float
    """f''(l)."""


@dataclass(frozen=True)
class AuditReport:
    """What a file of logged tokens says of an objective's convexity in the logits."""

    file: str
    format: str
    objective: str
    options: Mapping[str, object]
    columns: Mapping[str, str]
    """Role -> the column it was read from; masks are joined by ' * '."""
    unit: str
    """What row numbers count: 'line' or 'row'."""
    rows: int
    masked: int
    """Tokens that a mask left out."""
    clamped: int
    """Log-probabilities in (0, 1e-3] that were taken as 0."""
    broken: int
    """Rows left out (`skip_broken`)."""
    broken_rows: tuple[tuple[int, str], ...]
    """The first 1,000 of them: (row number, why)."""
    groups: Mapping[str, Group]
    """'all', and by the sign of the advantage 'positive', 'negative', 'zero' (empty without advantages)."""
    worst: tuple[WorstToken, ...]
    """By k*, the largest first."""
    quantile_error: float = QUANTILE_ERROR

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values: what is not finite becomes None."""
        cleaned = _json(dataclasses.asdict(self))
        assert isinstance(cleaned, dict)
        return cleaned


def group_of(tally: Tally) -> Group:
    """The numbers of a tally."""
    known = tally.tokens - tally.overflowed
    quantiles: dict[str, float | None] = {str(q): tally.quantiles.quantile(q) if known else None for q in QUANTILES}
    return Group(
        tokens=tally.tokens,
        convex=tally.convex,
        convex_share=tally.convex / known if known else None,
        kl_missing=tally.kl,
        negative_mass=tally.kl / tally.margin if tally.margin else None,
        own_curvature_negative=tally.own_negative / tally.own if tally.own else None,
        infinite=tally.infinite,
        overflowed=tally.overflowed,
        kl_needed=quantiles | {"max": tally.quantiles.largest if known else None},
    )


def _json(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
