"""The figure of spectral densities, and the study that feeds it, run small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lcogeom.plots import density_figure
from lcogeom.plots.style import line_of

ROOT = Path(__file__).parent.parent.parent
VARIANTS = ["sft", "ppo-unclipped:positive", "lco-kld"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spectrum") / "spectrum.parquet"
    done = subprocess.run(
        [sys.executable, str(ROOT / "analysis" / "spectrum.py"), "--updates", "3", "--probes", "2", "--steps", "16",
         "--out", str(path)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    return path


def test_the_study(recorded: Path) -> None:
    table = pd.read_parquet(recorded)
    assert table["converged"].all()
    for (_, when), rows in table.groupby(["variant", "when"]):
        assert (rows["updates"] == (0 if when == "before" else 3)).all()
        one = rows.iloc[0]
        assert one["lowest"] < 0 < one["highest"]
        assert max(one["lowest_residual"], one["highest_residual"]) <= 3e-6 * max(-one["lowest"], one["highest"])
        assert 0 < one["negative_mass"] < 1
        assert one["negative_share_lowest"] <= one["negative_share"] <= one["negative_share_highest"]
        assert np.trapezoid(rows["density"], np.arcsinh(rows["x"])) == pytest.approx(1.0, abs=1e-3)
    start = table[table["when"] == "before"].groupby("variant").first()
    # REINFORCE's and PPO's Hessians at the old policy differ by the outer product of the gradient of log pi: from the
    # same weights PPO's is the more negative.
    assert start.loc["ppo-unclipped:positive", "lowest"] < start.loc["sft", "lowest"]


def test_the_figure_draws_the_recorded_numbers(recorded: Path) -> None:
    table = pd.read_parquet(recorded)
    figure = density_figure(table)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [line_of(name).label for name in VARIANTS]
    for axes, name in zip(figure.axes, VARIANTS, strict=True):
        for when in ("before", "after"):
            rows = table[(table["variant"] == name) & (table["when"] == when)]
            (line,) = (line for line in axes.lines if line.get_label() == when)
            np.testing.assert_allclose(line.get_xdata(), rows["x"])
            seen = rows["density"] > axes.get_ylim()[0]
            np.testing.assert_allclose(line.get_ydata()[seen], rows["density"][seen])
            assert any(list(mark.get_xdata()) == list(rows[["lowest", "highest"]].iloc[0]) for mark in axes.lines)
        assert len(axes.collections) == 2
    plt.close(figure)


def test_the_script(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.pdf"
    done = subprocess.run(
        [sys.executable, str(ROOT / "figures" / "spectrum.py"), str(recorded), "--out", str(out)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"%PDF")


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match=r"table: no column 'density'.*analysis/spectrum\.py"):
        density_figure(pd.DataFrame({"variant": ["sft"], "when": ["before"]}))
