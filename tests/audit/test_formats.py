"""Three formats, flat or in lists, in one chunk or many: the same report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lcogeom as lg
from lcogeom.audit import formats
from tests.audit.logged import as_lists, logged_tokens, write

NAMES = ("log.parquet", "log.csv", "log.tsv", "log.jsonl")


def numbers(report: lg.AuditReport) -> tuple[dict[str, object], list[dict]]:
    """What must not depend on the format: the groups' numbers, and the worst tokens without their row."""
    groups = {f"{name} {key}": value for name, group in report.groups.items() for key, value in vars(group).items()}
    quantiles = {f"{key} {q}": value for key in list(groups) if "kl_n" in key for q, value in groups.pop(key).items()}
    known = {key: -1.0 if value is None else value for key, value in (groups | quantiles).items()}
    return known, [dataclasses.asdict(token) | {"row": None} for token in report.worst]


def write_any(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix != ".tsv":
        return write(frame, path)
    text = write(frame, path.with_suffix(".csv"))
    pd.read_csv(text).to_csv(path, sep="\t", index=False)
    return path


@pytest.mark.parametrize("small", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("shape", ["flat", "lists"])
@pytest.mark.parametrize("name", NAMES)
def test_the_formats_agree(name: str, shape: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = logged_tokens()[1]
    reference = lg.audit_file(write(frame, tmp_path / "reference.parquet"), worst=8)
    if small:
        monkeypatch.setattr(formats, "CHUNK_ROWS", 3)
        monkeypatch.setattr(formats, "CHUNK_TOKENS", 5)
    file = write_any(as_lists(frame) if shape == "lists" else frame, tmp_path / name)
    shares: list[float] = []
    report = lg.audit_file(file, worst=8, progress=shares.append)
    (want, want_worst), (got, got_worst) = numbers(reference), numbers(report)
    assert got_worst == want_worst
    assert len(want) == 4 * 13
    assert got == pytest.approx(want, rel=1e-12)  # chunks add up in another order
    assert report.rows == (6 if shape == "lists" else len(frame))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert (len(shares) > 1) == small
    header = int(name.endswith(("csv", "tsv")))
    where = (frame["sequence"] if shape == "lists" else pd.Series(frame.index)).to_numpy()
    flat = frame.reset_index().set_index(["sequence", "position"])["index"]
    assert [t.row for t in report.worst] == [where[flat[t.sequence, t.position]] + 1 + header for t in report.worst]


def test_a_list_row_without_names_is_its_own_sequence(tmp_path: Path) -> None:
    frame = as_lists(logged_tokens()[1]).drop(columns=["sequence", "position", "text", "token_id"])
    report = lg.audit_file(write(frame, tmp_path / "log.jsonl"))
    reference = lg.audit_file(write(logged_tokens()[1], tmp_path / "log.parquet"))
    assert [(t.sequence, t.position) for t in report.worst] == [(t.sequence + 1, t.position) for t in reference.worst]
    assert {(t.token_id, t.text) for t in report.worst} == {(None, None)}


@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_do_not_count_whatever_they_hold(name: str, tmp_path: Path) -> None:
    frame = logged_tokens()[1]
    reference = lg.audit_file(write(frame, tmp_path / "reference.parquet"))
    lists = as_lists(frame).drop(columns=["position"])
    width = 12
    padded = lists.assign(
        completion_mask=[[1] * len(row) + [0] * (width - len(row)) for row in lists["logprobs"]],
        tool_mask=[[0] + [1] * width for _ in range(len(lists))],
    )
    for column, junk in (("logprobs", 7.0), ("old_logprobs", float("nan")), ("token_id", 0), ("text", "")):
        # one token of a tool's output in front, padding behind
        padded[column] = [[junk, *row, *[junk] * (width - len(row))] for row in lists[column]]
    padded["completion_mask"] = [[1, *row] for row in padded["completion_mask"]]
    report = lg.audit_file(write_any(padded, tmp_path / name))
    assert report.masked == 6 + (6 * width - len(frame))
    assert report.columns["mask"] == "completion_mask * tool_mask"
    assert report.groups == reference.groups
    assert [t.position - 1 for t in report.worst] == [t.position for t in reference.worst]
    flat = frame.assign(response_mask=np.arange(len(frame)) % 2 == 0)
    odd = lg.audit_file(write_any(flat, tmp_path / f"flat-{name}"))
    even = lg.audit_file(write(frame[::2], tmp_path / "even.parquet"))
    assert odd.groups == even.groups
    assert odd.masked == len(frame) // 2


@pytest.mark.parametrize(
    "names",
    [
        {"logprobs": "per_token_logps", "old_logprobs": "old_per_token_logps", "ref_logprobs": "ref_per_token_logps"},
        {"logprobs": "log_probs", "old_logprobs": "old_log_probs", "ref_logprobs": "ref_log_prob"},
        {"logprobs": "Log-Prob", "old_logprobs": "rollout_log_probs", "advantages": "Advantage"},
        {"logprobs": "logprob", "old_logprobs": "sampling_per_token_logps", "advantages": "advantage"},
        {"logprobs": "new", "old_logprobs": "before", "ref_logprobs": "start", "advantages": "worth"},
    ],
)
def test_names_of_columns(names: dict[str, str], tmp_path: Path) -> None:
    frame = logged_tokens()[1]
    objective, options = ("grpo", {"beta": 0.1}) if "ref_logprobs" in names else ("ppo", {})
    reference = lg.audit_file(write(frame, tmp_path / "reference.csv"), objective, options=options)
    given = names if names["logprobs"] == "new" else {}
    file = write(frame.rename(columns=names), tmp_path / "log.csv")
    report = lg.audit_file(file, objective, options=options, columns=given)
    assert report.groups == reference.groups
    assert names.items() <= report.columns.items()


def test_the_training_ratio_comes_before_the_samplers(tmp_path: Path) -> None:
    frame = logged_tokens()[1]
    frame.insert(0, "sampling_per_token_logps", -1.0)
    frame.insert(0, "rollout_log_probs", -1.0)
    report = lg.audit_file(write(frame, tmp_path / "log.csv"))
    assert report.columns["old_logprobs"] == "old_logprobs"


def test_of_two_columns_with_one_name_the_first_is_read(tmp_path: Path) -> None:
    frame = logged_tokens()[1]
    frame.insert(0, "log_probs", frame["logprobs"])
    assert lg.audit_file(write(frame, tmp_path / "log.csv")).columns["logprobs"] == "log_probs"


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.parquet"])
def test_long_rows_make_chunks_of_few_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(formats, "CHUNK_TOKENS", 1000)
    row = {"logprobs": [-0.123456789] * 200, "old_logprobs": [-0.123456789] * 200, "advantages": 1.0}
    shares: list[float] = []
    report = lg.audit_file(write(pd.DataFrame([row] * 50), tmp_path / name), progress=shares.append)
    assert report.groups["all"].tokens == 10_000
    assert len(shares) >= 8


@pytest.mark.parametrize(
    "kind",
    [pa.float16(), pa.float32(), pa.int32(), pa.decimal128(12, 4), pa.list_(pa.float32()), pa.large_list(pa.float64())],
    ids=str,
)
def test_parquet_types(kind: pa.DataType, tmp_path: Path) -> None:
    flat = not pa.types.is_nested(kind)
    values = [-1, -2, -3] if flat else [[-1, -2], [-3]]
    logprobs = pa.array(values, pa.float64() if flat else None).cast(kind)
    table = {"logprobs": logprobs, "old_logprobs": logprobs, "advantages": pa.array([1.0] * len(values))}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    report = lg.audit_file(tmp_path / "log.parquet")
    assert sorted(token.logprob for token in report.worst) == [-3.0, -2.0, -1.0]


def test_fixed_size_lists_and_dictionaries(tmp_path: Path) -> None:
    logprobs = pa.array([[-1.0, -2.0], [-3.0, -4.0]], pa.list_(pa.float64(), 2))
    advantages = pa.array([1.0, 1.0]).dictionary_encode()
    pq.write_table(
        pa.table({"logprobs": logprobs, "old_logprobs": logprobs, "advantages": advantages}), tmp_path / "log.parquet"
    )
    assert lg.audit_file(tmp_path / "log.parquet").groups["positive"].tokens == 4


def test_text_with_line_ends_does_not_shift_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_bytes(
        b"\xef\xbb\xbftext,logprobs,old_logprobs,advantages\r\n"
        b'"two\r\nlines, and ""quotes""",-1,-1,1\r\n'
        b"\r\n"
        b"plain,-2,-2,1\r\n"
    )
    report = lg.audit_file(file, columns={"text": "text"})  # the byte-order mark is no part of the name
    assert [(t.row, t.text) for t in report.worst] == [(5, "plain"), (2, 'two\r\nlines, and "quotes"')]


def test_empty_lines_of_json_count_as_lines(tmp_path: Path) -> None:
    row = json.dumps({"logprobs": [-1.0], "old_logprobs": [-1.0], "advantages": 1})
    (tmp_path / "log.jsonl").write_text(f"\n{row}\n\n{row}", encoding="utf-8-sig")
    assert [t.row for t in lg.audit_file(tmp_path / "log.jsonl").worst] == [2, 4]
