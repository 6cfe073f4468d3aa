"""The run folder: complete parts or none, readable at any moment, nothing overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import lcogeom as lg
from lcogeom.runs import COLLECTION, COLUMNS, TABLES, RunWriter, create_folder
from lcogeom.runs.columns import schema
from tests.runs.folders import add, part_file, write


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = lg.load_run(write(tmp_path / "run", 5))
    assert run.updates["step"].tolist() == list(range(5))
    assert run.updates["loss"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(run.tokens) == 15
    assert run.tokens["token_id"].isna().tolist() == [False, False, True] * 5
    assert run.tokens["prob"].isna().tolist() == [False, True, False] * 5
    assert [column for column in run.updates if run.updates[column].notna().any()] == ["step", "seconds", "loss"]
    assert run.damaged == ()


def test_every_column_is_explained(tmp_path: Path) -> None:
    run = lg.load_run(write(tmp_path / "run", 1))
    for table in ("updates", "tokens", "norms"):
        listed = run.columns[run.columns["table"] == table]
        assert listed["name"].tolist() == list(getattr(run, table).columns) == schema(table).names
    assert run.columns["meaning"].str.len().min() > 5
    assert len({(column.table, column.name) for column in COLUMNS}) == len(COLUMNS)


def test_the_contract_is_there() -> None:
    """The names that other people's code may rely on (design.md, section 3)."""
    updates = """step objective loss grad_norm grad_norm_clipped qkv_mean_frobenius update_norm grad_cos_prev
        step_grad_cos logprob action_prob entropy logit_grad_norm ratio_max convex_share tokens"""
    tokens = """step sequence position token_id text weight advantage logprob old_logprob ratio prob entropy
        sum_sq_prob logit_grad_norm d1 d2 misfit convex negative_count"""
    assert set(updates.split()) <= set(schema("updates").names)
    assert set(tokens.split()) <= set(schema("tokens").names)


def test_unknown_columns_are_refused(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    with pytest.raises(ValueError, match="no column 'lossy'"):
        writer.add("updates", {"step": [0], "lossy": [1.0]})


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "run", 2)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(FileExistsError, match="exists already"):
        RunWriter(tmp_path / "run", {})
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before


def test_a_flush_cut_short(tmp_path: Path) -> None:
    """Killed between the parts of one flush, or while writing one: the updates before are there, nothing else."""
    path = write(tmp_path / "run", 6)
    last = part_file(path, "updates", 2)
    whole = last.read_bytes()
    last.unlink()
    last.with_name("." + last.name).write_bytes(whole[:100])
    run = lg.load_run(path)
    assert run.updates["step"].tolist() == [0, 1, 2, 3]
    assert sorted(run.tokens["step"].unique()) == [0, 1, 2, 3]


def test_a_part_has_its_name_only_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many parts are there at each sync, of a file under another name, then of the folder with its new name."""
    writer = RunWriter(tmp_path / "run", {})
    there = []
    sync = os.fsync

    def watch(handle: int) -> None:
        sync(handle)
        there.append([len(list((tmp_path / "run" / table).glob("part-*"))) for table in TABLES])

    monkeypatch.setattr(os, "fsync", watch)
    add(writer, range(2))
    assert [sum(counts) for counts in there] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert [counts[TABLES.index("updates")] for counts in there] == [0] * 7 + [1]
    writer.close()


def test_rows_flushed_twice_are_read_once(tmp_path: Path) -> None:
    """An interrupt may come after the last part was written, and before the writer knows."""
    writer = RunWriter(tmp_path / "run", {})
    add(writer, range(4))
    pending = {"updates": [], "tokens": [], "norms": [], "sketches": []}
    for rows in pending:
        writer.add(rows, {"step": [4]})
        pending[rows] = writer._pending[rows]
    writer.flush()
    writer._pending = pending
    add(writer, range(5, 7))
    writer.close()
    run = lg.load_run(tmp_path / "run")
    assert run.updates["step"].tolist() == list(range(7))
    assert run.tokens["step"].tolist().count(4) == run.norms["step"].tolist().count(4) == 1


def test_a_collection_adds_labels(tmp_path: Path) -> None:
    parent = create_folder(tmp_path / "all", {}, kind=COLLECTION)
    empty = lg.load_run(parent)
    assert empty.updates.empty
    assert "loss" in empty.updates
    write(parent / "a" / "seed-0", 2, labels={"variant": "a", "seed": 0})
    write(parent / "b" / "seed-1", 3, labels={"variant": "b", "seed": 1})
    run = lg.load_run(parent)
    assert run.updates.groupby("variant")["step"].count().to_dict() == {"a": 2, "b": 3}
    assert run.updates["seed"].tolist() == [0, 0, 1, 1, 1]
    assert "variant" in run.tokens


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        lg.load_run(tmp_path)
    path = write(tmp_path / "run", 1)
    meta = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(meta | {"schema": 99, "check": None}))
    with pytest.raises(ValueError, match="schema 99"):
        lg.load_run(path)
