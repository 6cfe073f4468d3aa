"""Folders that another version, or someone's own script, wrote to: other columns, fewer, of other types."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lcogeom as lg
from lcogeom.runs.columns import schema
from lcogeom.runs.parts import write_part
from tests.runs.folders import part_file, write


def add_flush(path: Path, number: int, step: int, **tables: dict) -> None:
    """One more flush, of one update, with whatever columns."""
    updates = range(step, step + 1)
    parts = {
        table: write_part(path / table, number, updates, pa.table(columns), None).path.name
        for table, columns in tables.items()
        if table != "updates"
    }
    write_part(path / "updates", number, updates, pa.table(tables["updates"]), {"parts": parts})


def test_other_columns_and_fewer(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 4)
    add_flush(path, 2, 4, updates={"step": [4], "prize": [0.5]}, tokens={"step": [4, 4], "colour": ["red", "blue"]})
    run = lg.load_run(path)
    assert run.damaged == ()
    assert run.updates["step"].tolist() == [0, 1, 2, 3, 4]
    assert run.updates["prize"].isna().tolist() == [True] * 4 + [False]
    assert run.updates["loss"].isna().tolist() == [False] * 4 + [True]
    assert run.tokens["colour"].tolist()[-2:] == ["red", "blue"]
    assert list(run.updates.columns)[:-1] == schema("updates").names
    assert sorted(run.norms["step"].unique()) == [0, 1, 2, 3]


def test_columns_of_other_types(tmp_path: Path) -> None:
    """Known columns are read in their own type, or the part is left out; a stranger's unlike columns become text."""
    path = write(tmp_path / "run", 2)
    add_flush(path, 1, 2, updates={"step": pa.array([2], pa.int32()), "loss": [7], "prize": [1]})
    add_flush(path, 2, 3, updates={"step": [3], "loss": [None], "prize": [0.5]})
    run = lg.load_run(path)
    assert run.updates["loss"].tolist()[:3] == [0.0, 1.0, 7.0]
    assert run.updates["prize"].tolist()[2:] == [1.0, 0.5]
    add_flush(path, 3, 4, updates={"step": [4], "prize": ["high"]})
    assert lg.load_run(path).updates["prize"].tolist()[2:] == ["1", "0.5", "high"]
    add_flush(path, 4, 5, updates={"step": [5], "loss": ["high"]})
    add_flush(path, 5, 6, updates={"number": [6]})
    with pytest.warns(UserWarning, match="lost"):
        run = lg.load_run(path)
    assert run.updates["step"].tolist() == [0, 1, 2, 3, 4]
    assert [line.endswith(f"update {step} lost") for step, line in zip((5, 6), run.damaged, strict=True)] == [True] * 2
    assert "no column 'step'" in run.damaged[1]


def test_one_update_without_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "run", 0)
    assert lg.load_run(path).updates.empty
    add_flush(path, 0, 0, updates={"step": [0]})
    run = lg.load_run(path)
    assert len(run.updates) == 1
    assert run.tokens.empty
    assert list(run.tokens.columns) == schema("tokens").names


def test_a_part_rewritten_on_purpose(tmp_path: Path) -> None:
    """A column added to parts by hand, as the warning says: without the check in their names they are read."""
    path = write(tmp_path / "run", 6)
    for table, number in (("updates", 1), ("tokens", 2)):
        part = part_file(path, table, number)
        rows = pd.read_parquet(part)
        rows["mine"] = 1.5
        rows.to_parquet(part)
        with pytest.warns(UserWarning, match="if they were changed on purpose, take '.*' out of the name"):
            lg.load_run(path)
        check = part.name.split(".")[-2]
        part.rename(part.with_name(part.name.replace("." + check, "")))
    run = lg.load_run(path)
    assert run.damaged == ()
    assert run.updates["mine"].notna().tolist() == [False, False, True, True, False, False]
    assert len(run.tokens) == 18
    assert run.tokens["mine"].notna().sum() == 6
    assert pq.ParquetFile(part_file(path, "updates", 1)).schema_arrow.metadata.keys() == {b"pandas"}  # its note is gone
