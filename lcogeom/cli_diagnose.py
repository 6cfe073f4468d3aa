"""The command `lcogeom diagnose`."""

from __future__ import annotations

import json
import sys
from math import isnan
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lcogeom.audit.show import clean
from lcogeom.diagnosis.causes import CAUSES
from lcogeom.diagnosis.finding import Finding, Report
from lcogeom.diagnosis.making import number, token_name

SHOWN = 5
"""Tokens listed of a finding."""


def diagnose_command(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run folder; or a plain log: TRL's trainer_state.json or log_history, a CSV of W&B or verl."
        ),
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report to this file as Markdown.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the report to this file as one page with the pictures of the run.")
    ] = None,
) -> None:
    """What went wrong in a run: the update, the tokens, the layer and the cause, what came first and what to try.

    Exit code 0 whether anything was found or not; the JSON report says what.
    """
    files = (("--json", json_file), ("--markdown", markdown), ("--html", html))
    for option, file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{option}: no folder {str(file.parent)!r}; make it first.")
    from lcogeom.diagnosis.diagnose import diagnose  # pandas only when it is needed

    status = Console(stderr=True)
    with status.status(f"reading {clean(run.name)}") if status.is_terminal else _Quiet():
        report = diagnose(run)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if markdown is not None:
        markdown.write_text(report.to_markdown(), encoding="utf-8")
    if html is not None:
        report.write_html(html)
    print_report(report, Console(width=None if sys.stdout.isatty() else 140))
    for option, file in files:
        if file is not None:
            status.print(Text(f"{option[2:]}: {file}", style="dim"))


class _Quiet:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def print_report(report: Report, console: Console) -> None:
    """Print the findings, what followed, what could not be told and the notes."""
    console.print(Text(f"{clean(report.source)}: {report.updates:,} updates", style="dim"))
    roots = [finding for finding in report.findings if finding.follows is None]
    if not roots:
        console.print(Text("no finding", style="bold green"))
    for place, finding in enumerate(roots, 1):
        _print_finding(place, finding, console)
    followed = [finding for finding in report.findings if finding.follows is not None]
    if followed:
        console.print(Text("what followed", style="bold"))
        for finding in followed:
            line = f"  update {finding.update}  {finding.cause} (from {finding.follows}): {clean(finding.sentence)}"
            console.print(Text(line))
        console.print()
    if report.missing:
        console.print(Text("what could not be told", style="bold"))
        for one in report.missing:
            console.print(Text(f"  {one.cause}: {one.table}.{one.column} is missing: {clean(one.why)}", style="dim"))
    for note in report.notes:
        console.print(Text(f"note: {clean(note)}", style="dim"))


def _print_finding(place: int, finding: Finding, console: Console) -> None:
    console.print(Text(f"{place}. {CAUSES[finding.cause].title}", style="bold red"))
    facts = [finding.cause, f"update {finding.update}", f"confidence {finding.confidence:.0%}"]
    facts += [] if finding.share is None else [f"{finding.share:.0%} of the squared logit gradient"]
    console.print(Text("   " + ", ".join(facts), style="dim"))
    table = Table.grid(padding=(0, 2))
    table.add_row("  ", Text(clean(finding.sentence)))
    table.add_row("  ", Text(f"Try: {finding.remedy}"))
    for one in finding.evidence:
        value, reference = (_value(number_or_text) for number_or_text in (one.value, one.reference))
        at = "" if one.update is None else f" at {one.update}"
        beside = "" if reference is None else f" (against {reference})"
        table.add_row("  ", Text(f"- {one.table}.{one.column}{at}: {value}{beside}, {clean(one.says)}", style="dim"))
    for _, row in finding.tokens.head(SHOWN).iterrows():
        share = row.get("share")
        part = f", {share:.1%} of the squared gradient" if isinstance(share, float) and not isnan(share) else ""
        table.add_row("  ", Text(f"- {clean(token_name(row))}{part}", style="dim"))
    console.print(table)
    console.print()


def _value(value: float | str | None) -> str | None:
    if value is None:
        return None
    return clean(value) if isinstance(value, str) else number(value)
