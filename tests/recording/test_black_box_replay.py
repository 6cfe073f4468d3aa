"""What the black box kept runs again, to the same loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import lcogeom as lg
from lcogeom.models import load_model
from tests.recording.grpo_loop import explode
from tests.recording.wild import SCENES, fuse, one_update, plain, task_for
from tests.small_models import build, loss_of, make_task, tell

PPO = lg.objective("ppo")


def same_state(found: dict, wanted: dict) -> None:
    assert found["param_groups"] == json.loads(json.dumps(wanted["param_groups"]))  # betas are a tuple in one of them
    assert found["state"].keys() == wanted["state"].keys()
    for number, values in wanted["state"].items():
        assert found["state"][number].keys() == values.keys()
        assert all(torch.equal(found["state"][number][name], value) for name, value in values.items())


def test_a_learning_rate_of_one_is_found_and_replayed(tmp_path: Path, device: torch.device) -> None:
    """A GRPO loop on `tiny`, learning rate 1 in update 6: the step of 6 and the gradient of 7 spike."""
    loaded = load_model("tiny", device=device)
    with pytest.warns(UserWarning, match=r"black box: update \d"):
        seen = explode(loaded, tmp_path / "run", at=6, updates=10, learning_rate=3e-4)
    run = lg.load_run(tmp_path / "run")
    step, spike = run.black_box()
    assert (step.step, spike.step) == (6, 7)
    assert "the norm of the step" in step.reason
    assert "the norm of the gradient" in spike.reason
    for entry in (step, spike):
        fresh = load_model("tiny", device=device).model
        entry.load_weights(fresh)
        assert {b.step for b in entry.batches} == set(range(entry.step - 3, entry.step + 1))
        again = lg.replay_batch(entry.batches[-1], fresh)
        assert again.recorded_loss == seen.losses[entry.step]
        assert again.loss == pytest.approx(seen.losses[entry.step], rel=1e-5, abs=1e-6)  # float32, another GEMM shape
        rows = run.tokens[run.tokens["step"] == entry.step].reset_index(drop=True)
        assert again.tokens[["sequence", "position", "token_id"]].equals(
            rows[["sequence", "position", "token_id"]].astype(int)
        )
        np.testing.assert_allclose(again.tokens["logprob"], rows["logprob"].astype(float), rtol=1e-4, atol=1e-5)
    # The heaviest token of the spike, in the run, in the report and in what the loop had in its hands:
    rows = run.tokens[run.tokens["step"] == 7]
    heaviest = rows.loc[rows["logit_grad_norm"].idxmax()]
    first = spike.tokens.iloc[0]
    assert first["text"] == heaviest["text"] == seen.completions[7][heaviest["sequence"]][heaviest["position"]]
    assert first[["sequence", "position"]].tolist() == [heaviest["sequence"], heaviest["position"]]
    total = (rows["weight"] * rows["logit_grad_norm"] ** 2).sum()
    assert first["share"] == pytest.approx(heaviest["logit_grad_norm"] ** 2 / total)
    assert spike.first_non_finite is None
    same_state(spike.optimizer_state(), seen.optimizer_state)
    assert spike.updates["update_norm"].iloc[2] == pytest.approx(run.updates["update_norm"].iloc[6])


@pytest.mark.parametrize("tap", ["auto", "logits"])
@pytest.mark.parametrize("scene", SCENES)
def test_every_way_of_training_runs_again(scene: str, tap: str, tmp_path: Path, device: torch.device) -> None:
    way = SCENES[scene]
    model = build("llama", device)
    passes = way.passes(task_for(model))
    way.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with (
        pytest.warns(UserWarning, match="to look at"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective=PPO, tap=tap) as probe,
    ):
        losses = one_update(way, model, optimizer, passes=passes, objective=PPO, probe=probe)
        probe.dump("to look at")
    [entry] = lg.load_run(tmp_path / "run").black_box()
    fresh = build("llama", device)
    fresh.to(model.dtype)  # checkpointing is off in this one
    modes = [module.training for module in fresh.modules()]
    found = [lg.replay_batch(batch, fresh) for batch in entry.batches]
    recorded = losses[::-1] if way.together else losses
    assert [one.recorded_loss for one in found] == [float(loss) for loss in recorded]
    # With the base's calls recorded, the head runs on the completion tokens alone: another product, rounded anew.
    assert [one.loss for one in found] == pytest.approx([one.recorded_loss for one in found], rel=1e-6, abs=1e-7)
    assert [module.training for module in fresh.modules()] == modes


def test_dropout_runs_again(tmp_path: Path, device: torch.device) -> None:
    """Train mode with dropout, one layer frozen in eval mode: the same random numbers, and none are used up."""
    model = build("gpt2", device)
    task = make_task(model)

    def set_modes(one: transformers.PreTrainedModel) -> None:
        one.train()
        one.transformer.h[0].eval()
        for module in one.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3

    set_modes(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torch.manual_seed(7)
    with (
        pytest.warns(UserWarning, match="to look at"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective="reinforce") as probe,
    ):
        for _ in range(2):
            loss = loss_of(model, task, lg.objective("reinforce"))
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
        probe.dump("to look at")
    [entry] = lg.load_run(tmp_path / "run").black_box()
    fresh = build("gpt2", device)
    for module in fresh.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    state = torch.get_rng_state()
    found = [lg.replay_batch(batch, fresh) for batch in entry.batches]
    assert torch.equal(state, torch.get_rng_state())
    assert abs(found[0].loss - found[1].loss) > 1e-3  # other random numbers
    assert [one.loss for one in found] == pytest.approx([one.recorded_loss for one in found], rel=1e-5)
    assert not fresh.training


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_runs_again(in_place: bool, tmp_path: Path, device: torch.device) -> None:
    """Hooks that the search puts on after the compilation fire all the same."""
    torch.compiler.reset()
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with (
        pytest.warns(UserWarning, match="black box"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective="reinforce") as probe,
    ):
        if in_place:
            model.compile(backend="eager")
        compiled = model if in_place else torch.compile(model, backend="eager")
        for update in range(3):
            optimizer.zero_grad()
            if update == 2:
                model.model.layers[0].mlp.down_proj.weight.data[3, 2] = float("inf")
            logits = compiled(input_ids=task.input_ids).logits[:, :-1][task.mask[:, 1:]]
            loss = lg.objective("reinforce").loss(logits, task.tokens()).mean()
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
    [entry] = lg.load_run(tmp_path / "run").black_box()
    assert entry.first_non_finite is not None
    assert entry.first_non_finite.name == "model.layers.0.mlp.down_proj.weight"
    first = entry.batches[0]
    assert lg.replay_batch(first, build("llama", device)).loss == pytest.approx(first.loss, rel=1e-5)


@pytest.mark.parametrize("how", ["fused forward", "base model alone"])
def test_a_fused_head_runs_again(how: str, tmp_path: Path, device: torch.device) -> None:
    """No logits are built in the run; the replay makes them of the hidden states."""
    model = build("gemma2-softcap", device)
    task = make_task(model)
    one = plain(task)[0]
    logits = one.logits(model).detach()
    batch = one.tokens()
    wanted = -(batch.advantages * torch.log_softmax(logits, 1).gather(1, batch.actions[:, None]).squeeze(1)).mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if how == "fused forward":
        fuse(model)
    with (
        pytest.warns(UserWarning, match="to look at"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective="reinforce") as probe,
    ):
        for _ in range(2):
            optimizer.zero_grad()
            if how == "fused forward":
                logp = model(**one.inputs).log_probs[one.mask[:, 1:]]
            else:
                hidden = model.model(**one.inputs).last_hidden_state[:, :-1][one.mask[:, 1:]]
                every = torch.log_softmax(3.0 * torch.tanh(model.lm_head(hidden) / 3.0), 1)
                logp = every.gather(1, batch.actions[:, None]).squeeze(1)
            loss = -(batch.advantages * logp).mean()
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
        probe.dump("to look at")
    [entry] = lg.load_run(tmp_path / "run").black_box()
    assert [recorded.module for recorded in entry.batches] == ["model", "model"]
    for recorded in entry.batches:
        assert lg.replay_batch(recorded, build("gemma2-softcap", device)).loss == pytest.approx(float(wanted), rel=1e-5)
    assert how == "fused forward" or entry.batches[0].loss == pytest.approx(float(wanted), rel=1e-5)


def test_labels_alone_run_again(tmp_path: Path, device: torch.device) -> None:
    """Supervised training through the model's own loss, without batch()."""
    model = build("llama", device)
    task = make_task(model)
    labels = task.input_ids.masked_fill(~task.mask, -100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with (
        pytest.warns(UserWarning, match="to look at"),
        lg.attach(model, optimizer, run=tmp_path / "run") as probe,
    ):
        loss = model(input_ids=task.input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        probe.dump("to look at")
    [entry] = lg.load_run(tmp_path / "run").black_box()
    found = lg.replay_batch(entry.batches[0], model)
    assert found.recorded_loss == float(loss.detach())
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    assert found.tokens["token_id"].tolist() == task.input_ids[task.mask].tolist()


def test_a_replay_that_cannot_be(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    own = lg.action_objective(lambda logp, batch: -batch.advantages * logp, name="mine")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.warns(UserWarning, match="to look at"):
        for name, objective in (("mine", own), ("none", None)):
            with lg.attach(model, optimizer, run=tmp_path / name, objective=objective) as probe:
                if name == "mine":
                    tell(probe, task)
                loss_of(model, task, own).backward()
                optimizer.step()
                probe.dump("to look at")
    [mine], [none] = (lg.load_run(tmp_path / name).black_box() for name in ("mine", "none"))
    with pytest.raises(ValueError, match="'mine' cannot be built"):
        lg.replay_batch(mine.batches[0], model)
    assert lg.replay_batch(mine.batches[0], model, own).loss == pytest.approx(
        float(loss_of(model, task, own)), abs=1e-6
    )
    with pytest.raises(ValueError, match="pass objective"):
        lg.replay_batch(none.batches[0], model)
    with pytest.raises(ValueError, match="which tokens are its completion"):
        lg.replay_batch(none.batches[0], model, "sft")
    with pytest.raises(ValueError, match="holds none"):
        mine.load_weights(model)


def test_a_tied_model_s_weights(tmp_path: Path, device: torch.device) -> None:
    model = build("llama-gqa-tied", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(UserWarning, match="to look at"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective="sft", black_box_weights=True) as probe,
    ):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        tell(probe, task)
        loss_of(model, task, lg.objective("sft")).backward()
        probe.dump("to look at")
        optimizer.step()
    [entry] = lg.load_run(tmp_path / "run").black_box()
    fresh = build("llama-gqa-tied", device, seed=1)
    entry.load_weights(fresh)
    assert all(torch.equal(value, start[name]) for name, value in fresh.state_dict().items())
    with pytest.raises(ValueError, match="do not fit"):
        entry.load_weights(build("gpt2", device))


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_explodes_and_runs_again(tmp_path: Path, device: torch.device) -> None:
    """The same on a real model of 135M parameters: one minute of one core."""
    loaded = load_model("smollm2", device=device)
    with pytest.warns(UserWarning, match="black box: update 6"):
        seen = explode(loaded, tmp_path / "run", at=6, updates=8, learning_rate=1e-5, problems=2)
    run = lg.load_run(tmp_path / "run")
    entries = run.black_box()
    assert any(entry.step == 6 and "the norm of the step" in entry.reason for entry in entries)
    for entry in entries:
        entry.load_weights(loaded.model)
        again = lg.replay_batch(entry.batches[-1], loaded.model)
        assert again.loss == pytest.approx(seen.losses[entry.step], rel=1e-4, abs=1e-6)
        rows = run.tokens[run.tokens["step"] == entry.step]
        heaviest = rows.loc[rows["logit_grad_norm"].astype(float).fillna(np.inf).idxmax()]  # not finite: the first
        text = seen.completions[entry.step][heaviest["sequence"]][heaviest["position"]]
        assert entry.tokens["text"].iloc[0] == heaviest["text"] == text


def test_a_temperature_runs_again(tmp_path: Path, device: torch.device) -> None:
    """Logits are divided by it before the softmax, in the run and in the replay."""
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with (
        pytest.warns(UserWarning, match="to look at"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective="reinforce", temperature=0.5) as probe,
    ):
        logits = model(input_ids=task.input_ids).logits[:, :-1][task.mask[:, 1:]] / 0.5
        loss = lg.objective("reinforce").loss(logits, task.tokens()).mean()
        tell(probe, task, loss)
        loss.backward()
        optimizer.step()
        probe.dump("to look at")
    [entry] = lg.load_run(tmp_path / "run").black_box()
    assert lg.replay_batch(entry.batches[0], model).loss == pytest.approx(float(loss.detach()), rel=1e-5)


def test_gradients_thrown_away_are_not_replayed(tmp_path: Path, device: torch.device) -> None:
    """A loss scaler skips a step: the passes of the update are those whose gradients were stepped with."""
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with (
        pytest.warns(UserWarning, match="thrown away"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective="sft") as probe,
    ):
        for part in (slice(0, 2), slice(2, 4)):
            optimizer.zero_grad()
            one = task.rows(part)
            tell(probe, one)
            loss_of(model, one, lg.objective("sft")).backward()
        optimizer.step()
        probe.dump("to look at")
    [entry] = lg.load_run(tmp_path / "run").black_box()
    [batch] = entry.batches
    assert torch.equal(batch.tensors()["input.input_ids"], task.input_ids[2:].cpu())
