"""Broken rows are named; broken files and questions that the file cannot answer end in one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lcogeom as lg
from lcogeom.audit import formats
from lcogeom.audit.stream import auditable_names
from tests.audit.logged import as_lists, logged_tokens, write

GOOD = {"logprobs": -1.0, "old_logprobs": -1.1, "advantages": 1.0}
LISTS = {"logprobs": [-1.0, -2.0], "old_logprobs": [-1.1, -2.2], "advantages": 1.0}
CELLS = {
    "null": (GOOD | {"logprobs": None}, "logprobs is missing or not finite"),
    "nan": (GOOD | {"old_logprobs": float("nan")}, "old_logprobs is missing or not finite"),
    "infinite": (GOOD | {"advantages": float("inf")}, "advantages is missing or not finite"),
    "minus infinity": (GOOD | {"logprobs": -float("inf")}, "logprobs is missing or not finite"),
    "positive": (GOOD | {"logprobs": 0.02}, "logprobs is above 0"),
    "old positive": (GOOD | {"old_logprobs": 3.0}, "old_logprobs is above 0"),
    "text": (GOOD | {"advantages": "high"}, "advantages: 'high' is no number"),
    "nan in a list": (LISTS | {"old_logprobs": [-1.0, float("nan")]}, "old_logprobs is missing or not finite (token 2"),
    "null in a list": (LISTS | {"logprobs": [None, -1.0]}, "logprobs is missing or not finite (token 1"),
    "short": (LISTS | {"old_logprobs": [-1.0]}, "old_logprobs: 1 values for the 2 of logprobs"),
    "one old log-prob": (LISTS | {"old_logprobs": -3.0}, "old_logprobs: one value for the 2 of logprobs"),
    "long advantages": (LISTS | {"advantages": [1.0, 1.0, 1.0]}, "advantages: 3 values for the 2 of logprobs"),
    "advantage of a list": (LISTS | {"advantages": None}, "advantages is missing or not finite"),
}
JSON_ONLY = {
    "no key": ({"logprobs": -1.0, "advantages": 1.0}, "old_logprobs is missing or not finite"),
    "nested": (LISTS | {"logprobs": [[-1.0, -2.0]]}, "logprobs: [[-1.0, -2.0]] is no number"),
    "an object": (GOOD | {"logprobs": {"a": 1}}, "logprobs: {'a': 1} is no number"),
    "huge": (GOOD | {"advantages": 10**400}, "is no number"),
}
LINES = {
    "half a line": ('{"logprobs": -1.0, "old_lo', "no JSON ("),
    "a list": ("[1, 2]", "a JSON list, not an object"),
    "deep": ("[" * 100_000, "no JSON ("),
    "not UTF-8": (b"\xff\xfe{", "no JSON ("),
}


def fails(file: Path, **options: object) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        lg.audit_file(file, **options)
    return str(error.value)


# A parquet column has one type, and a list column no single number or text; in CSV a nested list or an object is text.
HELD = [
    *(("jsonl", case) for case in CELLS | JSON_ONLY),
    *(("csv", case) for case in CELLS),
    *(("parquet", case) for case in CELLS if case not in ("text", "one old log-prob", "advantage of a list")),
]


@pytest.mark.parametrize(("suffix", "case"), HELD)
def test_a_broken_cell(case: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, said = (CELLS | JSON_ONLY)[case]
    listed = any(isinstance(value, list) for value in row.values())
    good = LISTS if listed else GOOD
    if case == "long advantages" and suffix == "parquet":
        good = good | {"advantages": [1.0, 1.0]}
    frame = pd.DataFrame([*[good] * 4, row, good, row])
    monkeypatch.setattr(formats, "CHUNK_ROWS", 2)
    monkeypatch.setattr(formats, "CHUNK_TOKENS", 2)
    file = write(frame, tmp_path / f"log.{suffix}")
    at = {"jsonl": "line 5", "csv": "line 6", "parquet": "row 5"}[suffix]
    message = fails(file)
    assert message.startswith(f"{str(file)!r}: {at}: ")
    assert said in message
    assert "1 other rows are broken" in message
    assert "--skip-broken" in message

    report = lg.audit_file(file, skip_broken=True)
    first = int(at.split()[1])
    assert [number for number, _ in report.broken_rows] == [first, first + 2]
    assert (report.broken, report.rows) == (2, 7)
    assert report.groups["all"].tokens == 5 * (2 if listed else 1)
    good_file = write(pd.DataFrame([good] * 5), tmp_path / f"good.{suffix}")
    assert report.groups == lg.audit_file(good_file).groups


@pytest.mark.parametrize("case", LINES)
def test_a_broken_line(case: str, tmp_path: Path) -> None:
    line, said = LINES[case]
    line = line if isinstance(line, bytes) else line.encode()
    good = json.dumps(GOOD).encode()
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([good, good, line, good]))
    message = fails(tmp_path / "log.jsonl")
    assert f": line 3: {said}" in message
    assert lg.audit_file(tmp_path / "log.jsonl", skip_broken=True).groups["all"].tokens == 3


def test_the_first_broken_row_and_its_first_token_are_named(tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in (LISTS, LISTS | {"logprobs": [float("nan"), float("nan")]}, LISTS)]
    (tmp_path / "log.jsonl").write_text("\n".join([*rows, "{"]))
    assert "line 2: logprobs is missing or not finite (token 1 of the row)" in fails(tmp_path / "log.jsonl")
    report = lg.audit_file(tmp_path / "log.jsonl", skip_broken=True)
    assert [number for number, _ in report.broken_rows] == [2, 4]


def test_csv_rows_of_the_wrong_width(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("logprobs,old_logprobs,advantages\n-1,-1,1\n-1,-1\n-1,-1,1,4\n-1,-1,1\n")
    assert "line 3: has 2 cells, the header 3" in fails(tmp_path / "log.csv")
    report = lg.audit_file(tmp_path / "log.csv", skip_broken=True)
    assert [number for number, _ in report.broken_rows] == [3, 4]
    assert report.groups["all"].tokens == 2


def test_rounding_above_zero_is_clamped_and_counted(tmp_path: Path) -> None:
    rows = [GOOD | {"logprobs": 1e-3}, GOOD | {"logprobs": 4e-4, "old_logprobs": 1e-7}, GOOD]
    report = lg.audit_file(write(pd.DataFrame(rows), tmp_path / "log.csv"), worst=3)
    assert report.clamped == 3
    assert report.groups["all"].convex == 2  # pi = 1: PPO is convex there
    concave = [row | {"advantages": -1.0} for row in rows[:2]]
    report = lg.audit_file(write(pd.DataFrame(concave), tmp_path / "log.csv"))
    assert [token.logprob for token in report.worst] == [0.0, 0.0]
    assert [token.prob for token in report.worst] == [1.0, 1.0]


def test_a_column_that_is_not_needed_may_be_broken(tmp_path: Path) -> None:
    rows = [GOOD | {"old_logprobs": None, "advantages": -1.0}, LISTS | {"old_logprobs": -9.0, "advantages": -1.0}]
    report = lg.audit_file(write(pd.DataFrame(rows), tmp_path / "log.jsonl"), "reinforce")
    assert report.groups["negative"].tokens == 3
    assert {token.ratio is None or token.ratio != token.ratio for token in report.worst} == {True}


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"", "log.csv", "the file is empty"),
        (b"PAR1 and no more", "log.parquet", "not a readable parquet file"),
        (b"logprobs,old_logprobs,advantages\n", "log.csv", "no token to audit (0 rows"),
        (b"whatever", "log.txt", "cannot tell the format"),
        (b'[{"logprobs": -1},\n{"logprobs": -1}]', "log.json", "write one object a line"),
        (b"\n\n", "log.jsonl", "no JSON object"),
        (b"-1.0,-1.0\n-2.0,-2.0\n", "log.csv", "no column of logprobs"),
    ],
)
def test_files_that_are_none(content: bytes, name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in fails(tmp_path / name)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        lg.audit_file(tmp_path / "none.csv")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        lg.audit_file(tmp_path)


def test_a_list_that_is_null_in_parquet(tmp_path: Path) -> None:
    lists = pa.array([[-1.0], None, [], [-2.0, -3.0]], pa.list_(pa.float64()))
    pq.write_table(
        pa.table({"logprobs": lists, "old_logprobs": lists, "advantages": [1.0] * 4}), tmp_path / "log.parquet"
    )
    assert "row 2: logprobs: missing" in fails(tmp_path / "log.parquet")
    report = lg.audit_file(tmp_path / "log.parquet", skip_broken=True)
    assert [(token.row, token.logprob) for token in report.worst] == [(4, -3.0), (4, -2.0), (1, -1.0)]


def test_a_damaged_page(tmp_path: Path) -> None:
    file = write(pd.concat([logged_tokens()[1]] * 3000), tmp_path / "log.parquet")
    content = bytearray(file.read_bytes())
    content[4:4000] = b"\xff" * 3996
    file.write_bytes(content)
    assert "damaged after row 0" in fails(file)


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST_LINE", 1000)
    (tmp_path / "log.jsonl").write_text(json.dumps(GOOD) + "\n" + "[" + "1," * 1000)
    assert "line 2 is longer" in fails(tmp_path / "log.jsonl")


def test_columns_that_hold_no_numbers(tmp_path: Path) -> None:
    table = pa.table({"logprobs": [{"a": 1}], "old_logprobs": [-1.0], "advantages": [1.0]})
    pq.write_table(table, tmp_path / "log.parquet")
    assert "column 'logprobs' holds struct" in fails(tmp_path / "log.parquet")


def test_all_masked(tmp_path: Path) -> None:
    file = write(pd.DataFrame([GOOD | {"mask": 0}] * 3), tmp_path / "log.csv")
    assert "no token to audit (3 rows, 3 tokens masked" in fails(file)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    file = write(as_lists(logged_tokens()[1]).drop(columns="old_logprobs"), tmp_path / "log.parquet")
    message = fails(file)
    assert "no column of old_logprobs, which objective 'ppo' needs" in message
    assert "Columns found: position, token_id, text, logprobs, ref_logprobs, advantages, sequence." in message
    assert "Accepted names: old_logprobs, " in message
    assert "--old-logprobs COLUMN" in message
    assert "it is 'logprobs' itself" in message
    on_policy = lg.audit_file(file, columns={"old_logprobs": "logprobs"})
    assert {token.ratio for token in on_policy.worst} == {1.0}
    assert "no column of advantages" in fails(write(pd.DataFrame([{"logp": -1.0}]), file), objective="reinforce")


def test_roles_that_do_not_exist(tmp_path: Path) -> None:
    file = write(logged_tokens()[1], tmp_path / "log.csv")
    assert "no role 'rewards'" in fails(file, columns={"rewards": "advantages"})
    assert "no column 'lp' (asked for as logprobs)" in fails(file, columns={"logprobs": "lp"})


@pytest.mark.parametrize("name", ["lco-kld", "lco-mse", "lco-lch"])
def test_an_objective_of_the_whole_distribution(name: str, tmp_path: Path) -> None:
    file = write(logged_tokens()[1], tmp_path / "log.csv")
    message = fails(file, objective=name)
    assert f"{name!r} cannot be audited from log-probabilities" in message
    assert f"lcogeom.attach(..., objective={name!r})" in message
    assert "sft, reinforce" in message
    with pytest.raises(TypeError, match="no ActionObjective"):
        lg.audit_file(file, lg.objective(name))  # type: ignore[arg-type]


def test_an_action_objective_with_other_needs(tmp_path: Path) -> None:
    file = write(logged_tokens()[1], tmp_path / "log.csv")
    for name in lg.objective_names():  # every registered objective is audited or refused, none fails otherwise
        if name in auditable_names():
            assert lg.audit_file(file, name).groups["all"].tokens == 32, name
        else:
            assert "cannot be audited from log-probabilities" in fails(file, objective=name), name


def test_options(tmp_path: Path) -> None:
    file = write(logged_tokens()[1], tmp_path / "log.csv")
    with pytest.raises(TypeError, match="no option 'clip'"):
        lg.audit_file(file, options={"clip": 0.1})
    with pytest.raises(TypeError, match="belong to a named objective"):
        lg.audit_file(file, lg.action_objective(lambda logp, _: -logp), options={"clip_low": 0.1})
