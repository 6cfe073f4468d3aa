"""The command line: what it prints, and one clear line and exit code 2 on bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import lcogeom as lg
from lcogeom import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lcogeom", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_installed_command(tmp_path: Path) -> None:
    command = [
        Path(sys.executable).with_name("lcogeom"),
        "replay",
        "tiny",
        "--updates",
        "2",
        "--objectives",
        "sft,ppo:positive",
    ]
    done = subprocess.run(
        [*command, "--run", str(tmp_path / "run")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "run")
    assert lg.load_run(tmp_path / "run").updates.groupby("variant").size().to_dict() == {"ppo:positive": 2, "sft": 2}


@pytest.mark.parametrize("arguments", [["--help"], ["replay", "--help"]])
def test_help(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, *arguments) == 0
    assert "replay" in capsys.readouterr().out


def encoder(folder: Path) -> Path:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def broken_file(folder: Path) -> Path:
    file = folder / "problems.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer"\n')
    return file


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no model", "no folder"),
        ("encoder", "no causal LM head"),
        ("existing run", "exists already"),
        ("broken line", "problems.jsonl line 2"),
        ("no file", "no file"),
        ("objective", "no objective 'pop'. Did you mean 'ppo'?"),
        ("updates", "updates: 0; must be at least 1"),
        ("tap", "tap: 'both'"),
    ],
)
def test_bad_input(
    case: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    if case == "existing run":
        out.mkdir()
        (out / "kept").write_text("mine")
    arguments = {
        "no model": lambda: [str(tmp_path / "nowhere")],
        "encoder": lambda: [str(encoder(tmp_path / "bert"))],
        "existing run": lambda: ["tiny"],
        "broken line": lambda: ["tiny", "--problems", str(broken_file(tmp_path))],
        "no file": lambda: ["tiny", "--problems", str(tmp_path / "none.jsonl")],
        "objective": lambda: ["tiny", "--objectives", "pop"],
        "updates": lambda: ["tiny", "--updates", "0"],
        "tap": lambda: ["tiny", "--tap", "both"],
    }[case]()
    assert run(monkeypatch, "replay", *arguments, "--run", str(out)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lcogeom: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert [path.name for path in out.iterdir()] == ["kept"] if case == "existing run" else not out.exists()


def test_an_unknown_option(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "replay", "--speed", "9") == 2
