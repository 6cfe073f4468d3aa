"""A killed run goes on bit for bit; a run that meets a NaN stops with its black box."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lcogeom as lg
from lcogeom.training import TrainSettings, checkpoint
from lcogeom.training.trainer import train
from lcogeom.training.update import TrainingStopped
from tests.training.runs import last_weights, small

ROOT = Path(__file__).parents[2]
KILLED = """
import os, sys
from pathlib import Path
from lcogeom.training.trainer import train
from tests.training.test_resume import SETTINGS
at = int(sys.argv[3])
train(SETTINGS[sys.argv[1]], sys.argv[2], progress=lambda row: row["step"] == at and os.kill(os.getpid(), 9))
"""
MORE = {"updates": 8, "checkpoint_every": 2, "warmup": 0.5, "schedule": "cosine", "weight_decay": 0.1}
SETTINGS = {
    "lco-kld": small("tiny-lco-kld", **MORE, micro_batches=2),
    "ppo": small("tiny-ppo", **MORE, mini_batches=2, inner_epochs=1),
    "lora": small("tiny-grpo", **MORE, lora_rank=2, old_policy="topk"),
}


def start_and_kill(name: str, run: Path, at: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, name, str(run), str(at)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def require_same(name: str, settings: TrainSettings, straight: Path, resumed: Path) -> None:
    for part in ("policy", "optimizer", *(["critic", "critic_optimizer"] if settings.advantages == "gae" else [])):
        a, b = last_weights(straight, part), last_weights(resumed, part)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == [], (name, part)
    one, two = (lg.load_run(run).updates for run in (straight, resumed))
    assert two["step"].tolist() == list(range(settings.updates))
    for column in ("loss", "reward", "heldout_reward_after", "learning_rate"):
        assert one[column].dropna().tolist() == two[column].dropna().tolist(), column


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stopped_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Stopped by an error in the caller, at each kind of place: before the first checkpoint, at one, between two."""
    settings = SETTINGS[name]
    straight = train(settings, tmp_path / "straight")
    at = {"lco-kld": 0, "ppo": 3, "lora": 4}[name]

    def stop(row: object) -> None:
        if row["step"] == at:  # type: ignore[index]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "stopped", progress=stop)
    assert len(checkpoint.complete(tmp_path / "stopped")) == at // 2
    require_same(name, settings, straight, train(settings, tmp_path / "stopped", resume=True))


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = train(SETTINGS["ppo"], tmp_path / "straight")
    start_and_kill("ppo", tmp_path / "killed", random.Random(0).randrange(1, 7))
    require_same("ppo", SETTINGS["ppo"], straight, train(SETTINGS["ppo"], tmp_path / "killed", resume=True))


@pytest.mark.slow
def test_killed_at_ten_updates(tmp_path: Path) -> None:
    draw = random.Random()
    for name, settings in SETTINGS.items():
        straight = train(settings, tmp_path / f"{name}-straight")
        for attempt in range(4):
            at = draw.randrange(8)
            killed = tmp_path / f"{name}-{attempt}"
            start_and_kill(name, killed, at)
            require_same(f"{name}, killed at {at}", settings, straight, train(settings, killed, resume=True))


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    settings = small("tiny-grpo", checkpoint_every=2)
    run = train(settings, tmp_path / "run")
    half = run / checkpoint.FOLDER / ".step-000009-x"
    half.mkdir()
    (half / "state.json").write_text("{")
    assert [found.name for found in checkpoint.complete(run)] == ["step-000002", "step-000004"]
    more = small("tiny-grpo", checkpoint_every=2, updates=6)
    train(more, run, resume=True)
    assert [found.name for found in checkpoint.complete(run)] == ["step-000004", "step-000006"]
    assert not half.exists()


def test_a_run_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    run = train(small("tiny-grpo"), tmp_path / "run")
    with pytest.raises(FileExistsError, match="exists already"):
        train(small("tiny-grpo"), run)
    with pytest.raises(ValueError, match=r"resume: learning_rate was 0.0003 .* and is 0.1 now"):
        train(small("tiny-grpo", learning_rate=0.1), run, resume=True)


def test_nan_stops_the_run_with_its_batch(tmp_path: Path) -> None:
    """A weight is poisoned between two updates: the third update's loss is NaN, and no step is made of it."""
    loaded = lg.load_model("tiny", device="cpu")
    weight = loaded.model.lm_head.weight

    def poison(row: object) -> None:
        if row["step"] == 2:  # type: ignore[index]
            with torch.no_grad():
                weight[3] = torch.nan

    settings = small("tiny-grpo", inner_epochs=4, checkpoint_every=1)
    with pytest.raises(TrainingStopped, match=r"update 3: the loss is nan .* black box"):
        train(settings, tmp_path / "run", progress=poison, loaded=loaded)
    run = lg.load_run(tmp_path / "run")
    assert run.updates["step"].tolist() == [0, 1, 2]
    (entry,) = run.black_box()
    assert entry.step == 3
    assert entry.batches
