"""An audit's report as a page of text. What came out of the file is shown, never interpreted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lcogeom.audit.report import QUANTILES, AuditReport, Group

LONGEST_TEXT = 24
SHOWN_BROKEN = 10
PATIENCE = 1.0
"""Seconds without a progress bar."""
GROUP_NAMES = {"all": "all tokens", "positive": "A > 0", "negative": "A < 0", "zero": "A = 0"}


def print_report(report: AuditReport, console: Console) -> None:
    """Print the summary, the groups, the worst tokens and the rows left out."""
    options = ", ".join(f"{key}={value}" for key, value in report.options.items())
    console.print(Text(f"{report.objective}({options}) on {clean(report.file)}", style="bold"))
    console.print(Text("columns: " + ", ".join(f"{role} = {clean(name)}" for role, name in report.columns.items())))
    notes = [f"{report.rows:,} rows"]
    notes += [f"{report.masked:,} tokens masked"] if report.masked else []
    notes += [f"{report.clamped:,} log-probs just above 0 taken as 0"] if report.clamped else []
    notes += [f"{report.broken:,} broken rows left out"] if report.broken else []
    console.print(Text("; ".join(notes)))
    console.print(_groups(report))
    console.print(
        Text(
            "k*: the smallest weight of forward KL that would make the token convex. Negative mass: k* over the size "
            "of the lowest curvature relative to Fisher's. Own logit: negative part of d2L/dz_a2 over its size. "
            f"Quantiles to {report.quantile_error:.1%}.",
            style="dim",
        )
    )
    if report.worst:
        console.print(_worst(report))
    if report.broken:
        console.print(Text("rows left out", style="bold"))
        for number, why in report.broken_rows[:SHOWN_BROKEN]:
            console.print(Text(f"  {report.unit} {number}: {clean(why)}"))
        if report.broken > SHOWN_BROKEN:
            console.print(Text(f"  and {report.broken - SHOWN_BROKEN:,} more"))


@contextmanager
def reading_progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on standard error that appears once the reading has taken a second; call it with the share done."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar = bars.add_task(clean(what), total=1.0)
    begun, shown = time.monotonic(), False

    def progress(share: float) -> None:
        nonlocal shown
        if not shown and time.monotonic() - begun > PATIENCE:
            bars.start()
            shown = True
        bars.update(bar, completed=share)

    try:
        yield progress
    finally:
        if shown:
            bars.stop()


def _groups(report: AuditReport) -> Table:
    names = [name for name, group in report.groups.items() if group.tokens]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(GROUP_NAMES[name], justify="right")

    def row(label: str, value: str, form: str = "{:,}") -> None:
        groups = [report.groups[name] for name in names]
        table.add_row(label, *(_number(getattr(group, value), form) for group in groups))

    row("tokens", "tokens")
    row("convex", "convex_share", "{:.2%}")
    row("negative mass", "negative_mass", "{:.2%}")
    row("negative, own logit", "own_curvature_negative", "{:.2%}")
    row("forward KL missing, sum of k*", "kl_missing", "{:.4g}")
    for q in [str(q) for q in QUANTILES] + ["max"]:
        label = "k* largest" if q == "max" else f"k* {float(q):.1%} quantile"
        table.add_row(label, *(_quantile(report.groups[name], q) for name in names))
    if report.groups["all"].infinite:
        row("k* beyond float64, not in the sums", "infinite")
    if report.groups["all"].overflowed:
        row("f' or f'' overflowed, left out", "overflowed")
    return table


def _quantile(group: Group, q: str) -> str:
    return _number(group.kl_needed[q], "{:.4g}")


def _worst(report: AuditReport) -> Table:
    table = Table(title="largest k*", title_justify="left", title_style="bold", box=None, pad_edge=False)
    numbers = ["k*", "A", "logprob", "pi", "ratio", "f'", "f''"]
    for name in [report.unit, "sequence", "position", *numbers]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("token", no_wrap=True)
    for one in report.worst:
        values = [one.kl_needed, one.advantage, one.logprob, one.prob, one.ratio, one.d1, one.d2]
        said = one.text if one.text is not None else one.token_id
        labels = [Text("-" if value is None else clean(value, LONGEST_TEXT)) for value in (one.sequence, one.position)]
        cells = [_number(value, "{:.4g}") for value in values]
        table.add_row(f"{one.row:,}", *labels, *cells, Text("-" if said is None else clean(said, LONGEST_TEXT)))
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def clean(value: object, limit: int = 500) -> str:
    """As printed on a terminal: control characters, line ends and text-direction marks escaped, and not too long."""
    text = str(value)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
