"""The black box: what triggers it, what it names, and that its batches run again to the same loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import lcogeom as lg
from lcogeom.models import load_model
from lcogeom.recording.triggers import Triggers
from tests.recording.grpo_loop import explode
from tests.recording.wild import SCENES, one_update, task_for
from tests.small_models import Task, build, loss_of, make_task, tell

PPO = lg.objective("ppo")


def same_state(found: dict, wanted: dict) -> None:
    assert found["param_groups"] == json.loads(json.dumps(wanted["param_groups"]))  # betas are a tuple in one of them
    assert found["state"].keys() == wanted["state"].keys()
    for number, values in wanted["state"].items():
        assert found["state"][number].keys() == values.keys()
        assert all(torch.equal(found["state"][number][name], value) for name, value in values.items())


def train(
    folder: Path,
    model: transformers.PreTrainedModel,
    task: Task,
    *,
    updates: int = 8,
    before: dict[int, Callable[[], object]] | None = None,
    factor: dict[int, float] | None = None,
    objective: lg.Objective = PPO,
    **options: object,
) -> list[float]:
    """A loop that does something before some updates, or scales their loss; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    with lg.attach(model, optimizer, run=folder, objective=objective, **options) as probe:
        for update in range(updates):
            (before or {}).get(update, lambda: None)()
            optimizer.zero_grad()
            loss = loss_of(model, task, objective) * (factor or {}).get(update, 1.0)
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def poison(parameter: Tensor, value: float, place: tuple[int, int] = (3, 2)) -> Callable[[], object]:
    def change() -> None:
        with torch.no_grad():
            parameter[place] = value

    return change


# What triggers it


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


def test_what_is_a_spike() -> None:
    triggers = Triggers(spike=10.0, apart=2)
    norms = [1.0, 0.0, 1.0, 50.0, 1.0, 1.0, 9.9, 10.1, 200.0, 1.0, 1.0, 1.0, 11.0]
    found = [triggers.before_step(step, [], norm) for step, norm in enumerate(norms)]
    # 50 comes before five norms above 0 are known; 200 goes on with what 10.1 began; 11 is a new event
    assert [step for step, reason in enumerate(found) if reason] == [7, 12]
    assert found[7] == "the norm of the gradient is 10.1, 10.1 times its median"
    assert [triggers.after_step(step, 2.0) for step in range(11)] == [None] * 11
    assert triggers.after_step(12, 40.0) is None  # 20 times the usual, which a gradient 11 times the usual explains
    assert triggers.after_step(15, 40.0) == "the norm of the step is 40, 20 times its median"
    assert triggers.before_step(13, [0.5, float("-inf")], 1.0) == "the loss is -inf"
    assert triggers.before_step(14, [], float("nan")) is None  # the same event


def test_dumps_are_bounded_and_every_event_is_listed(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    spikes = {step: 1e3 for step in (6, 9, 12, 15, 18)}
    with pytest.warns(UserWarning, match="3 dumps were made already"):
        train(tmp_path / "run", model, make_task(model), updates=20, factor=spikes, black_box=1)
    run = lg.load_run(tmp_path / "run")
    assert [entry.step for entry in run.black_box()] == [6, 9, 12]
    assert not any(entry.has_weights for entry in run.black_box())
    lines = (tmp_path / "run" / "black_box" / "triggers.jsonl").read_text().splitlines()
    events = [(event["step"], event["dumped"]) for event in map(json.loads, lines)]
    assert events == [(6, True), (9, True), (12, True), (15, False), (18, False)]


def test_a_quiet_run_writes_nothing(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    train(tmp_path / "run", model, make_task(model))
    assert lg.load_run(tmp_path / "run").black_box() == []
    assert not (tmp_path / "run" / "black_box").exists()


# The first tensor that is not finite


def test_a_nan_in_a_weight(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    weight = model.model.layers[1].mlp.up_proj.weight
    bad = poison(weight, float("nan"))
    with pytest.warns(UserWarning, match="the loss is nan"):
        train(tmp_path / "run", model, make_task(model), before={5: bad})
    [entry] = lg.load_run(tmp_path / "run").black_box()
    assert entry.step == 5
    assert entry.first_non_finite == lg.NonFinite(
        "weight", "model.layers.1.mlp.up_proj.weight", "nan", 1 / weight.numel(), 0
    )
    assert "ran again" in entry.note


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 3e38)])
@pytest.mark.parametrize("tap", ["hidden", "logits"])
def test_an_overflow_of_the_logits(
    dtype: torch.dtype, size: float, tap: str, tmp_path: Path, device: torch.device
) -> None:
    """Finite weights, finite hidden states, infinite logits."""
    model = build("llama", device).to(dtype)
    task = make_task(model)
    large = lambda: model.lm_head.weight.data.fill_(size)  # noqa: E731
    with pytest.warns(UserWarning, match="black box: update 2"):
        train(tmp_path / "run", model, task, updates=4, before={2: large}, tap=tap)
    [entry] = lg.load_run(tmp_path / "run").black_box()
    found = entry.first_non_finite
    assert found is not None
    assert (found.what, found.name) == {
        "hidden": ("logits", "of the completion tokens"),
        "logits": ("output", "lm_head"),
    }[tap]
    assert "inf" in found.kind


def test_a_nan_that_only_the_backward_pass_makes(tmp_path: Path, device: torch.device) -> None:
    """0 * sqrt(0): finite forward, NaN backward."""
    model = build("llama", device)

    class Rooted(torch.nn.Module):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.silu(x) + (0 * (x - x).sqrt() if self.broken else 0)

    act = model.model.layers[0].mlp.act_fn = Rooted()
    with pytest.warns(UserWarning, match="the norm of the gradient is nan"):
        train(tmp_path / "run", model, make_task(model), updates=4, before={2: lambda: setattr(act, "broken", True)})
    [entry] = lg.load_run(tmp_path / "run").black_box()
    found = entry.first_non_finite
    assert found is not None
    # d act / d x is NaN: the first tensor behind it is what gate_proj put out
    assert (found.what, found.name, found.kind) == ("gradient", "output of model.layers.0.mlp.gate_proj", "nan")


def test_an_infinite_loss_names_its_token(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    task.old_logprobs[1, 6] = -1e4  # A < 0, so PPO does not clip: its ratio overflows
    with pytest.warns(UserWarning, match="the loss is inf"):
        train(tmp_path / "run", model, task, updates=2)
    [entry] = lg.load_run(tmp_path / "run").black_box()
    token = int(task.input_ids[1, 6])
    share = 1 / int(task.mask.sum())
    wanted = lg.NonFinite("loss", f"sequence 1, position 2, token {token}", "inf", pytest.approx(share), 0)
    assert entry.first_non_finite == wanted
    assert entry.batches[-1].loss == float("inf")
    assert entry.updates["loss"].tolist() == [float("inf")]
    replayed = lg.replay_batch(entry.batches[-1], build("llama", device))
    assert np.isinf(replayed.tokens["loss"]).sum() == 1


def test_a_loss_that_is_not_what_it_says(tmp_path: Path, device: torch.device) -> None:
    """The loop's own code makes the NaN: what runs again is finite, and the report says so."""
    model = build("llama", device)
    with pytest.warns(UserWarning, match="the loss is nan"):
        train(tmp_path / "run", model, make_task(model), updates=3, factor={1: float("nan")})
    [entry] = lg.load_run(tmp_path / "run").black_box()
    assert entry.first_non_finite is not None
    assert entry.first_non_finite.what == "loss"
    assert "the loop's own loss" in entry.note


def test_a_step_that_breaks_the_weights(tmp_path: Path, device: torch.device) -> None:
    """Finite gradient, infinite step; the weights kept are those from before it."""
    model = build("llama", device)
    task = make_task(model)
    objective = lg.objective("sft")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        pytest.warns(UserWarning, match="though the gradient's is finite"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective=objective, black_box_weights=True) as probe,
    ):
        for update in range(2):
            optimizer.param_groups[0]["lr"] = float("inf") if update == 1 else 0.0
            loss = loss_of(model, task, objective)
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
    [entry] = lg.load_run(tmp_path / "run").black_box()
    assert entry.first_non_finite is not None
    assert entry.first_non_finite.what == "weight"
    fresh = build("llama", device, seed=1)
    entry.load_weights(fresh)
    assert all(torch.equal(value, start[name]) for name, value in fresh.state_dict().items())
    with pytest.raises(ValueError, match="holds no state"):
        entry.optimizer_state()


def test_a_nan_advantage_is_refused_and_nothing_is_lost(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    spoil = lambda: task.advantages.fill_(float("nan"))  # noqa: E731
    with pytest.raises(ValueError, match="advantages: NaN"):
        train(tmp_path / "run", model, task, before={3: spoil})
    run = lg.load_run(tmp_path / "run")
    assert run.updates["step"].tolist() == [0, 1, 2]
    assert run.black_box() == []


def test_a_loop_that_stops_before_the_step(tmp_path: Path, device: torch.device) -> None:
    """clip_grad_norm_(error_if_nonfinite=True) raises: the optimiser never steps, the batch is kept all the same."""
    model = build("llama", device)
    task = make_task(model)
    poison(model.model.layers[0].self_attn.v_proj.weight, float("inf"))()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop() -> None:
        with lg.attach(model, optimizer, run=tmp_path / "run", objective="sft") as probe:
            tell(probe, task)
            loss_of(model, task, lg.objective("sft")).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)

    with pytest.warns(UserWarning, match="black box: update 0"), pytest.raises(RuntimeError, match="non-finite"):
        loop()
    [entry] = lg.load_run(tmp_path / "run").black_box()
    assert entry.first_non_finite is not None
    assert entry.first_non_finite.name == "model.layers.0.self_attn.v_proj.weight"


def test_decided_late(tmp_path: Path, device: torch.device) -> None:
    """As on an accelerator: numbers come after the step, the passes do not run again."""
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with (
        pytest.warns(UserWarning, match="black box"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective=PPO) as probe,
    ):
        assert probe._black_box is not None
        probe._black_box._at_once = False
        for update in range(9):
            optimizer.zero_grad()
            if update == 8:
                poison(model.lm_head.weight, float("nan"))()
            loss = loss_of(model, task, PPO) * (1e3 if update == 6 else 1)
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
    spike, broken = lg.load_run(tmp_path / "run").black_box()
    assert (spike.step, broken.step) == (6, 8)
    assert broken.first_non_finite is not None
    assert broken.first_non_finite.what == "logits"
    assert "log-probabilities" in broken.note
    assert [batch.step for batch in broken.batches] == [5, 6, 7, 8]


# What is kept


def test_dump_on_call(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with lg.attach(model, optimizer, run=tmp_path / "run", objective=PPO, black_box=2) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, task, PPO)
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
        with pytest.warns(UserWarning, match="to look at"):
            first = probe.dump("to look at")
            second = probe.dump("to look at again")
    assert [place.name for place in (first, second) if place] == ["step-000002", "step-000002-2"]
    entry = lg.load_run(tmp_path / "run").black_box()[0]
    assert [batch.step for batch in entry.batches] == [1, 2]
    with (
        lg.attach(model, optimizer, run=tmp_path / "off", black_box=0) as probe,
        pytest.raises(ValueError, match="dump"),
    ):
        probe.dump("nothing there")


def test_buffers_that_the_loop_reuses(tmp_path: Path, device: torch.device) -> None:
    """Inputs and advantages are overwritten in place after the step; the record holds what was trained on."""
    model = build("llama", device)
    task = make_task(model)
    ids, advantages = task.input_ids.clone(), task.advantages.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with lg.attach(model, optimizer, run=tmp_path / "run", objective=PPO) as probe:
        loss = loss_of(model, task, PPO)
        tell(probe, task, loss)
        loss.backward()
        optimizer.step()
        task.input_ids.zero_()
        task.advantages.zero_()
        with pytest.warns(UserWarning, match="overwritten"):
            probe.dump("overwritten")
    [entry] = lg.load_run(tmp_path / "run").black_box()
    tensors = entry.batches[0].tensors()
    assert torch.equal(tensors["input.input_ids"], ids.cpu())
    assert torch.equal(tensors["batch.advantages"], advantages.cpu())
    assert lg.replay_batch(entry.batches[0], model).loss == pytest.approx(float(loss.detach()), rel=1e-5)


def test_a_large_tensor_is_left_out_and_said(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcogeom.recording.passes.LARGE_BYTES", 2000)
    model = build("llama", device)
    objective = lg.objective("lco-kld")
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with lg.attach(model, optimizer, run=tmp_path / "run", objective=objective) as probe:
        tell(probe, task)
        loss_of(model, task, objective).backward()
        optimizer.step()
        with pytest.warns(UserWarning, match="to look at"):
            probe.dump("to look at")
    [entry] = lg.load_run(tmp_path / "run").black_box()
    assert "old_logits" in entry.batches[0].left_out
    with pytest.raises(ValueError, match="old_logits"):
        lg.replay_batch(entry.batches[0], model)
    assert lg.replay_batch(entry.batches[0], model, "sft").loss > 0


def test_a_disk_that_refuses(tmp_path: Path, device: torch.device) -> None:
    """One warning; the run goes on, and what it records is whole."""
    model = build("llama", device)
    task = make_task(model)
    blocked = lambda: (tmp_path / "run" / "black_box").write_text("a file where the folder should be")  # noqa: E731
    with pytest.warns(UserWarning, match="could not be written") as caught:
        losses = train(tmp_path / "run", model, task, updates=12, before={0: blocked}, factor={6: 1e3, 11: 1e3})
    assert sum("black box" in str(one.message) for one in caught) == 1
    assert len(losses) == len(lg.load_run(tmp_path / "run").updates) == 12


def test_a_damaged_dump(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    with pytest.warns(UserWarning, match="Written to"):
        train(tmp_path / "run", model, make_task(model), updates=14, factor={6: 1e3, 12: 1e3})
    run = lg.load_run(tmp_path / "run")
    first, *others = run.black_box()
    report = first.path / "report.json"
    report.write_bytes(report.read_bytes()[:100])
    file = others[-1].batches[0].path
    file.write_bytes(file.read_bytes()[:50])
    (tmp_path / "run" / "black_box" / ".step-000099-abc").mkdir()  # a dump that a kill cut short
    with pytest.warns(UserWarning, match=f"{first.path.name}.*damaged"):
        assert [entry.path for entry in run.black_box()] == [entry.path for entry in others]
    with pytest.raises(ValueError, match=r"safetensors.*damaged"):
        others[-1].batches[0].tensors()


def test_arguments(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for options in ({"black_box": -1}, {"spike": 1.0}, {"spike": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            lg.attach(model, optimizer, run=tmp_path / "run", **options)
    with pytest.raises(ValueError, match="black_box_weights"):
        lg.attach(model, optimizer, run=tmp_path / "run", black_box=0, black_box_weights=True)
    assert not (tmp_path / "run").exists()


# What runs again


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
    close = {"rel": 1e-2, "abs": 1e-3} if way.low else {"rel": 1e-5, "abs": 1e-6}
    assert [one.loss for one in found] == pytest.approx([one.recorded_loss for one in found], **close)
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


def test_a_compiled_model_runs_again(tmp_path: Path, device: torch.device) -> None:
    torch.compiler.reset()
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with (
        pytest.warns(UserWarning, match="black box"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective="reinforce") as probe,
    ):
        compiled = torch.compile(model, backend="eager")
        for update in range(3):
            optimizer.zero_grad()
            if update == 2:
                poison(model.model.layers[0].mlp.down_proj.weight, float("inf"))()
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
    """The same on a real model of 135M parameters: about two minutes on one core."""
    loaded = load_model("smollm2", device=device)
    with pytest.warns(UserWarning, match="black box: update 6"):
        seen = explode(loaded, tmp_path / "run", at=6, updates=8, learning_rate=1e-5, problems=2)
    run = lg.load_run(tmp_path / "run")
    entries = run.black_box()
    assert any(entry.step == 6 and "the norm of the step" in entry.reason for entry in entries)
    for entry in entries:
        entry.load_weights(loaded.model)
        again = lg.replay_batch(entry.batches[-1], loaded.model)
        print(entry.step, entry.reason, again.loss, again.recorded_loss, entry.tokens.to_string())
        assert again.loss == pytest.approx(seen.losses[entry.step], rel=1e-4, abs=1e-6)
        rows = run.tokens[run.tokens["step"] == entry.step]
        heaviest = rows.loc[rows["logit_grad_norm"].idxmax()]
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
