"""One writer to a folder, in real processes; the lock ends with the process, and readers need none."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import lcogeom as lg
from lcogeom.runs import RunWriter
from lcogeom.runs import lock as lock_module
from tests.runs.folders import add, write

HOLD = """
import os, sys, time
from lcogeom.runs import RunWriter
writer = RunWriter(sys.argv[1], {}, resume=True)
if sys.argv[2] == "fork" and os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(600)  # a worker that outlives the trainer
if sys.argv[2] == "alone":
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def hold(path: Path, how: str) -> tuple[subprocess.Popen[str], int]:
    """A process that records, and the id it (or its fork) said when it held the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_two_writers_in_one_process(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = RunWriter(path, {})
    with pytest.raises(BlockingIOError, match=rf"run: .* is being recorded by process {os.getpid()} on "):
        RunWriter(path, {}, resume=True)
    add(first, range(2))
    assert len(lg.load_run(path).updates) == 2  # a reader needs no lock
    first.close()
    RunWriter(path, {}, resume=True).close()
    first.close()


def test_a_writer_in_another_process(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 2)
    process, holder = hold(path, "alone")
    try:
        with pytest.raises(BlockingIOError, match=rf"being recorded by process {holder} on "):
            RunWriter(path, {}, resume=True)
        assert len(lg.load_run(path).updates) == 2
    finally:
        end(process)
    RunWriter(path, {}, resume=True).close()  # let go by the operating system


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 2)
    process, worker = hold(path, "fork")
    try:
        with pytest.raises(BlockingIOError):  # the worker closed the file, and the trainer holds the lock still
            RunWriter(path, {}, resume=True)
        end(process)
        os.kill(worker, 0)  # alive
        RunWriter(path, {}, resume=True).close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_fork_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "run"
    writer = RunWriter(path, {})
    add(writer, range(2))
    child = os.fork()
    if child == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            add(writer, range(2, 4))
        os._exit(0)
    os.waitpid(child, 0)
    assert len(lg.load_run(path).updates) == 2
    add(writer, range(2, 6))
    assert len(lg.load_run(path).updates) == 6
    writer.close()


def test_a_lock_file_tidied_away(tmp_path: Path) -> None:
    path = tmp_path / "run"
    writer = RunWriter(path, {})
    (path / "writer.lock").unlink()
    add(writer, range(2))
    assert len(lg.load_run(path).updates) == 2
    with pytest.raises(BlockingIOError):
        RunWriter(path, {}, resume=True)
    writer.close()


def test_a_folder_replaced_by_another_run(tmp_path: Path) -> None:
    """Someone removes the folder of a run that goes on, and starts another one there: the first keeps out of it."""
    path = tmp_path / "run"
    writer = RunWriter(path, {})
    add(writer, range(2))
    shutil.rmtree(path)
    other = RunWriter(path, {})
    add(other, range(4), loss=100.0)
    with pytest.warns(UserWarning, match="taken over by process"):
        add(writer, range(2, 8))
    with pytest.warns(UserWarning, match="6 updates, of 2 to 7, are lost"):
        writer.close()
    assert lg.load_run(path).updates["loss"].tolist() == [100.0, 101.0, 102.0, 103.0]
    other.close()


def test_a_filesystem_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such filesystem is at hand: its answer to flock is put in place. It is said once, and recording goes on."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "flock", refuse)
    lock_module._say_that_nothing_guards.cache_clear()
    with pytest.warns(UserWarning, match="has no file locks") as told:
        writer = RunWriter(tmp_path / "run", {})
        RunWriter(tmp_path / "run", {}, resume=True).close()
    assert len(told) == 1
    writer.close()


def test_an_unexpected_answer_is_not_taken_for_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lock_module.fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        RunWriter(tmp_path / "run", {})
