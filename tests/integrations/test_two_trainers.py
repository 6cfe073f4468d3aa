"""The callback in trainers that two processes run together, over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lcogeom as lg
from lcogeom.integrations.transformers import RecorderCallback
from tests.integrations.trainers import run, sft


def in_two_processes(folder: Path, kind: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[2]
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.integrations.two_trainers", str(folder), kind]
    running = []
    for rank in ("0", "1"):
        own = {**os.environ, **places, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(root)}
        running.append(subprocess.Popen(command, cwd=root, env=own, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFTTrainer", "GRPOTrainer"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    in_two_processes(tmp_path, kind)
    assert [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)] == ["True 2 3"] * 2
    two = lg.load_run(tmp_path / "run")
    assert two.updates["tokens"].tolist() == two.tokens.groupby("step").size().tolist()
    assert two.tokens.groupby("step")["sequence"].nunique().tolist() == [4] * 3
    assert two.tokens["text"].notna().all()
    if kind == "SFTTrainer":
        alone = sft(tmp_path / "alone", 3)
        alone.add_callback(RecorderCallback(tmp_path / "one", tokens_per_update=1000))
        run(alone)
        one = lg.load_run(tmp_path / "one")
        for column in ("loss", "grad_norm", "update_norm", "logprob", "logit_grad_norm"):
            np.testing.assert_allclose(two.updates[column], one.updates[column], rtol=5e-3, err_msg=column)
