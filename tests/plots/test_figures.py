"""Figures show what was recorded, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import lcogeom as lg
from lcogeom.plots import audit_figure, convexity_figure, directions_figure, stability_figure
from lcogeom.plots.convexity import PHASE_VARIANTS, same_series
from lcogeom.plots.stability import PANELS
from lcogeom.plots.style import LINES, line_of, variants
from lcogeom.runs import COLLECTION, create_folder
from lcogeom.training import DEFAULT_OBJECTIVES, ReplaySettings, replay

CONVEX = ["sft", "lco-kld", "lco-mse", "lco-lch"]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def recorded(tiny_replay: Path) -> lg.Run:
    return lg.load_run(tiny_replay)


def test_stability_draws_the_recorded_numbers(recorded: lg.Run) -> None:
    figure = stability_figure([recorded, recorded])
    grid = np.array(figure.axes).reshape(len(PANELS), 2)
    for row, (column, _, scale) in enumerate(PANELS):
        lines = {line.get_label(): line for line in grid[row, 0].lines}
        assert len(lines) == len(DEFAULT_OBJECTIVES)
        for name in DEFAULT_OBJECTIVES:
            table = recorded.updates[recorded.updates["variant"] == name].pivot(
                index="step", columns="seed", values=column
            )
            values = table.to_numpy(float)
            wanted = np.exp(np.log(values).mean(axis=1)) if scale == "log" else values.mean(axis=1)
            np.testing.assert_allclose(lines[line_of(name).label].get_ydata(), wanted)
        bands = [band.get_datalim(grid[row, 0].transData) for band in grid[row, 0].collections]
        assert len(bands) == len(DEFAULT_OBJECTIVES)  # the spread over two seeds
    plt.close(figure)


def test_convexity_draws_the_recorded_tokens(recorded: lg.Run) -> None:
    figure = convexity_figure([recorded])
    tokens = recorded.tokens[recorded.tokens["variant"].isin(PHASE_VARIANTS)]
    points = next(c for c in figure.axes[0].collections if len(c.get_offsets()) > 100).get_offsets()
    assert len(points) == len(tokens)
    np.testing.assert_allclose(points[:, 1], tokens["advantage"] * tokens["ratio"])
    np.testing.assert_allclose(points[:, 0], tokens["prob"].clip(1e-6, 1 - 1e-6))
    plt.close(figure)


def test_directions_draws_the_recorded_cosines(recorded: lg.Run) -> None:
    """Maps, lines and the error band against cosines of the stored sketches, by another route."""
    tables, maps = [], {}
    for variant in ("ppo", "lco-kld"):
        for seed in (0, 1):
            found = recorded.sketches(variant=variant, seed=seed)
            towards = lg.directionality(found.gradients, found.steps)
            columns = {"step": found.updates, "cosine": towards.values, "standard_error": towards.standard_error}
            tables.append(pd.DataFrame({"variant": variant, "seed": seed, **columns}))
        maps[variant] = lg.sketch_cosines(found.gradients).values
    figure = directions_figure(maps, pd.concat(tables), "two seeds")
    for axes, variant in zip(figure.axes, maps, strict=False):
        assert axes.get_title() == line_of(variant).label
        found = recorded.sketches(variant=variant, seed=1).gradients
        image = axes.images[0]
        np.testing.assert_allclose(image.get_array(), np.corrcoef(found), atol=0.05)  # sketches have mean about 0
        assert image.get_clim() == (-1, 1)
    lines = {line.get_label(): line for line in figure.axes[-1].lines}
    for variant in maps:
        drawn = lines[line_of(variant).label].get_ydata()
        rows = recorded.updates[(recorded.updates["variant"] == variant) & (recorded.updates["step"] == 11)]
        ends = rows["step_grad_cos"]
        assert len(ends) == 2
        assert drawn[-1] == pytest.approx(np.mean(ends), abs=0.02)  # the last step is the whole way left
    band = figure.axes[-1].collections[0].get_datalim(figure.axes[-1].transData)
    assert 0 < band.ymax == -band.ymin <= 2 / np.sqrt(16384)
    plt.close(figure)


def test_directions_needs_something_to_draw() -> None:
    frame = pd.DataFrame({"variant": ["a"], "seed": [0], "step": [0], "cosine": [1.0], "standard_error": [0.0]})
    for maps, table, words in (({}, frame, "0 maps"), ({"a": np.eye(2)}, frame[:0], "no rows")):
        with pytest.raises(ValueError, match=words):
            directions_figure(maps, table)
    with pytest.raises(ValueError, match="5 maps"):
        directions_figure(dict.fromkeys("abcde", np.eye(2)), frame)


def test_equal_lines_are_drawn_once(recorded: lg.Run) -> None:
    groups = same_series(recorded.updates, "convex_share")
    assert ["sft", "lco-kld", "lco-mse", "lco-lch"] in groups
    assert ["reinforce:negative", "ppo-unclipped:negative"] in groups


def test_a_line_ends_where_the_run_stopped_being_finite(recorded: lg.Run) -> None:
    updates = recorded.updates.copy()
    lost = (updates["variant"] == "ppo") & (updates["step"] >= 5)
    updates.loc[lost, "entropy"] = np.nan
    figure = stability_figure(
        [lg.Run(recorded.path, recorded.meta, updates, recorded.tokens, recorded.norms, recorded.columns, ())]
    )
    lines = [line for line in figure.axes[3].lines if line.get_color() == LINES["ppo"].colour]
    assert [len(line.get_xdata()) for line in lines] == [5, 1]
    assert lines[1].get_marker() == "x"
    plt.close(figure)


def test_every_line_is_told_apart(recorded: lg.Run) -> None:
    looks = {(line.colour, line.dash) for line in LINES.values()}
    assert len(looks) == len(LINES)
    assert line_of("grpo:positive").label == "grpo, A positive"
    extra = pd.concat([recorded.updates, recorded.updates.assign(variant="mine")])
    assert variants(extra) == [*LINES, "mine"]


def test_a_run_with_nothing_to_draw(tmp_path: Path) -> None:
    empty = lg.load_run(create_folder(tmp_path / "empty", {}, kind=COLLECTION))
    for draw in (stability_figure, convexity_figure):
        with pytest.raises(ValueError, match="no updates of a replay"):
            draw([empty])


def run_script(script: str, run: Path, target: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), str(run), "--out", str(target)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout


@pytest.mark.parametrize("name", ["stability", "convexity", "audit", "directionality"])
def test_figure_scripts(name: str, tiny_replay: Path, tmp_path: Path) -> None:
    run_script(f"figures/{name}.py", tiny_replay, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_stability_table(tiny_replay: Path, tmp_path: Path) -> None:
    run_script("analysis/stability.py", tiny_replay, tmp_path / "a.csv")
    table = pd.read_csv(tmp_path / "a.csv")
    assert len(table) == 2 * len(DEFAULT_OBJECTIVES)
    convex = table[table["variant"].isin(CONVEX)]
    assert (convex["convex_share"] == 1).all()
    updates = lg.load_run(tiny_replay).updates
    for _, row in table.iterrows():
        one = updates[(updates["variant"] == row["variant"]) & (updates["seed"] == row["seed"])]
        assert row["largest_norm"] == pytest.approx(one["qkv_mean_frobenius"].max())
        assert row["final_action_prob"] == pytest.approx(one.sort_values("step")["action_prob"].iloc[-1])


def test_audit_table(tiny_replay: Path, tmp_path: Path) -> None:
    run_script("analysis/audit.py", tiny_replay, tmp_path / "a.csv")
    table = pd.read_csv(tmp_path / "a.csv")
    assert len(table) == 2 * len(DEFAULT_OBJECTIVES)
    assert (table["updates"] == 3).all()
    assert (table.loc[table["variant"].isin(CONVEX), "through the logits >= 0, %"] == 100).all()
    updates = lg.load_run(tiny_replay).updates
    one = updates[(updates["variant"] == "ppo") & (updates["seed"] == 1) & updates["audit_actual"].notna()]
    row = table[(table["variant"] == "ppo") & (table["seed"] == 1)].iloc[0]
    assert row["overshoot"] == pytest.approx(one["audit_overshoot"].median())


def test_audit_draws_the_recorded_parts(tmp_path: Path, recorded: lg.Run) -> None:
    figure = audit_figure(recorded)
    for axes, variant in zip(figure.axes, DEFAULT_OBJECTIVES, strict=True):
        updates = recorded.updates[recorded.updates["variant"] == variant]
        by_step = updates[updates["audit_actual"].notna()].groupby("step")
        promised = by_step["audit_first_order"].agg(lambda values: values.abs().mean())
        assert promised.index.tolist() == [0, 4, 8]
        for bars, name in zip(axes.containers, ("first_order", "gauss_newton", "residual", "remainder"), strict=False):
            heights = [bar.get_height() for bar in bars]
            np.testing.assert_allclose(heights, by_step[f"audit_{name}"].mean() / promised, rtol=1e-9)
        ends = [(bar.get_y(), bar.get_y() + bar.get_height()) for bars in axes.containers[:4] for bar in bars]
        assert sum(start != 0 for start, _ in ends) >= 6  # of three bars with four parts, the rest stand on others
    plt.close(figure)
    settings = ReplaySettings(model="tiny", sequences=4, updates=1, objectives=("sft",))
    with pytest.raises(ValueError, match="holds no audits"):
        audit_figure(lg.load_run(replay(settings, tmp_path / "plain")))


def cosine_of(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_table_of_directionality(tiny_replay: Path, tmp_path: Path) -> None:
    run_script("analysis/directionality.py", tiny_replay, tmp_path / "a.csv")
    table = pd.read_csv(tmp_path / "a.csv")
    assert len(table) == 2 * len(DEFAULT_OBJECTIVES)
    run = lg.load_run(tiny_replay)
    for _, row in table.iterrows():
        found = run.sketches(variant=row["variant"], seed=row["seed"])
        ways = [found.steps[t:].sum(axis=0, dtype=float) for t in range(12)]
        cosines = [-cosine_of(g, w) for g, w in zip(found.gradients, ways, strict=True)]
        assert row["first"] == pytest.approx(cosines[0], abs=1e-5)
        assert row["last"] == pytest.approx(cosines[-1], abs=1e-5)
        assert row["mean"] == pytest.approx(np.mean(cosines), abs=1e-5)
        assert row["share_positive"] == np.mean(np.array(cosines) > 0)
        assert row["share_surely_positive"] <= row["share_positive"] <= 1 - row["share_surely_negative"]
        five = [cosine_of(found.gradients[t], found.gradients[t + 5]) for t in range(7)]
        assert row["five_apart"] == pytest.approx(np.mean(five), abs=1e-5)
        later = [-cosine_of(found.gradients[t], ways[t + 1]) for t in range(11)]
        assert row["mean_later"] == pytest.approx(np.mean(later), abs=1e-5)
        assert row["mean_low"] < row["mean"] < row["mean_high"]
