"""The report as one HTML file: opens offline, runs nothing but its own script, shows text of the model as text."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from lcogeom.diagnosis.finding import Report
from lcogeom.diagnosis.page.findings import findings, headline, remarks
from lcogeom.diagnosis.page.heatmap import heatmap
from lcogeom.diagnosis.page.layers import layers
from lcogeom.diagnosis.page.phase import phase
from lcogeom.diagnosis.page.text import escaped, numbers
from lcogeom.diagnosis.page.timelines import timelines
from lcogeom.diagnosis.page.tokens import MOST_TOKENS, heavy_tokens
from lcogeom.runs import Run

MOST_UPDATES = 4
"""Whose tokens and layers are on the page: those that findings name, in their order."""
FEW_LAYERS = 14
"""Up to so many, both profiles stand beside the phase diagram."""
ABOUT = (
    "model",
    "objective",
    "optimizer",
    "temperature",
    "tokens_per_update",
    "tap",
    "lcogeom",
    "torch",
    "transformers",
)


def write_html(report: Report, run: Run, path: str | Path) -> None:
    """Write a report and the pictures of its run as one file, of at most a few MiB however long the run.

    Only the tokens of updates that findings name are in it (of a healthy run, those of the update with the largest
    gradient). The file fetches nothing. Its policy (Content-Security-Policy) lets a browser run the one script that
    it came with, by its digest, so that even text that got past escaping could not run.

    Args:
        report: what was found.
        run: its tables; columns that it has not are left out of the page.
        path: file to write; one that exists is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    Path(path).write_text(html_page(report, run), encoding="utf-8")


def html_page(report: Report, run: Run) -> str:
    """The content of the file that `write_html` writes."""
    page = files("lcogeom.diagnosis.page")
    style, script = (page.joinpath(f"page.{end}").read_text(encoding="utf-8") for end in ("css", "js"))
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    glossary = run.columns[run.columns["table"] == "updates"]
    units = dict(zip(glossary["name"], glossary["unit"], strict=True))
    title = f"{report.cause} · {Path(report.source).name}"
    found = f"<h2>Findings</h2>{findings(report)}" if report.findings else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escaped(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escaped(title)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{escaped(report.source)}</h1>{_about(run.meta)}</header>
<main>
{headline(report)}
{found}
<section><h2>Time lines</h2>{timelines(report, run.updates, units)}</section>
{_updates(report, run)}
{remarks(report)}
</main>
<footer>Written by lcogeom diagnose. What each column means: <code>run.columns</code> of <code>lcogeom.load_run</code>.
</footer>
<div id="box" role="tooltip"></div>
<script>{script}</script>
</body>
</html>
"""


def _updates(report: Report, run: Run) -> str:
    """Tokens and layers of the updates concerned."""
    chosen = list(dict.fromkeys(finding.update for finding in report.findings))[:MOST_UPDATES]
    heading = "Update {}"
    if not chosen and "step" in run.updates.columns:
        norms = numbers(run.updates, "grad_norm")
        steps = numbers(run.updates, "step")
        if (norms > 0).any():
            chosen, heading = (
                [int(steps[(norms > 0).nonzero()[0]][norms[norms > 0].argmax()])],
                ("Update {}: the largest gradient of this run, for comparison"),
            )
    objective = _objective(run.meta)
    depth = run.norms["name"].nunique() if "name" in run.norms.columns else 0
    parts = []
    for place, update in enumerate(chosen):
        heavy = heavy_tokens(run, update, start=place * MOST_TOKENS)
        where = next((one.where for one in report.findings if one.update == update and one.where), None)
        numbered = [str(number) for number, one in enumerate(report.findings, 1) if one.update == update]
        chips = f' <span class="number">{", ".join(numbered)}</span>' if numbered else ""
        few = " few" if depth <= FEW_LAYERS else ""
        charts = phase(heavy, objective) if len(heavy) else ""
        parts.append(
            f'<section id="update-{update}"><h2>{heading.format(update)}{chips}</h2>{heatmap(heavy)}'
            f'<div class="charts{few}">{charts}{layers(run.norms, update, where)}</div></section>'
        )
    return "".join(parts)


def _about(meta: Mapping[str, object]) -> str:
    shown = [(name, _objective(meta) if name == "objective" else meta.get(name)) for name in ABOUT]
    labels = meta.get("labels")
    shown += list(labels.items()) if isinstance(labels, Mapping) else []
    text = " · ".join(f"{escaped(name)} {escaped(value)}" for name, value in shown if value is not None)
    return f'<p class="small">{text}</p>'


def _objective(meta: Mapping[str, object]) -> str | None:
    known = meta.get("objective")
    name = known.get("name") if isinstance(known, Mapping) else known
    return None if name is None else str(name)


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
