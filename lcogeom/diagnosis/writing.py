"""A report as plain data and as Markdown. Text that a model wrote is escaped, never interpreted."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pandas as pd

from lcogeom.diagnosis.causes import CAUSES
from lcogeom.diagnosis.finding import HEALTHY, Evidence, Finding, Report
from lcogeom.diagnosis.making import number

SHOWN = 8
"""Tokens of a finding in Markdown."""
TOKEN_COLUMNS = ("sequence", "position", "text", "advantage", "prob", "ratio", "d1", "share")


def report_as_dict(report: Report) -> dict[str, Any]:
    """See `Report.to_dict`."""
    return {
        "source": report.source,
        "updates": report.updates,
        "cause": report.cause,
        "update": report.update,
        "findings": [_finding(finding) for finding in report.findings],
        "missing": [vars(one).copy() for one in report.missing],
        "notes": list(report.notes),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    tokens = [{str(key): _plain(cell) for key, cell in row.items()} for row in finding.tokens.to_dict("records")]
    evidence = [{key: _plain(value) for key, value in vars(one).items()} for one in finding.evidence]
    return {
        "cause": finding.cause,
        "title": CAUSES[finding.cause].title,
        "update": finding.update,
        "confidence": finding.confidence,
        "sentence": finding.sentence,
        "remedy": finding.remedy,
        "share": _plain(finding.share),
        "where": finding.where,
        "follows": finding.follows,
        "evidence": evidence,
        "tokens": tokens,
    }


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    return str(value)


def report_as_markdown(report: Report) -> str:
    """See `Report.to_markdown`."""
    lines = [f"# {_verdict(report)}", "", f"{code(report.source)}, {report.updates:,} updates read.", ""]
    roots = [finding for finding in report.findings if finding.follows is None]
    for rank, finding in enumerate(roots, 1):
        lines += _section(f"{rank}. {CAUSES[finding.cause].title}", finding)
    followed = [finding for finding in report.findings if finding.follows is not None]
    if followed:
        lines += ["## What followed", ""]
        for finding in followed:
            lines.append(
                f"- update {finding.update}, `{finding.cause}`, from `{finding.follows}`: {plain(finding.sentence)}"
            )
        lines.append("")
    if report.missing:
        lines += ["## What could not be told", ""]
        lines += [f"- `{one.cause}`: `{one.table}.{one.column}` is missing: {one.why}." for one in report.missing]
        lines.append("")
    if report.notes:
        lines += ["## Notes", "", *(f"- {plain(note)}" for note in report.notes), ""]
    return "\n".join(lines)


def _verdict(report: Report) -> str:
    if report.cause == HEALTHY:
        return "No finding"
    return f"{CAUSES[report.cause].title} (update {report.update})"


def _section(title: str, finding: Finding) -> list[str]:
    facts = [f"`{finding.cause}`", f"update {finding.update}", f"confidence {finding.confidence:.0%}"]
    facts += [] if finding.share is None else [f"{finding.share:.0%} of the squared logit gradient"]
    facts += [] if finding.where is None else [code(finding.where)]
    lines = [f"## {title}", "", ", ".join(facts), "", plain(finding.sentence), ""]
    lines += [f"Try: {finding.remedy}", "", *(f"- {_proof(one)}" for one in finding.evidence), ""]
    columns = [name for name in TOKEN_COLUMNS if name in finding.tokens and finding.tokens[name].notna().any()]
    if len(finding.tokens) and columns:
        lines += ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
        for row in finding.tokens.head(SHOWN).to_dict("records"):
            lines.append("| " + " | ".join(_cell(row[name]) for name in columns) + " |")
        lines.append("")
    return lines


def _proof(one: Evidence) -> str:
    where = f"`{one.table}.{one.column}`" + ("" if one.update is None else f", update {one.update}")
    beside = "" if one.reference is None else f", against {_value(one.reference)}"
    return f"{where}: {_value(one.value)}{beside} ({plain(one.says)})"


def _value(value: float | str | None) -> str:
    if value is None:
        return "unknown"
    return plain(value) if isinstance(value, str) else number(value)


def _cell(value: Any) -> str:
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return ""
    if isinstance(value, str):
        return code(value)
    return f"{value:,}" if isinstance(value, (int, np.integer)) else number(float(value))


def code(text: str) -> str:
    """A code span that also stands in a table: control characters are escaped, bars and backticks do not end it."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    shown = shown.replace("|", "\\|") or " "
    fence = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def plain(text: str) -> str:
    """Text without any Markdown or HTML of its own."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return re.sub(r"([\\`*_<>\[\]|#&])", r"\\\1", shown)
