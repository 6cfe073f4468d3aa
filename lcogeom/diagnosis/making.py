"""How rules write their findings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lcogeom.diagnosis.causes import CAUSES
from lcogeom.diagnosis.finding import Evidence, Finding
from lcogeom.diagnosis.signals import Signals


def make(  # noqa: PLR0917
    s: Signals,
    cause: str,
    at: int,
    confidence: float,
    sentence: str,
    evidence: Sequence[Evidence],
    *,
    share: float | None = None,
    where: str | None = None,
    chosen: np.ndarray | None = None,
    between: bool = False,
) -> Finding:
    """A finding at an update given by its index.

    Args:
        share: of the squared logit gradient; from `chosen` where it is None.
        chosen: (M,) rows of the tokens that it is about.
        between: it happened between the last step and this update.
    """
    named = pd.DataFrame()
    if chosen is not None and s.tokens is not None:
        named = s.tokens.named(at, chosen)
        if share is None:
            share = float(s.tokens.share(chosen)[at])
    share = None if share is None or not np.isfinite(share) else min(max(share, 0.0), 1.0)
    return Finding(
        cause=cause,
        update=int(s.steps[at]),
        confidence=confidence,
        sentence=sentence,
        remedy=CAUSES[cause].remedy,
        evidence=tuple(evidence),
        share=share,
        where=where,
        tokens=named,
        between=between,
    )


def number(value: float) -> str:
    """Three digits, without an exponent where that is readable."""
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.3g}" if size < 1000 else f"{value:,.0f}"


def token_name(row: pd.Series) -> str:
    """A token as a reader finds it: its text where known, sequence and position."""
    text = row.get("text")
    known = isinstance(text, str)
    what = repr(text) if known else f"token {_whole(row.get('token_id'))}"
    return f"{what} (sequence {_whole(row.get('sequence'))}, position {_whole(row.get('position'))})"


def heaviest(finding_tokens: pd.DataFrame) -> str:
    """', most at TOKEN', or nothing where no token is known."""
    return f"; heaviest {token_name(finding_tokens.iloc[0])}" if len(finding_tokens) else ""


def _whole(value: object) -> str:
    return "?" if value is None or pd.isna(value) else str(int(value))  # type: ignore[call-overload]
