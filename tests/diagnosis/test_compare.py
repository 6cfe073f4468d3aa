"""Two runs that part at a known update, against numpy and against the gradients themselves."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lcogeom as lg
from lcogeom import cli
from lcogeom.diagnosis import Compared
from lcogeom.runs import COLLECTION, create_folder
from tests.diagnosis.exploded import AT, UPDATES, record, tokenizer
from tests.small_models import build, loss_of, make_task

EARLIER = AT - 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a and b are the same until update EARLIER, where b takes its large step; c sees another batch."""
    path = tmp_path_factory.mktemp("runs")
    record(path / "a")
    record(path / "b", at=EARLIER)
    record(path / "c", seed=1)
    return path


def column(found: lg.Comparison, name: str) -> Compared:
    return next(one for one in found.columns if one.column == name)


def test_a_run_beside_itself(folder: Path) -> None:
    found = lg.compare(folder / "a", folder / "a")
    assert found.differ is None
    assert found.part is None
    assert found.common == UPDATES
    assert found.settings == ()
    assert found.directions is not None
    assert found.directions.travelled == pytest.approx(1)
    assert "the same in every column" in found.to_markdown()


def test_the_update_at_which_they_part(folder: Path) -> None:
    found = lg.compare(folder / "a", folder / "b")
    assert found.differ == found.part == EARLIER
    assert column(found, "update_norm").differs == EARLIER  # the step
    for name in ("grad_norm", "ratio_max", "entropy", "loss"):  # what it did is seen an update later
        assert column(found, name).differs == EARLIER + 1, name
        assert column(found, name).parts is not None
    a, b = (lg.load_run(folder / name).updates for name in "ab")
    norms = column(found, "grad_norm")
    assert norms.a == pytest.approx(a["grad_norm"].median())
    assert norms.b == pytest.approx(b["grad_norm"].median())
    assert norms.b_extreme == pytest.approx(b["grad_norm"].abs().max())
    assert norms.unit == "loss / weight"
    far = np.abs(a["entropy"] - b["entropy"]) > 0.1 * np.maximum(a["entropy"], b["entropy"])
    assert column(found, "entropy").parts == int(np.argmax(far))
    assert found.directions is not None
    assert found.directions.start == pytest.approx(1)
    assert found.directions.first_gradient == pytest.approx(1)
    assert found.directions.gradient < 0.9
    assert found.directions.travelled < 0.99


def test_tolerance_says_what_parting_is(folder: Path) -> None:
    a = lg.load_run(folder / "a")
    nudged = replace(a, updates=a.updates.assign(grad_norm=a.updates["grad_norm"] * 1.05))
    assert lg.compare(a, nudged).part is None
    assert lg.compare(a, nudged).differ == 0
    assert lg.compare(a, nudged, apart=0.04).part == 0
    turned = replace(a, updates=a.updates.assign(step_grad_cos=a.updates["step_grad_cos"] - 0.08))
    assert lg.compare(a, turned).part is None  # of a cosine, the difference counts
    assert lg.compare(a, turned, apart=0.07).part == 0


def test_a_value_that_is_finite_in_one_run_alone(folder: Path) -> None:
    a = lg.load_run(folder / "a")
    norms = a.updates["grad_norm"].copy()
    norms[3] = np.inf
    broken = replace(a, updates=a.updates.assign(grad_norm=norms))
    found = lg.compare(a, broken)
    assert column(found, "grad_norm").parts == 3
    assert column(found, "grad_norm").b_extreme == np.inf
    assert lg.compare(broken, broken).differ is None
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["part"] == 3


def test_cosines_between_runs_are_those_of_the_gradients(folder: Path) -> None:
    gradients = []
    for name, seed in (("a", 0), ("c", 1)):
        model = build("llama", torch.device("cpu"))
        task = make_task(model, sequences=4, length=16, seed=seed)
        task.input_ids[task.mask] = torch.arange(int(task.mask.sum())) % 12
        loss_of(model, task, lg.objective("ppo")).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        norm = lg.load_run(folder / name).updates["grad_norm"][0]
        assert float(gradients[-1].norm()) == pytest.approx(norm, rel=1e-5)
    exact = float(torch.cosine_similarity(*gradients, dim=0))
    found = lg.compare(folder / "a", folder / "c").directions
    assert found is not None
    assert found.first_gradient == pytest.approx(exact, abs=0.03)
    assert abs(exact) < 0.9


def test_other_models_other_lengths_and_columns(folder: Path) -> None:
    a, b = lg.load_run(folder / "a"), lg.load_run(folder / "b")
    short = replace(b, updates=b.updates.iloc[2:6][["step", "loss"]], meta={**b.meta, "model": "Other"}, damaged=("x",))
    found = lg.compare(a, short)
    assert (found.updates, found.common) == ((UPDATES, 4), 4)
    assert column(found, "grad_norm").b is None
    assert column(found, "grad_norm").parts is None
    assert found.directions is None
    assert ("model", "LlamaForCausalLM", "Other") in found.settings
    assert found.notes == ("B: x", "no cosines between the runs: they are of different models.")


def test_as_text(folder: Path) -> None:
    text = lg.compare(folder / "a", folder / "b").to_markdown()
    assert f"They differ from update {EARLIER} on (update_norm" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for lines in tables:
        assert len({len(line) for line in lines}) == 1, "aligned"
        assert re.fullmatch(r"\|( -+:? \|)+", lines[1])


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    a = lg.load_run(folder / "a")
    collection = create_folder(tmp_path / "collection", {}, kind=COLLECTION)
    for name in "ab":
        shutil.copytree(folder / name, collection / name)
    with pytest.raises(ValueError, match="apart: 0; must be a positive number"):
        lg.compare(a, a, apart=0)
    with pytest.raises(ValueError, match=r"b: .* is a collection of 2 runs; name one"):
        lg.compare(a, collection)
    with pytest.raises(ValueError, match=r"a: .* holds no updates"):
        lg.compare(replace(a, updates=a.updates.iloc[:0]), a)
    later = a.updates.assign(step=a.updates["step"] + 100)
    with pytest.raises(ValueError, match=r"no update in common; .* has 0 to 11, .* 100 to 111"):
        lg.compare(a, replace(a, updates=later))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["lcogeom", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--json", tmp_path / "c.json", "--markdown", tmp_path / "c.md")
    assert command(monkeypatch, folder / "a", folder / "b", *files) == 0
    assert json.loads((tmp_path / "c.json").read_text())["part"] == EARLIER
    assert capsys.readouterr().out == (tmp_path / "c.md").read_text()
    for arguments, said in (
        ([folder / "a"], "B: no second run"),
        ([folder / "a", folder / "nothing"], "not a run folder"),
        ([folder / "a", folder / "b", "--json", tmp_path / "no" / "c.json"], "--json: no folder"),
        ([folder / "a", "--objectives", "ppo,sft"], "--model NAME"),
        ([folder / "a", "--objectives", "ppo", "--model", "tiny"], "1 named; give two"),
        ([folder / "a", "--objectives", "ppo,sft:x", "--model", "tiny"], "NAME:KEY=VALUE"),
        ([folder / "a", "--objectives", "ppo,sft", "--model", "tiny", "--update", "1"], f"holds updates {AT}"),
    ):
        assert command(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_the_command_with_objectives(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build("llama", torch.device("cpu"), seed=5).save_pretrained(tmp_path / "model")  # the dump has the weights
    tokenizer(41).save_pretrained(tmp_path / "model")
    options = ("--objectives", "ppo,lco-kld:beta=2", "--model", tmp_path / "model", "--json", tmp_path / "c.json")
    assert command(monkeypatch, folder / "a", *options) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    updates = lg.load_run(folder / "a").updates
    assert found["step"] == AT
    assert found["a"]["grad_norm"] == pytest.approx(updates["grad_norm"][AT], rel=1e-4)
    assert found["b"]["convex_share"] == 1
    shown = capsys.readouterr().out
    assert "at the weights from before it" in shown
    assert "beta=2" in shown
