"""What a diagnosis says: findings, ranked, each with the numbers of the run that it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lcogeom.runs import Run

HEALTHY = "healthy"


@dataclass(frozen=True)
class Evidence:
    """One number of the run, beside what it is compared with."""

    table: str
    """'updates', 'tokens', 'norms', 'run.json', 'black_box', or 'log' for a plain log."""
    column: str
    update: int | None
    """The update it was read at; None where it belongs to the whole run."""
    value: float | str | None
    reference: float | str | None
    """What it is compared with: a median before the event, a bound, another column; None if nothing."""
    says: str
    """A clause that a reader understands without the glossary: "gradient norm, 410 times its median before"."""


@dataclass(frozen=True, eq=False)
class Finding:
    """One cause that the run shows."""

    cause: str
    """One of `lcogeom.diagnosis.CAUSES`."""
    update: int
    """The first update concerned: `step` of the run."""
    confidence: float
    """0 to 1: how sure the rule is, from the evidence that was there; less where a deciding column is missing."""
    sentence: str
    """What happened, for a tired engineer: the update, the numbers, the token or layer or tensor by name."""
    remedy: str
    evidence: tuple[Evidence, ...]
    share: float | None = None
    """Of the squared norm of the update's gradient (in the logits) that this explains; None where not known."""
    where: str | None = None
    """The layer, tensor or sequence concerned."""
    tokens: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Rows of `run.tokens` concerned, heaviest first, with `share` of the update's squared gradient norm."""
    between: bool = False
    """Whether it happened between the last step and this update: before anything else in it."""
    follows: str | None = None
    """The cause of the finding that this one is a consequence of; None for what came first."""


@dataclass(frozen=True)
class Missing:
    """A column that was not there and would have decided."""

    table: str
    column: str
    cause: str
    why: str
    """What it would have told, and how to record it."""


@dataclass(frozen=True, eq=False)
class Report:
    """The findings of one run, what came first before what followed."""

    source: str
    """The run folder or file, as given."""
    updates: int
    """How many were read."""
    findings: tuple[Finding, ...]
    """Ranked; empty for a healthy run."""
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]
    """What else a reader must know: damaged parts, columns not recognised, updates that are missing."""
    meta: Mapping[str, object] = field(default_factory=dict)
    run: Run | None = field(default=None, repr=False)
    """Its tables, which the page draws; of a plain log, updates alone. None in a report made by hand."""

    @property
    def cause(self) -> str:
        """Of the first finding; 'healthy' if there is none."""
        return self.findings[0].cause if self.findings else HEALTHY

    @property
    def update(self) -> int | None:
        """The first update concerned, of the first finding."""
        return self.findings[0].update if self.findings else None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it: numbers that are not finite are texts ('nan', 'inf'), tokens are rows."""
        from lcogeom.diagnosis.writing import report_as_dict

        return report_as_dict(self)

    def to_markdown(self) -> str:
        """The report as Markdown. What the model wrote stands in code spans, where nothing in it is interpreted."""
        from lcogeom.diagnosis.writing import report_as_markdown

        return report_as_markdown(self)

    def write_html(self, path: str | Path) -> None:
        """Write the findings and the pictures of the run as one file that opens offline, of a few MiB at most.

        Time lines with the events marked; of the updates that findings name, the tokens coloured by their part of the
        gradient, the phase diagram and the layers. The page runs no script but its own and fetches nothing.

        Raises:
            OSError: the file cannot be written.
            ValueError: the report was made by hand and knows no run.
        """
        from lcogeom.diagnosis.html import write_html

        if self.run is None:
            raise ValueError("run: this report knows no run to draw; take it from diagnose(), or give Report(run=...).")
        write_html(self, self.run, path)
