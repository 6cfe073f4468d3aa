"""What a loop does to its gradients is undone in the record: temperature, accumulation, fp16 scale, clipping; and which
tensor the automatic tap reads."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lcogeom as lg
from tests.small_models import Task, build, loss_of, make_task, tell

PARTS = [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)]


def wanted_d1(task: Task) -> np.ndarray:
    """REINFORCE, mean over the micro-batch's tokens."""
    return (-task.advantages[task.mask] / task.mask.sum()).cpu().double().numpy()


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap"])
@pytest.mark.parametrize("tap", ["hidden", "logits"])
def test_temperature(name: str, tap: str, tmp_path: Path, device: torch.device) -> None:
    """The policy is softmax(z / T): its probabilities, its f', its inertia."""
    model = build(name, device)
    task = make_task(model)
    temperature, objective = 0.7, lg.objective("reinforce")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, tmp_path / "run", objective=objective, tap=tap, temperature=temperature) as probe:
        cooled = model(input_ids=task.input_ids).logits[:, :-1][task.mask[:, 1:]] / temperature
        cooled.retain_grad()
        tell(probe, task)
        objective.loss(cooled, task.tokens()).mean().backward()
        optimizer.step()
    tokens = lg.load_run(tmp_path / "run").tokens
    logp = torch.log_softmax(cooled.detach().double(), 1)
    actions = task.input_ids[task.mask]
    np.testing.assert_allclose(tokens["logprob"], logp.gather(1, actions[:, None])[:, 0].cpu(), atol=1e-5)
    np.testing.assert_allclose(tokens["entropy"], -(logp.exp() * logp).sum(1).cpu(), atol=1e-5)
    np.testing.assert_allclose(tokens["d1"], wanted_d1(task), rtol=2e-4, atol=1e-7)
    assert cooled.grad is not None
    np.testing.assert_allclose(
        tokens["logit_grad_norm"], cooled.grad.norm(dim=1).cpu() / temperature, rtol=1e-3, atol=1e-7
    )
    assert tokens["misfit"].max() < 1e-3
    assert tokens["convex"].tolist() == (tokens["advantage"] >= 0).tolist()


def test_a_wrong_temperature_shows_in_the_misfit(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, tmp_path / "run", objective="sft") as probe:
        logits = model(input_ids=task.input_ids).logits[:, :-1][task.mask[:, 1:]] / 0.5
        tell(probe, task)
        lg.objective("sft").loss(logits, task.tokens()).mean().backward()
        optimizer.step()
    assert lg.load_run(tmp_path / "run").tokens["misfit"].median() > 0.05


@pytest.mark.parametrize("tap", ["hidden", "logits"])
def test_accumulation(tap: str, tmp_path: Path, device: torch.device) -> None:
    """Four micro-batches, each loss divided by 4: tokens in the units of their own micro-batch's loss."""
    model = build("llama", device)
    task = make_task(model)
    objective = lg.objective("reinforce")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, tmp_path / "run", objective=objective, tap=tap) as probe:
        for part in PARTS:
            loss = loss_of(model, task.rows(part), objective)
            tell(probe, task.rows(part), loss)
            (loss / 4).backward()
        gradient = flat([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
    run = lg.load_run(tmp_path / "run")
    wanted = np.concatenate([wanted_d1(task.rows(part)) for part in PARTS])
    np.testing.assert_allclose(run.tokens["d1"], wanted, rtol=2e-4, atol=1e-7)
    assert run.updates["grad_norm"][0] == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert run.updates["loss_factor"][0] == pytest.approx(1.0)
    assert run.tokens["sequence"].unique().tolist() == [0, 1, 2, 3]


def test_fp16_scale(tmp_path: Path, device: torch.device) -> None:
    """Norms and tokens in true units; an overflow, for which the scaler makes no step, leaves no tokens behind."""
    model = build("llama", device)
    task = make_task(model)
    objective = lg.objective("reinforce")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    norms = []
    with (
        pytest.warns(UserWarning, match="update 1: gradients were thrown away without a step"),
        lg.attach(model, optimizer, tmp_path / "run", objective=objective, scaler=scaler) as probe,
    ):
        for update in range(3):
            loss = loss_of(model, task, objective)
            tell(probe, task, loss)
            scaler.scale(loss).backward()
            if update == 1:
                next(model.parameters()).grad.fill_(torch.inf)
            scaler.unscale_(optimizer)
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    run = lg.load_run(tmp_path / "run")
    assert len(run.updates) == 2
    assert run.updates["grad_norm"].tolist() == pytest.approx([norms[0], norms[2]], rel=1e-4)
    assert run.updates["grad_norm_clipped"].tolist() == pytest.approx([1e-3, 1e-3], rel=1e-4)
    assert run.updates["tokens"].tolist() == [int(task.mask.sum())] * 2
    assert run.updates["loss_factor"].tolist() == [1024.0, 512.0]  # the scaler halves it after an overflow
    for _, tokens in run.tokens.groupby("step"):
        np.testing.assert_allclose(tokens["d1"], wanted_d1(task), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("summed", [False, True])
def test_loss_factor(summed: bool, tmp_path: Path, device: torch.device) -> None:
    """Of four losses of which each is multiplied by a half before the backward pass; none without a loss."""
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, tmp_path / "run", objective="reinforce") as probe:
        for told in (True, False):
            for part in PARTS:
                some = task.rows(part)
                loss = loss_of(model, some, lg.objective("reinforce"))
                probe.batch(input_ids=some.input_ids, action_mask=some.mask, loss=loss if told else None, summed=summed)
                (loss / 2).backward()
            optimizer.step()
    assert lg.load_run(tmp_path / "run").updates["loss_factor"][0] == pytest.approx(0.5 if summed else 2.0)
    assert np.isnan(lg.load_run(tmp_path / "run").updates["loss_factor"][1])


def test_two_forward_passes_in_one_backward_pass(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    objective = lg.objective("reinforce")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    halves = [task.rows(slice(0, 2)), task.rows(slice(2, 4))]
    with lg.attach(model, optimizer, tmp_path / "run", objective=objective) as probe:
        total = torch.zeros((), device=device)
        for half in halves:
            total = total + loss_of(model, half, objective)
            tell(probe, half)
        total.backward()
        optimizer.step()
    tokens = lg.load_run(tmp_path / "run").tokens
    wanted = np.concatenate([wanted_d1(half) for half in reversed(halves)])  # the last forward pass is met first
    np.testing.assert_allclose(tokens["d1"], wanted, rtol=2e-4, atol=1e-7)
    assert tokens["token_id"].tolist() == [i for half in reversed(halves) for i in half.input_ids[half.mask].tolist()]


# clipping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [1e-3, 0.05, 1e6])
def test_norm_before_clipping(most: float, dtype: torch.dtype, tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device).to(dtype)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    raw = []
    with lg.attach(model, optimizer, tmp_path / "run") as probe:
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, task, lg.objective("sft")).backward()
            raw.append({name: float(p.grad.double().norm()) for name, p in model.named_parameters()})
            torch.nn.utils.clip_grad_norm_(model.parameters(), most)
            optimizer.step()
        probe.flush()
    run = lg.load_run(tmp_path / "run")
    precise = 1e-5 if dtype == torch.float32 else 2e-3  # clipped bf16 entries are rounded again
    for step, named in enumerate(raw):
        assert run.updates["grad_norm"][step] == pytest.approx(np.linalg.norm(list(named.values())), rel=precise)
        rows = run.norms[(run.norms["step"] == step) & (run.norms["scope"] == "layer")].set_index("name")
        assert rows.loc["lm_head", "grad_norm"] == pytest.approx(named["lm_head.weight"], rel=precise)


def test_layers_clipped_one_by_one(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with lg.attach(model, optimizer, tmp_path / "run"):
        loss_of(model, task, lg.objective("sft")).backward()
        raw = flat([p.grad for p in model.parameters()]).norm()
        for parameter in model.parameters():
            torch.nn.utils.clip_grad_norm_([parameter], 1e-3)
        optimizer.step()
    assert lg.load_run(tmp_path / "run").updates["grad_norm"][0] == pytest.approx(float(raw), rel=1e-5)


def test_entries_clipped_one_by_one(tmp_path: Path, device: torch.device) -> None:
    """No common factor: the norm before it is not known, and that is said."""
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with (
        pytest.warns(UserWarning, match="`grad_norm` stays empty"),
        lg.attach(model, optimizer, tmp_path / "run"),
    ):
        loss_of(model, task, lg.objective("sft")).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-4)
        optimizer.step()
    row = lg.load_run(tmp_path / "run").updates.iloc[0]
    assert np.isnan(row["grad_norm"])
    assert row["grad_norm_clipped"] > 0


# the automatic tap ------------------------------------------------------------------------------


def d1_of(run: Path) -> np.ndarray:
    return lg.load_run(run).tokens["d1"].to_numpy(float)


def test_auto_reads_the_logits_for_any_loss(tmp_path: Path, device: torch.device) -> None:
    """The whole logit gradient: its norm is exact for a loss that is no f(log pi) at all."""
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, tmp_path / "run") as probe:
        logits = model(input_ids=task.input_ids).logits
        logits.retain_grad()
        tell(probe, task)
        logits.square().mean().backward()
        optimizer.step()
    assert logits.grad is not None
    wanted = logits.grad[:, :-1][task.mask[:, 1:]].norm(dim=1).cpu()
    np.testing.assert_allclose(lg.load_run(tmp_path / "run").tokens["logit_grad_norm"], wanted, rtol=1e-5)


@pytest.mark.parametrize("way", ["in place", "own head", "unused logits"])
def test_auto_falls_back_on_the_hidden_state(way: str, tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    temperature = 2.0 if way == "in place" else 1.0
    with lg.attach(model, optimizer, tmp_path / "run", objective="reinforce", temperature=temperature) as probe:
        if way == "in place":
            logits = model(input_ids=task.input_ids).logits
            logits.div_(2.0)
        elif way == "own head":
            logits = model.lm_head(model.model(input_ids=task.input_ids).last_hidden_state)
        else:
            logits = model.lm_head(model(input_ids=task.input_ids, output_hidden_states=True).hidden_states[-1])
        tell(probe, task)
        lg.objective("reinforce").loss(logits[:, :-1][task.mask[:, 1:]], task.tokens()).mean().backward()
        optimizer.step()
    np.testing.assert_allclose(d1_of(tmp_path / "run"), wanted_d1(task), rtol=2e-4, atol=1e-7)


def test_log_probs_of_a_fused_head(tmp_path: Path, device: torch.device) -> None:
    """TRL's own fused head: f' of every token, entropy and norm from what it computes beside its log-probabilities."""
    trl = pytest.importorskip("trl.trainer.utils")
    found = {}
    for tap in ("log_probs", "auto"):
        model = build("llama", device)
        task = make_task(model)
        trl.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy", "log_sum_sq_probs"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lg.attach(
            model, optimizer, tmp_path / tap, objective="ppo", tap=tap, temperature=0.7, tokens_per_update=1000
        ) as probe:
            output = model(input_ids=task.input_ids, labels=task.input_ids, fused_lm_head=True)
            ratio = (output.log_probs - task.old_logprobs[:, 1:]).exp()
            loss = -(ratio * task.advantages[:, 1:])[task.mask[:, 1:]].mean()
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
        found[tap] = lg.load_run(tmp_path / tap).tokens
    one, two = found["log_probs"], found["auto"]
    assert one["token_id"].tolist() == task.input_ids[task.mask].tolist()
    assert one["position"].tolist() == two["position"].tolist()
    for column in ("d1", "logprob", "prob", "ratio", "entropy", "sum_sq_prob", "logit_grad_norm"):
        np.testing.assert_allclose(one[column], two[column], rtol=1e-3, atol=1e-6, err_msg=column)
    assert one["misfit"].isna().all()
    assert two["misfit"].max() < 1e-3
    some = one["advantage"] != 0
    assert one["negative_count"][some].notna().any()


def test_nothing_is_said_of_an_ordinary_run(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(), lg.attach(model, optimizer, tmp_path / "run", objective="ppo") as probe:
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, task, lg.objective("ppo"))
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
        probe.flush()


@pytest.mark.parametrize("tap", ["hidden", "logits"])
@pytest.mark.parametrize("objective", ["ppo", "lco-kld"])
def test_blocks_of_tokens_change_nothing(
    objective: str, tap: str, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a large vocabulary, of which few rows are looked at together: every row still belongs to its token."""
    found = []
    for elements in (2**20, 100):  # all tokens at once; two
        monkeypatch.setattr("lcogeom.recording.tokens.BLOCK_ELEMENTS", elements)
        monkeypatch.setattr("lcogeom.recording.tokens.HEAD_ELEMENTS", elements)
        model = build("llama", device)
        task = make_task(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lg.attach(model, optimizer, tmp_path / f"{elements}", objective=objective, tap=tap) as probe:
            tell(probe, task)
            loss_of(model, task, lg.objective(objective)).backward()
            optimizer.step()
        found.append(lg.load_run(tmp_path / f"{elements}").tokens)
    for column in ("token_id", "logprob", "entropy", "logit_grad_norm", "d1"):
        np.testing.assert_allclose(
            found[0][column].to_numpy(float), found[1][column].to_numpy(float), rtol=1e-4, atol=1e-7, err_msg=column
        )
