"""Two objectives on a recorded batch, against the records of the run itself and against plain autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import lcogeom as lg
from tests.diagnosis.exploded import AT, record
from tests.small_models import build, loss_of, make_task, tell


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lg.Run:
    return record(tmp_path_factory.mktemp("objectives") / "run")


@pytest.fixture
def model(run: lg.Run) -> transformers.PreTrainedModel:
    """With the weights from before update AT."""
    model = build("llama", torch.device("cpu"), seed=3)
    run.black_box()[0].load_weights(model)
    return model


def batches(run: lg.Run, step: int = AT) -> list[lg.RecordedBatch]:
    return [batch for batch in run.black_box()[0].batches if batch.step == step]


def test_the_objective_of_the_run_gives_its_records(run: lg.Run, model: transformers.PreTrainedModel) -> None:
    generator = torch.get_rng_state()
    before = [parameter.clone() for parameter in model.parameters()]
    found = lg.compare_objectives(batches(run), model, "ppo", "sft")
    row = run.updates.set_index("step").loc[AT]
    assert found.step == AT
    assert found.tokens == row["tokens"]
    assert found.a.loss == pytest.approx(row["loss"], rel=1e-5)
    assert found.a.grad_norm == pytest.approx(row["grad_norm"], rel=1e-5)
    assert found.a.logit_grad_norm == pytest.approx(row["logit_grad_norm"], rel=1e-5)
    assert found.a.convex_share == pytest.approx(row["convex_share"])
    norms = run.norms[(run.norms["step"] == AT) & (run.norms["scope"] == "layer")].set_index("name")["grad_norm"]
    assert found.a.layers == pytest.approx(norms.to_dict(), rel=1e-4)
    assert found.b.convex_share == 1
    assert found.b.lowest == pytest.approx(0, abs=1e-12)
    assert found.a.lowest < 0
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_gradients_against_plain_autograd(run: lg.Run, model: transformers.PreTrainedModel) -> None:
    found = lg.compare_objectives(batches(run), model, "ppo", "reinforce")
    task = make_task(build("llama", torch.device("cpu")), sequences=4, length=16)
    task.input_ids[task.mask] = torch.arange(int(task.mask.sum())) % 12
    gradients, pulls = [], []
    for name in ("ppo", "reinforce"):
        loss = loss_of(model, task, lg.objective(name))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
        logits = model(input_ids=task.input_ids).logits[:, :-1][task.mask[:, 1:]].detach().double().requires_grad_()
        (pull,) = torch.autograd.grad(lg.objective(name).loss(logits, task.tokens()).mean(), logits)
        pulls.append(pull)
    assert found.grad_cosine == pytest.approx(float(torch.cosine_similarity(*gradients, dim=0)), abs=1e-5)
    flat = [pull.flatten() for pull in pulls]
    assert found.logit_cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-6)
    assert found.b.grad_norm == pytest.approx(float(gradients[1].norm()), rel=1e-5)
    assert -0.99 < found.grad_cosine < 0.99
    assert set(found.layer_cosines) == set(found.a.layers)
    assert found.opposed == 0  # ratios only scale what REINFORCE does


def test_curvature_along_the_gradient_by_moving_the_weights(run: lg.Run, model: transformers.PreTrainedModel) -> None:
    """SFT's Hessian in the logits is the Fisher matrix: the curvature is the mean variance of the logits' motion."""
    found = lg.compare_objectives(batches(run), model, "sft", lg.objective("sft") * 3.0)
    one = lg.compare_objectives(batches(run), model, "sft", "sft").a
    assert found.b.gauss_newton == pytest.approx(3 * one.gauss_newton, rel=1e-6)
    assert found.grad_cosine == pytest.approx(1)
    task = make_task(build("llama", torch.device("cpu")), sequences=4, length=16)
    task.input_ids[task.mask] = torch.arange(int(task.mask.sum())) % 12
    model = model.double()
    params = list(model.parameters())
    gradient = torch.autograd.grad(loss_of(model, task, lg.objective("sft")), params)
    size = float(torch.cat([g.flatten() for g in gradient]).norm())
    h, start, values = 1e-3, [parameter.detach().clone() for parameter in params], []
    with torch.no_grad():
        for sign in (1, -1, 0):
            for parameter, old, part in zip(params, start, gradient, strict=True):
                parameter.copy_(old + sign * h * part / size)
            values.append(model(input_ids=task.input_ids).logits[:, :-1][task.mask[:, 1:]])
    p = torch.softmax(values[2], 1)
    moved = (values[0] - values[1]) / (2 * h)
    variance = (p * moved**2).sum(1) - (p * moved).sum(1) ** 2
    assert found.a.gauss_newton == pytest.approx(float(variance.mean()), rel=1e-3)


def test_what_was_not_recorded_stands_in_and_is_said(
    run: lg.Run, model: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    whole = lg.compare_objectives(batches(run), model, "lco-kld", "gspo")
    assert whole.notes == ()  # the loop handed over old logits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    task = make_task(model)
    with lg.attach(model, optimizer, tmp_path / "run") as probe:
        loss = loss_of(model, task, lg.objective("reinforce"))
        probe.batch(input_ids=task.input_ids, action_mask=task.mask, advantages=task.advantages, loss=loss)
        loss.backward()
        optimizer.step()
        with pytest.warns(UserWarning, match="to compare"):
            probe.dump("to compare")
    (entry,) = lg.load_run(tmp_path / "run").black_box()
    found = lg.compare_objectives(entry.batches, model, "lco-kld", "ppo")
    assert len(found.notes) == 2
    assert found.a.convex_share == 1
    same = lg.compare_objectives(entry.batches, model, "ppo", "reinforce")  # at ratio 1 their gradients are one
    assert same.grad_cosine == pytest.approx(1)
    assert same.a.grad_norm == pytest.approx(same.b.grad_norm)
    assert same.a.convex_share < same.b.convex_share


def test_dropout_is_the_one_of_the_run(tmp_path: Path) -> None:
    model = build("gpt2", torch.device("cpu")).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    task = make_task(model)
    with lg.attach(model, optimizer, tmp_path / "run", objective="ppo") as probe:
        loss = loss_of(model, task, lg.objective("ppo"))
        tell(probe, task, loss)
        loss.backward()
        optimizer.step()
        with pytest.warns(UserWarning, match="to compare"):
            probe.dump("to compare")
    run = lg.load_run(tmp_path / "run")
    found = lg.compare_objectives(run.black_box()[0].batches, model.eval(), "ppo", "sft").a
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)
    assert found.grad_norm == pytest.approx(run.updates["grad_norm"][0], rel=1e-5)
    assert not model.training


def test_bad_input(run: lg.Run, model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    entry = run.black_box()[0]
    with pytest.raises(ValueError, match=f"batches: of updates .*{AT}"):
        lg.compare_objectives(entry.batches, model, "ppo", "sft")
    with pytest.raises(ValueError, match="ref_logprobs"):
        lg.compare_objectives(batches(run), model, "k3", "sft")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite; load the weights from before"):
        lg.compare_objectives(batches(run), model, "ppo", "sft")
