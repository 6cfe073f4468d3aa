"""Flipped bytes, cut files, files that are gone: all else loads, and what is missing is said."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

import lcogeom as lg
from lcogeom.runs import COLLECTION, TABLES, create_folder
from tests.runs.folders import part_file, write

TRIALS = 200
STEPS, PER_PART = 6, 2


def loaded(path: Path) -> lg.Run:
    """The run, whose every damage was told in a warning."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = lg.load_run(path)
    assert [str(warning.message) for warning in told] == [f"run {str(path)!r}: {line}" for line in run.damaged]
    return run


def hurt(file: Path, draw: random.Random) -> bytes:
    """Cut the file somewhere, or change one to eight of its bytes anywhere; returns what it was."""
    whole = file.read_bytes()
    if draw.random() < 0.4:
        file.write_bytes(whole[: draw.randrange(len(whole))])
        return whole
    content = bytearray(whole)
    for place in draw.sample(range(len(content)), draw.choice([1, 1, 1, 2, 8])):
        content[place] ^= draw.randrange(1, 256)
    file.write_bytes(content)
    return whole


@pytest.mark.parametrize("table", TABLES)
def test_cuts_and_flips_in_the_last_part(table: str, tmp_path: Path) -> None:
    path = write(tmp_path / "run", STEPS, PER_PART)
    last = part_file(path, table, STEPS // PER_PART - 1)
    whole = loaded(path)
    draw = random.Random(table)
    for _ in range(TRIALS // len(TABLES)):
        content = hurt(last, draw)
        run = loaded(path)
        for other in ("updates", "tokens", "norms"):
            kept = getattr(whole, other)
            if table in (other, "updates"):
                kept = kept[kept["step"] < STEPS - PER_PART]
            pd.testing.assert_frame_equal(getattr(run, other), kept)
        if table == "sketches":  # read, and checked, when they are asked for
            assert run.damaged == ()
            with pytest.raises(ValueError, match=f"{last.name}: damaged.*; updates 4 to 5 lost their sketches"):
                run.sketches()
        else:
            lost = "lost" if table == "updates" else f"lost their {table}"
            [line] = run.damaged
            assert line.startswith(f"run/{table}/{last.name}: damaged")
            assert line.endswith(f"; updates 4 to 5 {lost}")
        last.write_bytes(content)
    assert loaded(path).damaged == ()


def test_cuts_and_flips_in_run_json(tmp_path: Path) -> None:
    """What run.json said is read from the copy in the parts."""
    path = write(tmp_path / "run", 4, labels={"variant": "ppo", "seed": 3})
    whole, draw = loaded(path), random.Random(0)
    noticed, trials = 0, 60
    for _ in range(trials):
        content = hurt(path / "run.json", draw)
        run = loaded(path)
        known = {key: run.meta[key] for key in whole.meta}
        assert known == whole.meta
        assert len(run.updates) == 4
        noticed += len(run.damaged)
        (path / "run.json").write_bytes(content)
    assert noticed > 0.9 * trials  # the others changed white space, or the name of the check


def test_run_json_gone_or_damaged_without_a_copy(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 2)
    (path / "run.json").unlink()
    run = loaded(path)
    assert len(run.updates) == 2
    assert "run.json" in run.damaged[0]
    bare = create_folder(tmp_path / "bare", {})
    (bare / "run.json").write_text("{")
    with pytest.raises(ValueError, match="no part keeps a copy"):
        lg.load_run(bare)


def test_run_json_edited_on_purpose(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 2, labels={"seed": 1})
    meta = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(meta | {"labels": {"seed": 2}}))
    run = loaded(path)
    assert run.meta["labels"] == {"seed": 1}  # taken for damage: the copy counts
    assert "take 'check' out" in run.damaged[0]
    meta.pop("check")
    (path / "run.json").write_text(json.dumps(meta | {"labels": {"seed": 2}}))
    run = loaded(path)
    assert run.meta["labels"] == {"seed": 2}
    assert run.damaged == ()


def test_a_part_that_is_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 6)
    part_file(path, "tokens", 1).unlink()
    run = loaded(path)
    assert run.updates["step"].tolist() == list(range(6))
    assert sorted(run.tokens["step"].unique()) == [0, 1, 4, 5]
    [line] = run.damaged
    assert "No such file" in line
    assert "updates 2 to 3 lost their tokens" in line


def test_a_damaged_part_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 6)
    part = part_file(path, "updates", 1)
    part.write_bytes(part.read_bytes()[:-20])
    run = loaded(path)
    assert run.updates["step"].tolist() == [0, 1, 4, 5]
    assert sorted(run.tokens["step"].unique()) == [0, 1, 4, 5]
    assert "updates 2 to 3 lost" in run.damaged[0]


def test_a_collection_with_damage(tmp_path: Path) -> None:
    """A run without a readable run.json is left out only where no part of it can tell its labels."""
    parent = create_folder(tmp_path / "all", {}, kind=COLLECTION)
    for seed in range(3):
        write(parent / f"seed-{seed}", 2, labels={"seed": seed})
    create_folder(parent / "new", {"labels": {"seed": 3}})
    for folder in ("seed-1", "new"):
        (parent / folder / "run.json").write_text("{")
    run = loaded(parent)
    assert run.updates["seed"].tolist() == [0, 0, 1, 1, 2, 2]
    assert [("new" in line, "left out" in line) for line in run.damaged] == [(True, True), (False, False)]
    (parent / "run.json").write_text("")
    assert loaded(parent).updates["seed"].tolist() == [0, 0, 1, 1, 2, 2]


def schema_1(path: Path, run: lg.Run) -> Path:
    """The folder as version 0.1 wrote it before parts had checks: the same rows, under the names of then."""
    for table in TABLES:
        (path / table).mkdir(parents=True)
        for number, part in enumerate(sorted((run.path / table).glob("part-*"))):
            rows = pq.read_table(part).replace_schema_metadata(None)
            pq.write_table(rows, path / table / f"part-{number:06d}.parquet", compression="zstd")
    meta = {"schema": 1, "kind": "run", "lcogeom": "0.1.0", "labels": {"seed": 1}}
    (path / "run.json").write_text(json.dumps(meta))
    return path


def test_folders_of_schema_1(tmp_path: Path) -> None:
    whole = lg.load_run(write(tmp_path / "run", 6))
    run = loaded(schema_1(tmp_path / "old", whole))
    for table in ("updates", "tokens", "norms"):
        pd.testing.assert_frame_equal(getattr(run, table), getattr(whole, table))
    assert run.meta["schema"] == 1
    part = tmp_path / "old" / "tokens" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    run = loaded(tmp_path / "old")
    assert len(run.updates) == 6
    assert sorted(run.tokens["step"].unique()) == [0, 1, 4, 5]
    assert "tokens/part-000001.parquet: damaged" in run.damaged[0]
