"""A training loop restarted from a checkpoint: its records go on where the weights do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import lcogeom as lg
from tests.small_models import build, loss_of, make_task, tell

Checkpoint = tuple[dict, dict]


def train(
    device: torch.device,
    run: Path,
    steps: range,
    *,
    start: Checkpoint | None = None,
    resume: bool | int = False,
    save_at: int = 0,
) -> Checkpoint | None:
    """These updates, from a checkpoint; returns the one before update `save_at`. A new process in all but name."""
    model = build("llama", device)
    task, objective = make_task(model), lg.objective("ppo")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.001
    )  # small: clipped everywhere, there would be nothing to compare
    if start is not None:
        model.load_state_dict(start[0])
        optimizer.load_state_dict(start[1])
    saved = None
    with lg.attach(model, optimizer, run, objective="ppo", sketch=256, flush_every=2, resume=resume, copies=True) as p:
        for step in steps:
            if step == save_at:
                weights = {name: value.clone() for name, value in model.state_dict().items()}
                saved = weights, torch.utils._pytree.tree_map(_copy, optimizer.state_dict())
            tell(p, task)
            loss_of(model, task, objective).backward()
            optimizer.step()
            optimizer.zero_grad()
    return saved


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_a_restart_changes_no_record(tmp_path: Path, device: torch.device) -> None:
    """Interrupted after update 8, gone on from the checkpoint before update 5: as if never interrupted."""
    train(device, tmp_path / "whole", range(10))
    checkpoint = train(device, tmp_path / "run", range(9), save_at=5)
    train(device, tmp_path / "run", range(5, 10), start=checkpoint, resume=5)
    whole, run = lg.load_run(tmp_path / "whole"), lg.load_run(tmp_path / "run")
    assert run.updates["step"].tolist() == list(range(10))
    assert run.updates["seconds"].is_monotonic_increasing
    assert run.updates["seconds"].iloc[0] < run.updates["seconds"].iloc[4]
    unlike = ["seconds", "grad_cos_prev"]  # the gradient before update 5 is not in a checkpoint
    pd.testing.assert_frame_equal(run.updates.drop(columns=unlike), whole.updates.drop(columns=unlike))
    assert whole.updates["grad_cos_prev"].isna().tolist() == [True] + [False] * 9
    assert run.updates["grad_cos_prev"].isna().tolist() == [True] + [False] * 4 + [True] + [False] * 4
    pd.testing.assert_frame_equal(run.norms, whole.norms)
    pd.testing.assert_frame_equal(run.tokens, whole.tokens)
    assert np.array_equal(run.sketches().steps, whole.sketches().steps)
    assert np.array_equal(run.sketches().weights, whole.sketches().weights)


def test_the_same_command_twice(tmp_path: Path, device: torch.device) -> None:
    for start in (0, 3):
        train(device, tmp_path / "run", range(start, start + 3), resume=True)
    assert lg.load_run(tmp_path / "run").updates["step"].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"objective": "sft"}, "objective="),
        ({"objective": lg.objective("ppo", clip_high=0.3)}, "clip_high"),
        ({"tap": "logits"}, "tap="),
        ({"temperature": 0.5}, "temperature=1.0, not 0.5"),
        ({"sketch": 64}, "sketch=256, not 64"),
        ({"sketch_layers": True}, "sketch_layers=False, not True"),
        ({"labels": {"seed": 1}}, "labels="),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_recording_is_refused(
    other: dict, named: str, tmp_path: Path, device: torch.device, recorded: Path
) -> None:
    model = build("llama", device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"run: .*{named}"):
        lg.attach(model, optimizer, recorded, **({"objective": "ppo", "sketch": 256, "resume": True} | other))
    assert len(lg.load_run(recorded).updates) == 2


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "run"
    train(device, path, range(2))
    return path


def test_a_failed_attach_leaves_the_folder(recorded: Path, device: torch.device) -> None:
    model, other = build("llama", device), build("llama", device)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer"):
        lg.attach(model, foreign, recorded, objective="ppo", sketch=256, resume=1)
    assert lg.load_run(recorded).updates["step"].tolist() == [0, 1]
    lg.attach(
        model, torch.optim.SGD(model.parameters(), lr=0.1), recorded, objective="ppo", sketch=256, resume=True
    ).close()


def test_a_recorder_that_was_not_closed(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = lg.attach(model, optimizer, tmp_path / "run")
    with pytest.raises(BlockingIOError, match="being recorded by process"):
        lg.attach(model, optimizer, tmp_path / "run", resume=True)
    probe.close()
    lg.attach(model, optimizer, tmp_path / "run", resume=True).close()
