"""SIGKILL a real recording loop at random moments: the folder loads, holds every flush, and the loop goes on in it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lcogeom as lg

Record = Callable[..., list[str]]


@pytest.fixture(scope="module")
def record() -> Iterator[Record]:
    """Record in a process of its own, killed some time after so many lines of its log; returns those lines."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.runs.recording_loop"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"

    def run(folder: Path, log: Path, *, lines: int, delay: float, **how: object) -> list[str]:
        server.stdin.write(json.dumps({"folder": str(folder), "log": str(log), **how}) + "\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        deadline = time.monotonic() + 60
        while lines and (not log.exists() or log.read_text().count("\n") < lines):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert server.stdout.readline() == f"{-signal.SIGKILL}\n"  # it was still running
        return log.read_text().split("\n")[:-1] if log.exists() else []

    yield run
    server.kill()
    server.communicate()


def kill_and_go_on(folder: Path, record: Record, kills: int, draw: random.Random, seen: Counter[str]) -> None:
    """Kill and restart in one folder, some of it from older checkpoints; compare with what the log says was flushed."""
    losses: list[float] = []  # what the folder must hold
    for life in range(kills):
        flush_every = draw.choice([1, 2, 5])
        resume = draw.randrange(len(losses) + 1) if losses and draw.random() < 0.4 else True
        wait = draw.choice([0, 2, 3, 5, 8, 12])
        delay = draw.uniform(0.0, 0.1 if wait else 0.3)
        log = folder.parent / f"{folder.name}.{life}.log"
        how = {"resume": resume, "loss": 1000.0 * life, "flush_every": flush_every}
        lines = record(folder, log, lines=wait, delay=delay, **how)
        seen["kills"] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                run = lg.load_run(folder)
            except FileNotFoundError:
                assert not folder.exists()  # killed before there was one
                assert lines == losses == []
                continue
        there = run.updates["loss"].tolist()
        assert run.damaged == ()
        first = len(losses) if resume is True else int(resume)
        if not lines and there == losses:  # killed before it went on
            seen["before the first update"] += 1
            continue
        assert lines[:1] in ([], [f"from {first}"])
        made = max(0, len(lines) - 1)
        flushed = made - made % flush_every
        new = there[first:]
        assert flushed <= len(new) <= made + 1  # killed after the flush, before the log
        assert len(new) % flush_every == 0
        losses = losses[:first] + [1000.0 * life + step for step in range(first, first + len(new))]
        assert there == losses
        assert run.updates["step"].tolist() == list(range(len(losses)))
        assert run.updates["seconds"].is_monotonic_increasing
        if losses:
            counts = run.tokens.groupby("step").size()
            assert counts.index.tolist() == list(range(len(losses)))
            assert counts.nunique() == 1
            assert run.norms.groupby("step").size().nunique() == 1
            assert len(run.sketches().steps) == len(losses)
        seen["updates"] += len(new)
        seen["from an older checkpoint"] += resume is not True
        seen["in the middle of a flush"] += left_over(folder)
        seen["flushed, not yet logged"] += len(new) > flushed


def left_over(folder: Path) -> bool:
    """Whether the last flush was cut short: half a file, or parts without their `updates` part."""
    numbers = {table: {name.name[:11] for name in (folder / table).glob("part-*")} for table in ("sketches", "updates")}
    last = max(numbers["sketches"], default="")
    return bool(list(folder.rglob(".part-*"))) or last not in numbers["updates"] | {""}


def test_killed_at_random_moments(tmp_path: Path, record: Record) -> None:
    draw, seen = random.Random(0), Counter[str]()
    for number in range(3):
        kill_and_go_on(tmp_path / f"run-{number}", record, 4, draw, seen)
    assert seen["kills"] == 12
    assert seen["updates"] > 12


@pytest.mark.slow
def test_killed_200_times(tmp_path: Path, record: Record) -> None:
    draw, seen = random.Random(1), Counter[str]()
    for number in range(20):
        kill_and_go_on(tmp_path / f"run-{number}", record, 10, draw, seen)
    print(dict(seen))
    assert seen["kills"] == 200
    assert seen["in the middle of a flush"] > 3


REPLAY = """
import sys
from lcogeom.training import ReplaySettings, replay
settings = ReplaySettings(objectives=("ppo", "lco-kld", "sft"), updates=25, seeds=50)
replay(settings, sys.argv[1])
"""


def kill_replay(folder: Path, delay: float) -> lg.Run:
    process = subprocess.Popen(
        [sys.executable, "-c", REPLAY, str(folder)], stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stderr is not None
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


@pytest.mark.slow
def test_a_replay_is_killed(tmp_path: Path) -> None:
    """A collection of run folders, the first kills in the making of them."""
    draw = random.Random(0)
    delays = [0.0, 0.02] + [draw.uniform(0.0, 4.0) for _ in range(18)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = list(pool.map(lambda job: kill_replay(tmp_path / f"run-{job[0]}", job[1]), enumerate(delays)))
    for run in runs:
        assert run.damaged == ()
        if run.updates.empty:
            continue
        for _, one in run.updates.groupby(["variant", "seed"]):
            assert one["step"].tolist() == list(range(len(one)))  # no gap
            assert len(one) % 10 == 0 or len(one) == 25  # whole flushes
        with_tokens = run.tokens.groupby(["variant", "seed"])["step"].nunique()
        assert (with_tokens == run.updates.groupby(["variant", "seed"]).size()).all()
    assert sum(not run.updates.empty for run in runs) >= 10
