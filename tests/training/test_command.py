"""The command `lcogeom train`, and the studies that stand on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import lcogeom as lg
from lcogeom import cli
from lcogeom.plots import training_figure
from lcogeom.training import PRESETS

ROOT = Path(__file__).parents[2]
FEW = ["prompts=2", "samples=2", "held_out=4", "held_out_samples=1", "sketch=0"]
QUICK = [part for assignment in FEW for part in ("--set", assignment)]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lcogeom", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_help_lists_the_presets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "train", "--help") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in PRESETS)


def test_train_then_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    preset = ["train", "tiny-lco-kld", "--run", str(folder), "--updates", "2", "--seed", "3"]
    assert run(monkeypatch, *preset, *QUICK, "--set", "objective_options.beta=1", "--log", "tensorboard") == 0
    assert capsys.readouterr().out.strip() == str(folder)
    stored = json.loads((folder / "training.json").read_text())["settings"]
    assert (stored["seed"], stored["updates"], stored["objective_options"]) == (3, 2, {"beta": 1})
    assert list(folder.glob("lcogeom/events*"))

    assert run(monkeypatch, "train", "--run", str(folder), "--resume", "--updates", "4") == 0
    recorded = lg.load_run(folder)
    assert recorded.updates["step"].tolist() == [0, 1, 2, 3]
    assert recorded.meta["labels"]["variant"] == "tiny-lco-kld"
    assert recorded.updates["heldout_reward"].notna().tolist() == [True, False, False, False]


def test_a_dry_run_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "train", "qwen2.5-3b-math-lco-mse", "--dry-run") == 0
    assert "2 updates of a tiny model" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "preset: none named"),
        (["tiny-gro"], "preset: no preset 'tiny-gro'. Did you mean 'tiny-grpo'?"),
        (["tiny-grpo", "--set", "lr=1"], "no field 'lr'"),
        (["tiny-grpo", "--updates", "3"], "updates: 3 is no multiple of 2"),
        (["tiny-grpo", "--set", "task=division"], "division"),
        (["tiny-grpo", "--set", "model=./nowhere"], "model: no folder './nowhere'"),
        (["tiny-grpo", "--log", "paper"], "--log: 'paper'; must be one of"),
        (["--resume", "tiny-grpo", "--run", "TAKEN"], "holds no training.json"),
        (["tiny-grpo", "--run", "TAKEN"], "exists already"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    folder = [] if "--run" in arguments else ["--run", str(tmp_path / "run")]
    given = [str(taken) if one == "TAKEN" else one for one in arguments]
    assert run(monkeypatch, "train", *given, *folder) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lcogeom: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()
    assert not list(taken.iterdir())


def test_the_study_and_its_figure(tmp_path: Path) -> None:
    """Two methods, two seeds, on runs made beforehand with a handful of completions."""
    from lcogeom.training import override, preset
    from lcogeom.training.trainer import train

    runs = tmp_path / "runs"
    for method in ("grpo", "sft"):
        for seed in (0, 1):
            settings = override(preset(f"tiny-{method}"), [*FEW, "updates=4", "evaluate_every=2", f"seed={seed}"])
            train(settings, runs / "addition-1" / method / f"seed-{seed}")
    command = [sys.executable, "analysis/training.py", "--methods", "grpo", "sft", "--tasks", "addition-1"]
    command += ["--seeds", "2", "--runs", str(runs), "--out", str(tmp_path / "table.csv")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "grpo" in done.stdout
    rows = pd.read_csv(tmp_path / "table.csv")
    assert rows.groupby(["method", "seed"])["rollouts"].apply(list).tolist() == [[0.0, 4.0, 8.0]] * 4
    figure = training_figure(rows)
    assert len(figure.axes[0].lines) == 2
    figure.savefig(tmp_path / "training.pdf")
    with pytest.raises(ValueError, match="no column 'task'"):
        training_figure(rows.drop(columns="task"))
