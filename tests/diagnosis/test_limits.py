"""What lies just beyond what healthy runs show is found, and what lies just within is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lcogeom as lg
from tests.diagnosis.synthetic import LAYERS, Columns, Fault, write

AT = 10


def named(path: Path, fault: Fault, **meta: Any) -> tuple[str, int | None]:
    report = lg.diagnose(write(path, fault, **meta))
    return report.cause, report.update


@pytest.mark.parametrize(("off", "found"), [(2e-3, ("behaviour-mismatch", AT)), (1e-4, ("healthy", None))])
def test_ratios_that_were_one_to_rounding(off: float, found: tuple[str, int | None], tmp_path: Path) -> None:
    def read_elsewhere(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        if update >= AT:
            tokens["old_logprob"] = tokens["old_logprob"] + off * np.sin(1000 * tokens["old_logprob"])

    assert named(tmp_path / "run", read_elsewhere) == found


@pytest.mark.parametrize(("times", "found"), [(5.0, ("step-too-large", AT)), (2.0, ("healthy", None))])
def test_a_learning_rate_some_times_larger(times: float, found: tuple[str, int | None], tmp_path: Path) -> None:
    def raised(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        row["learning_rate"] *= times if update >= AT else 1.0

    assert named(tmp_path / "run", raised) == found


@pytest.mark.parametrize(("model", "cause"), [("LlamaForCausalLM", "step-too-large"), ("PeftModel", "healthy")])
def test_adapters_are_few_weights_and_move_far(model: str, cause: str, tmp_path: Path) -> None:
    def short(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        row["step_scale"], row["weight_norm"] = 100.0, 30.0  # 4 % of the weights, warmed up

    assert named(tmp_path / "run", short, model=model)[0] == cause


@pytest.mark.parametrize(("ratio", "cause"), [(4.0, "ratio-blow-up"), (1.5, "healthy")])
def test_ratios_that_stay_away_though_they_are_clipped(ratio: float, cause: str, tmp_path: Path) -> None:
    """Six updates on each rollout; some tokens are far out in all of them from the second on."""
    kept: Columns = {}

    def six(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        if update % 6 == 0:
            kept.update({name: np.array(column) for name, column in tokens.items()})
        else:
            tokens.update({name: np.array(column) for name, column in kept.items()})
            up, down = tokens["advantage"] > 0, tokens["advantage"] < 0
            for some, factor in ((up, ratio), (down, 1 / ratio)):
                far = np.flatnonzero(some & (tokens["old_logprob"] < -2))[:4]
                tokens["logprob"][far] = tokens["old_logprob"][far] + np.log(factor)

    assert named(tmp_path / "run", six)[0] == cause


def test_bounds_tighter_than_those_declared(tmp_path: Path) -> None:
    def tight(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        row["clip"] = (0.01, 0.01) if update >= AT else (0.2, 0.2)

    report = lg.diagnose(write(tmp_path / "run", tight))
    assert report.cause == "clip-saturation"
    assert abs(report.update - AT) <= 1
    assert "tighter" in report.findings[0].sentence


def test_weights_rounded_once_a_rollout(tmp_path: Path) -> None:
    def rounds(update: int, tokens: Columns, row: Columns, norms: Columns) -> None:
        if update >= AT and update % 2 == 0:
            row["moved_between"], row["step_undone"] = 0.012, 0.9
            norms["moved_between"] = np.full(len(LAYERS), 0.005)

    assert named(tmp_path / "run", rounds) == ("precision-loss", AT)
