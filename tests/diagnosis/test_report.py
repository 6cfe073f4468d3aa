"""The report in words: JSON, Markdown, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lcogeom as lg
from lcogeom.diagnosis.writing import code, plain
from tests.diagnosis.synthetic import Columns, write
from tests.diagnosis.test_rules import AT, one_huge_advantage


def hostile(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
    if update == AT:
        one_huge_advantage(tokens, row, norms)
        tokens["text"][tokens["sequence"] == 3] = "<script>`a|b`\n\x1b[2J"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path / "run", hostile)


def test_json(run: Path) -> None:
    report = lg.diagnose(run)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (found["cause"], found["update"]) == ("advantage-outlier", AT)
    first = found["findings"][0]
    assert set(first) >= {
        "cause",
        "update",
        "evidence",
        "share",
        "tokens",
        "confidence",
        "remedy",
        "sentence",
        "follows",
    }
    assert first["tokens"][0]["text"] == "<script>`a|b`\n\x1b[2J"
    assert first["evidence"][0]["column"] == "advantage"
    assert first["evidence"][0]["value"] == pytest.approx(60.0)


def test_markdown(run: Path) -> None:
    text = lg.diagnose(run).to_markdown()
    assert text.startswith("# One advantage is far outside all others (update 10)")
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("| 3 |")]
    assert rows
    assert all("``<script>`a\\|b`\\n\\x1b[2J``" in row for row in rows)
    healthy = lg.diagnose(write(run.parent / "healthy")).to_markdown()
    assert healthy.startswith("# No finding")


def test_markdown_escapes() -> None:
    assert plain("a <b> *c* [d](e) `f`") == "a \\<b\\> \\*c\\* \\[d\\](e) \\`f\\`"
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"


def test_the_command(run: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"report.{name}" for name in ("json", "markdown", "html")}
    options = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    command = [sys.executable, "-m", "lcogeom.cli", "diagnose", str(run)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "One advantage is far outside all others" in done.stdout
    assert "update 10" in done.stdout
    assert "Try: " in done.stdout
    assert "\x1b" not in done.stdout
    assert json.loads(files["json"].read_text())["cause"] == "advantage-outlier"
    assert files["markdown"].read_text() == lg.diagnose(run).to_markdown()
    assert files["html"].read_text().startswith("<!DOCTYPE html>")
    for bad in (["nowhere"], [str(run), "--json", str(tmp_path / "no" / "x.json")]):
        failed = subprocess.run([*command[:4], *bad], check=False, capture_output=True, text=True)
        assert failed.returncode == 2
        assert len(failed.stderr.strip().splitlines()) == 1
