"""Run folders that lack something, or have something strange, get an answer in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import lcogeom as lg
from lcogeom.runs import RunWriter
from tests.diagnosis.synthetic import META, write
from tests.diagnosis.test_rules import AT, at, one_huge_advantage, since, weights_replaced
from tests.runs.folders import part_file


def without(tables: dict[str, list[str] | None]) -> Callable[[lg.Run], lg.Run]:
    """Drops columns (None: the whole table) of a run read back, as if they had never been recorded."""

    def drop(run: lg.Run) -> lg.Run:
        frames = {}
        for table, names in tables.items():
            frame = getattr(run, table)
            frames[table] = frame.iloc[:0] if names is None else frame.drop(columns=names)
        return replace(run, **frames)

    return drop


def test_no_tokens(tmp_path: Path) -> None:
    run = without({"tokens": None})(lg.load_run(write(tmp_path / "run", at(weights_replaced))))
    report = lg.diagnose(run)
    assert report.cause == "layer-amplification"
    assert any("no tokens" in note for note in report.notes)


@pytest.mark.parametrize("table", ["updates", "tokens", "norms"])
def test_any_column_may_be_missing(table: str, tmp_path: Path) -> None:
    """One after the other, and all but `step` together: an answer, and the fault found wherever its column is there."""
    whole = lg.load_run(write(tmp_path / "run", at(one_huge_advantage)))
    names = [name for name in getattr(whole, table).columns if name != "step"]
    for name in names:
        report = lg.diagnose(without({table: [name]})(whole))
        assert name == "advantage" or report.cause == "advantage-outlier", name
    lg.diagnose(without({table: names})(whole))


def test_one_update(tmp_path: Path) -> None:
    assert lg.diagnose(write(tmp_path / "one", updates=1)).findings == ()
    assert lg.diagnose(write(tmp_path / "two", updates=2)).findings == ()


def test_no_update(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", META).close()
    with pytest.raises(ValueError, match="no finished update"):
        lg.diagnose(tmp_path / "run")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        lg.diagnose(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        lg.diagnose(tmp_path / "nowhere")


def test_a_collection_names_its_runs(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "run.json").write_text(json.dumps({"schema": 2, "kind": "collection"}))
    for name in ("ppo", "sft"):
        write(tmp_path / "all" / name)
    with pytest.raises(ValueError, match="holds 2 runs; diagnose one of them"):
        lg.diagnose(tmp_path / "all")


def test_columns_of_strangers(tmp_path: Path) -> None:
    run = lg.load_run(write(tmp_path / "run"))
    updates, tokens = run.updates.assign(mood="good"), run.tokens.assign(colour="red")
    report = lg.diagnose(replace(run, updates=updates, tokens=tokens))
    assert report.findings == ()
    assert any("mood" in note for note in report.notes)
    assert any("colour" in note for note in report.notes)


@pytest.mark.parametrize("table", ["tokens", "norms", "updates"])
def test_damaged_parts(table: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    write(path, since(weights_replaced))
    file = part_file(path, table, 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))
    if table == "updates":
        with pytest.raises(ValueError, match="no finished update"):
            lg.diagnose(path)
        return
    report = lg.diagnose(path)
    assert any("damaged" in note and table in note for note in report.notes)
    assert report.cause == ("healthy" if table == "norms" else "layer-amplification")


def test_updates_that_are_missing_or_twice_there(tmp_path: Path) -> None:
    run = lg.load_run(write(tmp_path / "run", at(one_huge_advantage)))
    holes = run.updates[~run.updates["step"].isin([4, 5])]
    twice = pd.concat([holes, holes.iloc[:2]], ignore_index=True).sample(frac=1, random_state=0)
    report = lg.diagnose(replace(run, updates=twice, tokens=run.tokens.sample(frac=1, random_state=0)))
    assert (report.cause, report.update) == ("advantage-outlier", AT)
    assert any("updates 4 to 5 are missing" in note for note in report.notes)


def test_a_run_that_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    run = lg.load_run(write(tmp_path / "run"))
    later = replace(run, updates=run.updates.assign(step=run.updates["step"] + 500))
    report = lg.diagnose(replace(later, tokens=run.tokens.assign(step=run.tokens["step"] + 500)))
    assert report.findings == ()
    assert any("the first update read is 500" in note for note in report.notes)
