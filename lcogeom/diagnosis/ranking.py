"""What came first, and what followed from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lcogeom.diagnosis.causes import CAUSES
from lcogeom.diagnosis.finding import Finding

CLEAR = 0.65
"""Confidence below which a finding stands behind clear ones, even if it came first."""
ORDER = {cause: place for place, cause in enumerate(CAUSES)}


def rank(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """One finding a cause, the first; what nothing explains before what something does, what is clear before what is
    not; each group by its update.

    A finding follows another where that may bring it about (`Cause.brings`) and came before it: in an earlier update,
    or in the same one but before all of it (`Finding.between`), or earlier in the order of CAUSES. Of several that may
    have, the first counts.
    """
    earliest: dict[str, Finding] = {}
    for finding in found:
        known = earliest.get(finding.cause)
        if known is None or _order(finding) < _order(known):
            earliest[finding.cause] = finding
    ordered = sorted(earliest.values(), key=_order)
    explained = [
        replace(finding, follows=next((other.cause for other in ordered if _brought(other, finding)), None))
        for finding in ordered
    ]
    return tuple(sorted(explained, key=lambda one: (one.follows is not None, one.confidence < CLEAR, *_order(one))))


def _order(finding: Finding) -> tuple[int, bool, int]:
    return finding.update, not finding.between, ORDER[finding.cause]


def _brought(one: Finding, other: Finding) -> bool:
    return other.cause in CAUSES[one.cause].brings and _order(one) < _order(other)
