"""The fault bench: faults are real, act when they say, leave the rest of the run alone; and the score counts right."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import lcogeom as lg

FAULTS = Path(__file__).parent.parent.parent / "analysis" / "faults"
UNSEEN = ("seconds",)  # columns of `updates` that no two runs share
QUICK = (
    "step-too-large/rate-spike/1",
    "advantage-outlier/token-value-wrong/0",
    "unmasked-tokens/prompts/1",
    "optimizer-lag/first-moments-foreign/1",
    "loss-scale-jump/not-unscaled/0",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The bench's modules; it is a folder of scripts, not a package."""
    sys.path.insert(0, str(FAULTS))
    try:
        names = ("catalogue", "make_runs", "score", "plain_loop")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(FAULTS))


def test_the_catalogue_covers_every_cause_on_both_halves(bench: Any) -> None:
    from lcogeom.diagnosis import CAUSES

    ways, cases = bench.catalogue.ways(), bench.make_runs.cases()
    assert {way.cause for way in ways} == set(CAUSES) - {"healthy"}
    for cause in {way.cause for way in ways}:
        mine = [way for way in ways if way.cause == cause]
        assert len({way.name for way in mine}) == len(mine) >= 3, cause
        assert {way.series for way in mine} == set(bench.catalogue.SERIES), cause
    assert [bench.catalogue.half_of(one) for one in bench.catalogue.SERIES] == [
        "tuning",
        "tuning",
        "tuning",
        "tuning",
        "held-out",
    ]
    seeds = {half: {case.seed for case in cases if case.half == half} for half in ("tuning", "held-out")}
    assert not seeds["tuning"] & seeds["held-out"]
    assert len({(case.half, case.name) for case in cases}) == len(cases)
    for half in seeds:
        mine = [case for case in cases if case.half == half]
        assert {case.setup.model for case in mine} == {"tiny", "gpt2"}
        assert {case.loop for case in mine} == {"plain", "ours", "trl"}
        assert {"grpo", "ppo", "sft", "lco-kld"} <= {case.setup.objective for case in mine if case.way is not None}


def short(case: Any, after: int) -> Any:
    """The case on `tiny`, ended a few updates after its fault begins."""
    return replace(case, setup=replace(case.setup, model="tiny", updates=case.first + case.way.seen[0] + after))


def updates_of(bench: Any, case: Any, folder: Path, *, faulty: bool) -> pd.DataFrame:
    at = case.way.make(case.size) if faulty else {}
    try:
        bench.plain_loop.run(case.setup, folder, seed=case.seed, cache=folder.parent, at=at, first=case.first)
    except (RuntimeError, ValueError):
        assert case.way.cause == "non-finite"  # the loop stops, as loops do
    return lg.load_run(folder).updates.drop(columns=list(UNSEEN)).set_index("step")


def acts_when_it_says(bench: Any, case: Any, folder: Path) -> None:
    case = short(case, after=1)
    with_fault = updates_of(bench, case, folder / "with", faulty=True)
    without = updates_of(bench, case, folder / "without", faulty=False)
    before, seen = case.first - 1, case.first + case.way.seen[0]
    pd.testing.assert_frame_equal(with_fault.loc[:before], without.loc[:before])
    assert not with_fault.loc[:seen].equals(without.loc[:seen]), "the record is that of a healthy run"


@pytest.mark.filterwarnings("ignore:black box")
@pytest.mark.parametrize("name", QUICK)
def test_a_fault_acts_when_it_says(name: str, bench: Any, tmp_path: Path) -> None:
    case = next(case for case in bench.make_runs.cases() if case.name == name)
    acts_when_it_says(bench, case, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:black box")
def test_every_fault_acts_when_it_says(bench: Any, tmp_path: Path) -> None:
    """Those that are there from the start by nothing but the loop's settings have no healthy twin."""
    cases = [case for case in bench.make_runs.cases() if case.loop == "plain" and case.name.endswith("/3") and case.way]
    asked = [case for case in cases if case.way.make(case.size)]
    assert len(asked) > 40
    for number, case in enumerate(asked):
        acts_when_it_says(bench, case, tmp_path / str(number))


def test_a_run_is_made_once_with_what_was_put_in(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in bench.make_runs.cases() if case.name == "no-signal/advantages-masked/1")
    case = short(case, after=2)
    monkeypatch.setattr(bench.make_runs, "cases", lambda: [case])
    bench.make_runs.make(tmp_path, case.name, case.half)
    folder = tmp_path / "tune" / case.name
    record = json.loads((folder / "fault.json").read_text())
    assert (record["cause"], record["update"], record["half"]) == ("no-signal", case.first, "tuning")
    assert record["seen"] == [case.first, case.first]
    assert record["error"] is None
    tokens = lg.load_run(folder / "run").tokens.astype({"advantage": float})
    largest = tokens["advantage"].abs().groupby(tokens["step"]).max()
    assert (largest.loc[: case.first - 1] > 0).all()
    assert (largest.loc[case.first :] == 0).all()
    judged = bench.score.judged(folder, case.name)
    assert judged["way"] == "advantages-masked"
    assert judged["error"] is None


def row(cause: str, said: str, **more: Any) -> dict[str, Any]:
    right = cause == said
    return {"cause": cause, "way": "w", "said": said, "first": right, "top_two": right, "right_update": right, **more}


def test_the_score(bench: Any) -> None:
    score = bench.score
    rows = [row("no-signal", "no-signal", way=str(number)) for number in range(9)]
    rows += [row("no-signal", "healthy", way="9"), row("healthy", "healthy"), row("healthy", "logit-drift")]
    found = score.summary(rows)
    assert (found["faulty"], found["healthy"]) == (10, 2)
    rate, low, high = found["first"]
    assert rate == 0.9
    assert 0.6 <= low < 0.9 < high <= 1.0
    assert found["false_alarms"][:2] == (1, 0.5)
    text = score.confusion(rows)
    assert "| no-signal | 10 | 9 | 9 | 9 | healthy 1 |" in text
    assert "| healthy | 2 | 1 |  |  | logit-drift 1 |" in text


def test_wilson_interval(bench: Any) -> None:
    """Against the table in Newcombe (1998), Statistics in Medicine 17: 81/263, and 0/20."""
    assert bench.score.wilson(81, 263) == pytest.approx((0.3080, 0.2553, 0.3662), abs=5e-5)
    assert bench.score.wilson(0, 20) == pytest.approx((0.0, 0.0, 0.1611), abs=5e-5)
