"""The study of m_H and m_F, small, on the real tiny model; its figure shows the table's rows."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from lcogeom.models import load_model
from lcogeom.plots import capo_figure
from lcogeom.training import ReplaySettings
from lcogeom.training.replay import completion_logits, make_batch, one_update, variant_objective

ROOT = Path(__file__).parent.parent.parent
UPDATES, SEQUENCES = 6, 16


def run(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("capo") / "capo.parquet"
    printed = run("analysis/capo.py", "tiny", "--seeds", 1, "--updates", UPDATES, "--out", out)
    assert "exact - empirical" in printed
    return pd.read_parquet(out)


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("capo_study", ROOT / "analysis" / "capo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_levels_agree(table: pd.DataFrame) -> None:
    keys = ["optimizer", "objective", "update"]
    tokens, sentences, updates = (table[table["level"] == level] for level in ("token", "sentence", "update"))
    assert len(updates) == 3 * 2 * UPDATES
    assert len(sentences) == SEQUENCES * len(updates)
    for column in ("kl", "kl_head", "rise", "rise_head"):
        means = tokens.groupby(keys)[column].mean()
        np.testing.assert_allclose(updates.set_index(keys)[column].reindex(means.index), means, rtol=1e-9, atol=1e-15)
        means = tokens.groupby([*keys, "sequence"])[column].mean()
        own = sentences.set_index([*keys, "sequence"])[column].reindex(means.index)
        np.testing.assert_allclose(own, means, rtol=1e-9, atol=1e-15)
    for name in ("m_H", "m_F_empirical", "m_F_exact"):
        means = tokens.groupby(keys)[f"{name}_in_update"].mean()
        np.testing.assert_allclose(updates.set_index(keys)[name].reindex(means.index), means, rtol=1e-9, atol=1e-15)
    assert tokens.notna().all().all()


def test_predictions_are_of_the_real_step_of_the_head(table: pd.DataFrame) -> None:
    """`tiny` has a head of its own: its real step is the modelled one, up to the third order and float32 gradients."""
    updates = table[table["level"] == "update"]
    assert (updates["kl_head"] > 0).all()
    np.testing.assert_allclose(updates["m_F_exact"], updates["kl_head"], rtol=0.02)
    near = updates[updates["kl_head"] < 1e-4]
    assert len(near) > len(updates) / 2
    np.testing.assert_allclose(near["m_H"], near["rise_head"], rtol=0.02, atol=1e-7)


def test_the_true_kl_is_that_of_the_network(table: pd.DataFrame) -> None:
    """The first updates made again, their KL by its definition."""
    loaded = load_model("tiny")
    batch = make_batch(loaded, ReplaySettings(sequences=SEQUENCES), 0, lambda *_: None)
    start = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    for optimizer, build in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        loaded.model.load_state_dict(start)
        given = build(loaded.model.parameters(), lr=3e-4 if optimizer == "adamw" else 1e-3, weight_decay=0.0)
        objective, _ = variant_objective("reinforce")
        for update in range(2):
            with torch.no_grad():
                before = completion_logits(loaded.model, batch.sequences).double().log_softmax(1)
            one_update(loaded.model, given, objective, batch)
            with torch.no_grad():
                after = completion_logits(loaded.model, batch.sequences).double().log_softmax(1)
            kl = (before.exp() * (before - after)).sum(1)
            rows = table[(table["level"] == "token") & (table["objective"] == "reinforce")]
            rows = rows[(rows["optimizer"] == optimizer) & (rows["update"] == update)]
            np.testing.assert_allclose(rows["kl"], kl, rtol=0.01, atol=1e-10)


def test_weighted_ranks_are_those_of_repeated_rows(study: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, size=(2, 40)), rng.integers(0, 9, size=40)
    x = x[0] + x[1]
    codes = [np.unique(values, return_inverse=True)[1] for values in (x, y)]
    weights = rng.integers(0, 4, size=40)
    found = study.spearman(*codes, weights.astype(float))
    assert found == pytest.approx(spearmanr(np.repeat(x, weights), np.repeat(y, weights)).statistic, abs=1e-12)


def test_intervals_draw_whole_clusters(study: ModuleType) -> None:
    """Two clusters that contradict each other: every resampling is one, the other or both."""
    x = np.arange(8.0)
    rows = pd.DataFrame({"x": np.tile(x, 2), "y": np.r_[x, -x], "sequence": np.repeat([0, 1], 8)})
    found = study.pooled(rows, [("x", "y")], ["sequence"])[:, 0]
    assert found[0] == pytest.approx(spearmanr(rows["x"], rows["y"]).statistic)
    assert {round(value, 9) for value in found} == {-1.0, round(found[0], 9), 1.0}

    rows = rows.assign(seed=0, update=rows["sequence"], block=rows["sequence"])
    found = study.within(rows, [("x", "y")])[:, 0]
    assert found[0] == pytest.approx(0.0)
    assert {round(value, 9) for value in found} == {-1.0, 0.0, 1.0}


def test_figure_draws_the_table(table: pd.DataFrame, tmp_path: Path) -> None:
    figure = capo_figure(table, "tiny", "sgd")
    tokens = table[(table["level"] == "token") & (table["optimizer"] == "sgd")]
    wanted = [
        (f"m_F_{kind}{suffix}", truth)
        for suffix, truth in (("", "kl"), ("_in_update", "kl_head"))
        for kind in ("empirical", "exact")
    ]
    for axes, (predicted, truth) in zip(figure.axes, wanted, strict=True):
        drawn = np.concatenate([points.get_offsets() for points in axes.collections])
        both = tokens[tokens[predicted] > tokens[predicted].max() * 1e-14]
        for column, values in ((predicted, drawn[:, 0]), (truth, drawn[:, 1])):
            assert len(values) == len(tokens)
            assert set(both[column]) <= set(values)
        shown = {text.get_text() for text in axes.texts}
        for name in ("ppo", "reinforce", "lco-kld"):
            rows = tokens[tokens["objective"] == name]
            assert f"ρ = {rows[predicted].rank().corr(rows[truth].rank()):.2f}" in shown
        (line,) = axes.lines
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    plt.close(figure)
    with pytest.raises(ValueError, match=r"no token of model 'smollm2' with optimizer 'sgd'"):
        capo_figure(table, "smollm2", "sgd")

    source = tmp_path / "capo.parquet"
    table.to_parquet(source)
    assert str(tmp_path / "capo.pdf") in run("figures/capo.py", source, "--out", tmp_path / "capo.pdf")
    assert (tmp_path / "capo.pdf").read_bytes().startswith(b"%PDF")


def test_an_unknown_model_is_said() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "analysis" / "capo.py"), "gpt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "MODEL: gpt" in done.stderr
