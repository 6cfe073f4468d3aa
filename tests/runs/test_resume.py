"""Going on in a folder: no gap, no double row, and nothing deleted when training goes on from an older checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import lcogeom as lg
from lcogeom.runs import COLLECTION, RunWriter, create_folder
from tests.runs.folders import add, part_file, write


def go_on(path: Path, resume: bool | int, steps: int, loss: float = 0.0) -> RunWriter:
    """`steps` more updates, flushed, and as if killed then: the lock is let go, nothing else."""
    writer = RunWriter(path, {}, resume=resume)
    add(writer, range(writer.next_update, writer.next_update + steps), loss=loss)
    writer._lock.release()
    return writer


def contents(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and file.name != "writer.lock"
    }


def losses(path: Path) -> list[float]:
    """Of the updates; each is there once, in order, with its tokens and norms."""
    run = lg.load_run(path)
    assert run.damaged == ()
    steps = run.updates["step"].tolist()
    assert steps == sorted(set(steps))
    assert run.tokens["step"].tolist() == [step for step in steps for _ in range(3)]
    assert run.norms["step"].tolist() == [step for step in steps for _ in range(2)]
    return run.updates["loss"].tolist()


def test_after_the_last_update(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert go_on(path, True, 3).next_update == 0  # the first time: nothing to go on from
    before = contents(path)
    writer = go_on(path, True, 4)
    assert (writer.next_update, writer.seconds) == (3, 6.0)
    assert losses(path) == [0, 1, 2, 3, 4, 5, 6]
    assert before.items() <= contents(path).items()


def test_from_an_older_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 7)
    before = contents(path)
    writer = RunWriter(path, {}, resume=3)
    assert (writer.next_update, writer.seconds) == (3, 6.0)
    assert losses(path) == [0, 1, 2]  # before the first new row too: update 3 is to be made again
    add(writer, range(3, 5), loss=100)
    writer.close()
    assert losses(path) == [0, 1, 2, 103, 104]
    assert before.items() <= contents(path).items()
    go_on(path, True, 2, loss=200)
    assert losses(path) == [0, 1, 2, 103, 104, 205, 206]
    go_on(path, 4, 1, loss=300)
    assert losses(path) == [0, 1, 2, 103, 304]
    go_on(path, 0, 1, loss=400)
    assert losses(path) == [400]
    assert before.items() <= contents(path).items()


def test_superseded_and_then_damaged(tmp_path: Path) -> None:
    """A part tells by its name what it supersedes: its damage brings no old row back, and old damage is no news."""
    path = write(tmp_path / "run", 6)
    assert go_on(path, 2, 2, loss=100).seconds == 4.0
    old = part_file(path, "updates", 2)  # updates 4 and 5 of the first time
    old.write_bytes(b"")
    assert losses(path) == [0, 1, 102, 103]
    part_file(path, "updates", 3).write_bytes(b"")  # of no rows: its name says all
    assert losses(path) == [0, 1, 102, 103]
    part_file(path, "updates", 4).write_bytes(b"")
    with pytest.warns(UserWarning, match="updates 2 to 3 lost"):
        run = lg.load_run(path)
    assert run.updates["step"].tolist() == [0, 1]
    writer = go_on(path, True, 2)  # the numbers are the trainer's: 2 and 3 were made, if not to be read any more
    assert writer.next_update == 4


def test_damage_names_what_is_missing_now(tmp_path: Path) -> None:
    """Updates 4 to 7 were in one part, and 6 and 7 are superseded: the damage of that part costs 4 and 5."""
    path = write(tmp_path / "run", 8, per_part=4)
    go_on(path, 6, 1, loss=100)
    for table, said in (("tokens", "updates 4 to 5 lost their tokens"), ("updates", "updates 4 to 5 lost")):
        part_file(path, table, 1).write_bytes(b"")
        with pytest.warns(UserWarning, match=said + "$"):
            run = lg.load_run(path)
        assert sorted(run.tokens["step"].unique()) == [0, 1, 2, 3, 6]
    assert run.updates["loss"].tolist() == [0, 1, 2, 3, 106]


def test_updates_that_were_never_written(tmp_path: Path) -> None:
    """The checkpoint is ahead of the last flush: the gap is said, and stays a gap."""
    path = write(tmp_path / "run", 4)
    with pytest.warns(UserWarning, match="last update in .* is 3; those from there to 6"):
        go_on(path, 6, 2)
    assert losses(path) == [0, 1, 2, 3, 6, 7]


def test_a_recorder_that_never_started_leaves_no_trace(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 4)
    before = contents(path)
    writer = RunWriter(path, {}, resume=1)
    assert losses(path) == [0.0]
    writer.discard()
    assert contents(path) == before
    assert losses(path) == [0, 1, 2, 3]
    writer = RunWriter(tmp_path / "new", {})
    writer.discard()
    assert not (tmp_path / "new").exists()


def test_the_folder_keeps_its_own_run_json(tmp_path: Path) -> None:
    """And its copies are of that one, whatever the second session called itself."""
    path = write(tmp_path / "run", 2, labels={"seed": 1})
    writer = RunWriter(path, {"labels": {"seed": 2}, "tokens_per_update": 3}, resume=True)
    add(writer, range(2, 4))
    writer.close()
    meta = lg.load_run(path).meta
    assert meta["labels"] == {"seed": 1}
    (path / "run.json").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"run\.json"):
        assert lg.load_run(path).meta == meta


def test_half_parts_are_tidied_away(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 4)
    before = contents(path)
    (path / "tokens" / ".part-000002.4-6.00000000.parquet").write_bytes(b"PAR1")
    (path / "tokens" / "part-000007.4-6.00000000.parquet").write_bytes(b"")  # a flush without its last part
    go_on(path, True, 0)
    assert set(contents(path)) == {*before, "tokens/part-000007.4-6.00000000.parquet"}
    go_on(path, True, 2)
    assert part_file(path, "updates", 8).exists()  # a number that nobody used
    assert losses(path) == [0, 1, 2, 3, 4, 5]


def test_what_cannot_be_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run"
    meta = {"objective": {"name": "ppo", "options": {"clip": (0.1, 0.2)}}, "sketch": 64}
    RunWriter(path, meta).close()
    RunWriter(path, meta, resume=True, same=["objective", "sketch", "new in this version"]).close()
    with pytest.raises(ValueError, match=r"run: .* was recorded with sketch=64, not 128\. Attach with the same"):
        RunWriter(path, meta | {"sketch": 128}, resume=True, same=["objective", "sketch"])
    with pytest.raises(ValueError, match="resume: -1"):
        RunWriter(path, meta, resume=-1)
    with pytest.raises(TypeError):
        RunWriter(path, meta, resume=1.5)  # type: ignore[arg-type]
    with pytest.raises(FileExistsError, match="exists already"):
        RunWriter(path, meta)
    create_folder(tmp_path / "all", {}, kind=COLLECTION)
    with pytest.raises(ValueError, match="is a collection"):
        RunWriter(tmp_path / "all", meta, resume=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        RunWriter(tmp_path / "other", meta, resume=True)
    assert list((tmp_path / "other").iterdir()) == []
