"""A disk that is full, read-only or gone: training goes on, one warning, and no update is lost that need not be.

The disk is a tmpfs of one MiB where this may be mounted (as root on Linux); a limit on file sizes does it elsewhere.
"""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lcogeom as lg
from lcogeom.runs import RunWriter, store
from tests.runs.folders import add, write
from tests.small_models import build, loss_of, make_task, tell


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path) -> Path:
    """Take all room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            for size in (4096, 1):
                while file.write(b"\0" * size):
                    pass
        except OSError:
            pass
    return ballast


def messages(told: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in told if "run '" in str(warning.message)]


def test_training_goes_on(small_disk: Path, device: torch.device) -> None:
    """The disk fills up in the middle of a recorded run, and later has room again."""

    def train(run: Path | None) -> list[torch.Tensor]:
        model = build("llama", device)
        task, objective = make_task(model), lg.objective("ppo")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        probe = None if run is None else lg.attach(model, optimizer, run, objective=objective, sketch=64, flush_every=2)
        for step in range(12):
            if probe is not None:
                tell(probe, task)
                if step == 4:
                    fill(small_disk)
                if step == 8:
                    assert lg.load_run(run).updates["step"].tolist() == [0, 1, 2, 3]
                    (small_disk / "ballast").unlink()
            loss_of(model, task, objective).backward()
            optimizer.step()
            optimizer.zero_grad()
        if probe is not None:
            probe.close()
        return [parameter.detach() for parameter in model.parameters()]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recorded = train(small_disk / "run")
    [message] = messages(told)
    assert "cannot be written (No space left on device)" in message
    assert "make room" in message
    assert all(torch.equal(one, other) for one, other in zip(recorded, train(None), strict=True))
    run = lg.load_run(small_disk / "run")
    assert run.damaged == ()
    assert run.updates["step"].tolist() == list(range(12))
    assert (run.tokens.groupby("step").size() == len(run.tokens) // 12).all()
    assert sorted(run.norms["step"].unique()) == list(range(12))
    assert not list((small_disk / "run").rglob(".part-*"))


def test_full_until_the_end(small_disk: Path) -> None:
    writer = RunWriter(small_disk / "run", {})
    add(writer, range(4))
    ballast = fill(small_disk)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        add(writer, range(4, 10))
        writer.close()
    assert len(messages(told)) == 2
    assert "6 updates, of 4 to 9, are lost" in messages(told)[1]
    ballast.unlink()
    run = lg.load_run(small_disk / "run")
    assert run.updates["step"].tolist() == [0, 1, 2, 3]
    assert run.damaged == ()
    RunWriter(small_disk / "run", {}, resume=True).close()  # the lock was let go


def test_no_more_than_so_much_is_kept(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest updates are dropped, whole; close() says how many."""
    monkeypatch.setattr(store, "PENDING_BYTES", 100_000)
    writer = RunWriter(small_disk / "run", {})
    add(writer, range(2))
    ballast = fill(small_disk)
    with pytest.warns(UserWarning, match="No space left"):
        add(writer, range(2, 200), per_part=10)
    kept = sum(rows.nbytes for pending in writer._pending.values() for rows in pending)
    assert 50_000 < kept <= 100_000
    ballast.unlink()
    with pytest.warns(UserWarning, match=r"updates, of 2 to \d+, are lost, because .*No space left") as told:
        writer.close()
    run = lg.load_run(small_disk / "run")
    steps = run.updates["step"].tolist()
    first = steps[2]
    assert steps == [0, 1, *range(first, 200)]
    assert f"{first - 2} updates, of 2 to {first - 1}, are lost" in str(told[0].message)
    assert sorted(run.tokens["step"].unique()) == steps
    assert (run.tokens.groupby("step").size() == 3).all()


def test_a_read_only_disk(small_disk: Path) -> None:
    writer = RunWriter(small_disk / "run", {})
    add(writer, range(2))
    writer._lock._file.close()  # a file open for writing keeps this disk from being made read-only; an error would not
    writer._lock._file = open("/dev/null")  # noqa: SIM115
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.warns(UserWarning, match="Read-only file system"):
        add(writer, range(2, 4))
    assert len(lg.load_run(small_disk / "run").updates) == 2
    with pytest.raises(OSError, match="Read-only file system"):
        RunWriter(small_disk / "other", {})
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    writer.close()
    assert len(lg.load_run(small_disk / "run").updates) == 4


def test_a_new_folder_on_a_full_disk(small_disk: Path) -> None:
    write(small_disk / "old", 2)
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        RunWriter(small_disk / "run", {"labels": {"text": "x" * 10_000}})
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "old"]
    with pytest.raises(OSError, match="No space left"):
        RunWriter(small_disk / "old", {}, resume=1)
    assert lg.load_run(small_disk / "old").updates["step"].tolist() == [0, 1]


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """Needs no root: files may not grow beyond 5 kB, then may again."""
    writer = RunWriter(tmp_path / "run", {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    add(writer, range(2))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        with pytest.warns(UserWarning, match="File too large"):
            add(writer, range(2, 6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert lg.load_run(tmp_path / "run").updates["step"].tolist() == [0, 1]
    assert len(list((tmp_path / "run").rglob("*.parquet"))) == 4  # small ones did fit: they are taken back, for room
    writer.close()
    run = lg.load_run(tmp_path / "run")
    assert run.updates["step"].tolist() == list(range(6))
    assert run.damaged == ()


def test_the_folder_is_deleted(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    add(writer, range(2))
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="No such file or directory.*bring the folder back"):
        add(writer, range(2, 4))
    shutil.move(tmp_path / "elsewhere", tmp_path / "run")
    writer.flush()
    assert lg.load_run(tmp_path / "run").updates["step"].tolist() == [0, 1, 2, 3]
    add(writer, range(4, 6))
    shutil.rmtree(tmp_path / "run")
    with pytest.warns(UserWarning, match="2 updates, of 6 to 7, are lost"):
        add(writer, range(6, 8))
        writer.close()
    assert not (tmp_path / "run").exists()


def test_a_warning_made_an_error_loses_nothing(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    add(writer, range(2))
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="cannot be written"):
            add(writer, range(2, 4))
        shutil.move(tmp_path / "elsewhere", tmp_path / "run")
        writer.close()
    assert lg.load_run(tmp_path / "run").updates["step"].tolist() == [0, 1, 2, 3]
    RunWriter(tmp_path / "run", {}, resume=True).close()
