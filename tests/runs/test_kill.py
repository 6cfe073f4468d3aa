"""SIGKILL a real replay at a random moment: the folder loads, and holds every update that was flushed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lcogeom as lg

KILLS = 20
SCRIPT = """
import sys
from lcogeom.training import ReplaySettings, replay
settings = ReplaySettings(objectives=("ppo", "lco-kld", "sft"), updates=25, seeds=50)
replay(settings, sys.argv[1])
"""


def kill_one(folder: Path, delay: float) -> lg.Run:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not folder.exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it was still running
    return lg.load_run(folder)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    draw = random.Random(0)
    # The first kills come at once, into the making of the folders; the others spread over several runs of the replay.
    delays = [0.0, 0.02] + [draw.uniform(0.0, 4.0) for _ in range(KILLS - 2)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = list(pool.map(lambda job: kill_one(tmp_path / f"run-{job[0]}", job[1]), enumerate(delays)))
    assert len(runs) == KILLS
    for run in runs:
        assert run.damaged == ()
        if run.updates.empty:
            continue
        for _, one in run.updates.groupby(["variant", "seed"]):
            assert one["step"].tolist() == list(range(len(one)))  # no gap
            assert len(one) % 10 == 0 or len(one) == 25  # whole flushes
        with_tokens = run.tokens.groupby(["variant", "seed"])["step"].nunique()
        assert (with_tokens == run.updates.groupby(["variant", "seed"]).size()).all()
    assert sum(not run.updates.empty for run in runs) >= KILLS // 2
