"""Sketches in a run folder against sketches and cosines of the vectors themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lcogeom as lg
from lcogeom.recording.gradients import layer_of
from tests.recording.test_updates import cosine, flat
from tests.runs.folders import part_file
from tests.small_models import build, loss_of, make_task, tell

UPDATES = 5


def record(folder: Path, device: torch.device, **options: object):
    """Clipped AdamW steps: the run, gradients as the optimiser got them, weights before each and at the end, names."""
    model = build("llama", device)
    task = make_task(model)
    objective = lg.objective("sft")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradients, weights = [], []
    with lg.attach(model, optimizer, run=folder, objective=objective, flush_every=2, **options) as probe:
        for update in range(UPDATES):
            optimizer.zero_grad()
            loss = loss_of(model, task, objective)
            tell(probe, task, loss)
            loss.backward()
            if update == 2:
                model.model.norm.weight.grad = None  # its place in the vector stays
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
            weights.append([p.detach().clone() for p in model.parameters()])
            optimizer.step()
    weights.append([p.detach().clone() for p in model.parameters()])
    return lg.load_run(folder), gradients, weights, [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("size", [64, 4096])
def test_what_is_stored(size: int, tmp_path: Path, device: torch.device) -> None:
    run, gradients, weights, _ = record(tmp_path / "run", device, sketch=size)
    found = run.sketches()
    assert found.updates.tolist() == run.updates["step"].tolist() == list(range(UPDATES))
    assert found.gradients.shape == found.steps.shape == (UPDATES, size)
    assert found.gradients.dtype == np.float32
    for update, gradient in enumerate(gradients):
        before, after = weights[update], weights[update + 1]
        step = [b - a for a, b in zip(before, after, strict=True)]
        for stored, vector in ((found.gradients, gradient), (found.steps, step), (found.weights, before)):
            wanted = lg.sketch(vector, size).cpu().numpy()
            np.testing.assert_allclose(stored[update], wanted, atol=1e-5 * np.abs(wanted).max())
    wanted = lg.sketch(weights[0], size).cpu().numpy()
    np.testing.assert_allclose(found.start, wanted, atol=1e-6 * np.abs(wanted).max())


def test_cosines_after_the_run(tmp_path: Path, device: torch.device) -> None:
    run, gradients, weights, _ = record(tmp_path / "run", device)
    found = run.sketches()
    assert run.meta["sketch"] == found.gradients.shape[1] == 16384
    g, w = [flat(gradient) for gradient in gradients], [flat(weight) for weight in weights]
    pairs = lg.sketch_cosines(found.gradients)
    towards = lg.directionality(found.gradients, found.steps)
    midway = lg.directionality(found.gradients, found.steps, end=3)
    for update in range(UPDATES):
        for other in range(UPDATES):
            off = pairs.values[update, other] - cosine(g[update], g[other])
            assert abs(off) < 4.5 * pairs.standard_error[update, other] + 1e-6
        for ways, end in ((towards, UPDATES), (midway, 3)):
            if update < end:
                off = ways.values[update] - cosine(-g[update], w[end] - w[update])
                assert abs(off) < 4.5 * ways.standard_error[update]
    exact = run.updates["step_grad_cos"].iloc[-1]  # the last step is the whole way left
    assert abs(towards.values[-1] - exact) < 4.5 * towards.standard_error[-1]


def test_layers_add_up(tmp_path: Path, device: torch.device) -> None:
    run, gradients, _, names = record(tmp_path / "run", device, sketch=4096, sketch_layers=True)
    whole = run.sketches()
    layers = sorted({layer_of(name) for name in names})
    parts = [run.sketches(layer) for layer in layers]
    assert len(parts) == 5  # embedding, two blocks, norm, head
    np.testing.assert_allclose(sum(part.gradients for part in parts), whole.gradients, atol=1e-5)
    np.testing.assert_allclose(sum(part.steps for part in parts), whole.steps, atol=1e-5)
    block = [
        torch.zeros_like(gradient) if layer_of(name) != "model.layers.1" else gradient
        for name, gradient in zip(names, gradients[1], strict=True)
    ]
    found = run.sketches("model.layers.1").gradients[1]
    np.testing.assert_allclose(found, lg.sketch(block, 4096).cpu().numpy(), atol=1e-6)
    with pytest.raises(ValueError, match=r"layer: 'model.layers.9' .* model.layers.0, model.layers.1"):
        run.sketches("model.layers.9")


def test_of_other_runs_from_the_same_weights(tmp_path: Path, device: torch.device) -> None:
    one, *_ = record(tmp_path / "one", device)
    other, *_ = record(tmp_path / "other", device)
    assert np.array_equal(one.sketches().start, other.sketches().start)


@pytest.mark.parametrize("sketch", [0, None])
def test_none_kept(sketch: int | None, tmp_path: Path, device: torch.device) -> None:
    run, *_ = record(tmp_path / "run", device, sketch=sketch)
    assert len(run.updates) == UPDATES
    assert not list((tmp_path / "run" / "sketches").iterdir())
    with pytest.raises(ValueError, match=r"holds no sketches .* attach\(\.\.\., sketch=16384\)"):
        run.sketches()


def test_bad_size_leaves_nothing_behind(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    for size in (1, -5):
        with pytest.raises(ValueError, match=f"sketch: {size}; must be at least 2"):
            lg.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), run=tmp_path / "run", sketch=size)
        assert not (tmp_path / "run").exists()


def test_a_collection_is_asked_for_one_run(tiny_replay: Path) -> None:
    run = lg.load_run(tiny_replay)
    found = run.sketches(variant="lco-kld", seed=1)
    assert found.gradients.shape == (12, 16384)
    for labels, count in (({}, 16), ({"variant": "ppo"}, 2), ({"variant": "no"}, 0), ({"colour": 1}, 0)):
        with pytest.raises(ValueError, match=f"labels: {count} runs"):
            run.sketches(**labels)


def test_cut_short(tmp_path: Path, device: torch.device) -> None:
    """Killed between the parts of a flush: sketches of updates not vouched for are left out; a lost part is said."""
    run, *_ = record(tmp_path / "run", device)
    whole = run.sketches()
    part_file(run, "updates", 2).unlink()
    found = lg.load_run(tmp_path / "run").sketches()
    assert found.updates.tolist() == [0, 1, 2, 3]
    assert np.array_equal(found.steps, whole.steps[:4])
    part = part_file(run, "sketches", 1)
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{part.name}: damaged"):
        run.sketches()
    part.unlink()
    with pytest.raises(ValueError, match="updates 2 to 3 lost their sketches"):
        run.sketches()
    part.write_bytes(content)
    assert np.array_equal(run.sketches().steps, whole.steps[:4])
    part_file(run, "updates", 0).unlink()  # steps 0 and 1 are no part of the sum any more
    with pytest.raises(ValueError, match="lacks update 0"):
        run.sketches()


@pytest.mark.parametrize("rate", [1e-6, 1e-8])
def test_steps_near_the_rounding_of_the_weights(rate: float, tmp_path: Path, device: torch.device) -> None:
    """The step is the difference of two sketches of weights a million times as large: added up in float64."""
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    before = [p.detach().clone() for p in model.parameters()]
    with lg.attach(model, optimizer, run=tmp_path / "run"):
        loss_of(model, task, lg.objective("sft")).backward()
        optimizer.step()
    step = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    wanted = lg.sketch(step).cpu().numpy()
    assert 0 < np.linalg.norm(wanted) < 1e-4
    found = lg.load_run(tmp_path / "run").sketches().steps[0]
    np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max() + 1e-13)


def test_weights_changed_between_updates_are_no_part_of_a_step(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    steps = []
    with lg.attach(model, optimizer, run=tmp_path / "run"):
        for update in range(2):
            if update == 1:
                with torch.no_grad():
                    model.lm_head.weight.mul_(0.5)  # a checkpoint loaded, an average of weights swapped in
            optimizer.zero_grad()
            loss_of(model, task, lg.objective("sft")).backward()
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            steps.append([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    run = lg.load_run(tmp_path / "run")
    for step, row in zip(steps, run.updates["update_norm"], strict=True):
        assert row == pytest.approx(float(flat(step).norm()), rel=4.5 / 181)
