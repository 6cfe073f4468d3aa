"""The findings in words, each with the numbers of the run that it rests on."""

from __future__ import annotations

from lcogeom.diagnosis.finding import Evidence, Finding, Report
from lcogeom.diagnosis.page.text import escaped, figure, numbers, percent

MOST_TOKENS = 8


def headline(report: Report) -> str:
    """The one thing to know."""
    if not report.findings:
        return (
            f'<p class="verdict"><b>Healthy</b>: no finding in {report.updates:,} '
            f"update{'' if report.updates == 1 else 's'}.</p>"
        )
    first = report.findings[0]
    return (
        f'<p class="verdict"><b>{escaped(first.cause)}</b> at update {first.update}, '
        f"of {report.updates:,} read. {escaped(first.sentence)}</p>"
    )


def findings(report: Report) -> str:
    """A card for each, as ranked; those that followed from another are closed until they are wanted."""
    return "".join(_card(number, finding, report) for number, finding in enumerate(report.findings, 1))


def _card(number: int, finding: Finding, report: Report) -> str:
    numbered = {one.cause: place for place, one in reversed(list(enumerate(report.findings, 1)))}
    if finding.follows is None:
        order = "came first" if number == 1 else ""
    else:
        order = f"followed from {escaped(finding.follows)}"
        if finding.follows in numbered:
            order += f" ({numbered[finding.follows]})"
    facts = [f"update <b>{finding.update}</b>", f"confidence <b>{percent(finding.confidence)}</b>{_meter(finding)}"]
    if finding.share is not None:
        facts.append(f"explains <b>{percent(finding.share)}</b> of the squared gradient")
    if finding.where is not None:
        facts.append(f"at <code>{escaped(finding.where)}</code>")
    if order:
        facts.append(order)
    title = f'<h3><span class="number">{number}</span> {escaped(finding.cause)}</h3>'
    body = (
        f'<p class="facts">{" · ".join(facts)}</p><p>{escaped(finding.sentence)}</p>'
        f'<p class="remedy"><b>Try:</b> {escaped(finding.remedy)}</p>{_evidence(finding)}{_tokens(finding)}'
    )
    if finding.follows is None:
        return f'<article class="finding" id="finding-{number}">{title}{body}</article>'
    summary = f'{title} <span class="small">update {finding.update} · {order}</span>'
    return f'<details class="finding follows" id="finding-{number}"><summary>{summary}</summary>{body}</details>'


def _meter(finding: Finding) -> str:
    filled = round(10 * min(max(finding.confidence, 0.0), 1.0))
    return f'<span class="meter" aria-hidden="true">{"▮" * filled}<i>{"▮" * (10 - filled)}</i></span>'


def _evidence(finding: Finding) -> str:
    if not finding.evidence:
        return ""
    rows = "".join(_fact(one) for one in finding.evidence)
    head = "<tr><th>what it says</th><th>value</th><th>compared with</th><th>update</th><th>column</th></tr>"
    return f'<div class="wide"><table><caption>Evidence</caption>{head}{rows}</table></div>'


def _fact(one: Evidence) -> str:
    update = "all" if one.update is None else str(one.update)
    return (
        f'<tr><td>{escaped(one.says)}</td><td class="n">{escaped(figure(one.value))}</td>'
        f'<td class="n">{escaped(figure(one.reference))}</td><td class="n">{escaped(update)}</td>'
        f"<td><code>{escaped(one.table)}.<wbr>{escaped(one.column)}</code></td></tr>"
    )


def _tokens(finding: Finding) -> str:
    rows = finding.tokens.head(MOST_TOKENS)
    if rows.empty:
        return ""
    head = "<tr><th>token</th><th>sequence</th><th>position</th><th>A</th><th>π</th><th>ratio</th><th>share</th></tr>"
    columns = [numbers(rows, name) for name in ("sequence", "position", "advantage", "prob", "ratio", "share")]
    texts = rows["text"] if "text" in rows.columns else rows.get("token_id", [None] * len(rows))
    body = "".join(
        f'<tr><td class="word">{escaped(text if text is not None else "?")}</td>'
        + "".join(f'<td class="n">{figure(value)}</td>' for value in values[:-1])
        + f'<td class="n">{percent(values[-1])}</td></tr>'
        for text, *values in zip(texts, *columns, strict=True)
    )
    more = f", the {MOST_TOKENS} heaviest of {len(finding.tokens)}" if len(finding.tokens) > MOST_TOKENS else ""
    return f'<div class="wide"><table><caption>Tokens{more}</caption>{head}{body}</table></div>'


def remarks(report: Report) -> str:
    """What would have decided and was not recorded, and what else a reader must know."""
    parts = []
    if report.missing:
        rows = "".join(
            f"<tr><td><code>{escaped(one.table)}.{escaped(one.column)}</code></td><td>{escaped(one.cause)}</td>"
            f"<td>{escaped(one.why)}</td></tr>"
            for one in report.missing
        )
        head = "<tr><th>column</th><th>for</th><th>why</th></tr>"
        parts.append(f'<h2>Not recorded</h2><div class="wide"><table>{head}{rows}</table></div>')
    if report.notes:
        parts.append(f"<h2>Notes</h2><ul>{''.join(f'<li>{escaped(note)}</li>' for note in report.notes)}</ul>")
    return "".join(parts)
