"""Two processes train as one does: DDP and FSDP2 over gloo, placed by Accelerate."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lcogeom as lg
from lcogeom.training.trainer import train
from tests.training.runs import last_weights
from tests.training.two_processes import METHODS

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
ROOT = Path(__file__).parents[2]


def in_two_processes(folder: Path, how: str, names: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "tests.training.two_processes", str(folder), how, *names]
    running = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in running:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said[-3000:]


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("fsdp", ["grpo", "lco-kld"]),
        pytest.param("ddp", ["grpo", "lco-kld", "ppo"], marks=pytest.mark.slow),
        pytest.param("fsdp", ["ppo"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_does(how: str, names: list[str], tmp_path: Path) -> None:
    in_two_processes(tmp_path, how, names)
    for name in names:
        compare(tmp_path / f"{name}-{how}", train(METHODS[name], tmp_path / name))


def compare(two: Path, one: Path) -> None:
    a, b = lg.load_run(two).updates, lg.load_run(one).updates
    assert a["step"].tolist() == b["step"].tolist() == [0, 1, 2, 3]
    for column in ("reward", "heldout_reward", "heldout_reward_after", "rollouts", "tokens"):
        assert a[column].dropna().tolist() == b[column].dropna().tolist(), column
    for column in ("loss", "grad_norm", "logprob", "convex_share"):
        np.testing.assert_allclose(a[column], b[column], rtol=2e-4, atol=1e-6, err_msg=f"{two.name} {column}")
    for part in ("policy", *(["critic"] if "ppo" in one.name else [])):
        there, here = last_weights(two, part), last_weights(one, part)
        assert there.keys() == here.keys()
        for name, weight in here.items():
            torch.testing.assert_close(there[name], weight, rtol=1e-3, atol=1e-5, msg=f"{two.name} {name}")
