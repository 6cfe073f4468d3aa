"""Every recorded quantity of a token against a plain float64 computation from the model's full logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lcogeom as lg
from tests.oracles import PAIRS, derivatives
from tests.small_models import CONFIGS, Task, build, loss_of, make_task, tell

OBJECTIVES = ["sft", "reinforce", "ppo", "ppo-unclipped", "lco-kld", "lco-mse", "lco-lch"]


def record(
    name: str, objective: lg.Objective, tap: str, folder: Path, device: torch.device
) -> tuple[lg.Run, Task, dict]:
    """One recorded update, and the same quantities from full logits and dense Hessians."""
    model = build(name, device)
    task = make_task(model)
    batch = task.tokens()
    with torch.no_grad():
        logits = model(input_ids=task.input_ids).logits[:, :-1][task.mask[:, 1:]].double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=folder, objective=objective, tap=tap) as probe:
        loss = loss_of(model, task, objective)
        tell(probe, task, loss)
        loss.backward()
        optimizer.step()
    logp = torch.log_softmax(logits, 1)
    expected = {
        "logprob": logp.gather(1, batch.actions[:, None]).squeeze(1),
        "entropy": -(logp.exp() * logp).sum(1),
        "sum_sq_prob": logp.exp().square().sum(1),
        "logits": logits,
        "loss": loss.detach(),
    }
    return lg.load_run(folder), task, expected


def column(run: lg.Run, name: str) -> torch.Tensor:
    return torch.tensor(run.tokens[name].to_numpy(dtype=np.float64, na_value=np.nan))


@pytest.mark.parametrize("tap", ["hidden", "logits"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", CONFIGS)
def test_token_columns(name: str, objective: str, tap: str, tmp_path: Path, device: torch.device) -> None:
    minimised, oracle = PAIRS[objective]
    run, task, expected = record(name, minimised, tap, tmp_path / "run", device)
    batch = task.tokens()
    count = len(batch)
    _, gradient, hessian = derivatives(oracle, expected["logits"], batch)
    single = {"rtol": 2e-4, "atol": 2e-6}  # the model computes in float32

    def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(found, wanted.cpu().double(), **single)

    for plain in ("logprob", "entropy", "sum_sq_prob"):
        close(column(run, plain), expected[plain])
    close(column(run, "prob"), expected["logprob"].exp())
    close(column(run, "ratio"), (expected["logprob"] - batch.old_logprobs).exp())
    close(column(run, "logit_grad_norm"), gradient.norm(dim=1) / count)
    assert column(run, "misfit").nan_to_num().max() < 5e-3
    assert run.tokens["token_id"].tolist() == batch.actions.tolist()
    assert run.tokens["sequence"].tolist() == task.mask.nonzero()[:, 0].tolist()
    first = task.mask.int().argmax(1)
    assert run.tokens["position"].tolist() == [t - int(first[s]) for s, t in task.mask.nonzero().tolist()]
    if isinstance(minimised, lg.ActionObjective):
        _, d1, d2 = minimised.derivatives(expected["logprob"], batch)
        close(column(run, "d1"), d1 / count)
        close(column(run, "d2"), d2 / count)
    else:
        assert run.tokens["d1"].isna().all()
    counts = (torch.linalg.eigvalsh(hessian) < -1e-10).sum(1)
    assert run.tokens["negative_count"].tolist() == counts.tolist()
    assert run.tokens["convex"].tolist() == (counts == 0).tolist()
    close(torch.tensor(run.updates["loss"]), expected["loss"].reshape(1))
    close(torch.tensor(run.updates["logit_grad_norm"]), gradient.norm().reshape(1) / count)


@pytest.mark.parametrize("tap", ["hidden", "logits"])
def test_without_batch_the_gradient_tells(tap: str, tmp_path: Path, device: torch.device) -> None:
    """No batch(), no objective: which tokens, which actions, f' and the misfit come from the gradient alone."""
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run", tap=tap):
        loss_of(model, task, lg.objective("reinforce")).backward()
        optimizer.step()
    run = lg.load_run(tmp_path / "run")
    counted = task.mask & (task.advantages != 0)
    assert run.tokens["token_id"].tolist() == task.input_ids[counted].tolist()
    wanted = -task.advantages[counted].cpu().double() / int(task.mask.sum())
    torch.testing.assert_close(column(run, "d1"), wanted, rtol=1e-4, atol=1e-7)
    assert column(run, "misfit").max() < 1e-3
    assert run.tokens[["advantage", "ratio", "d2", "convex"]].isna().all(axis=None)


def test_the_misfit_unmasks_a_loss_that_is_not_what_it_says(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run", objective="ppo", tap="logits") as probe:
        tell(probe, task)
        loss_of(model, task, lg.objective("lco-kld")).backward()
        optimizer.step()
    assert column(lg.load_run(tmp_path / "run"), "misfit").median() > 0.1


def test_a_gradient_of_the_wrong_sign_is_said(tmp_path: Path, device: torch.device) -> None:
    """Advantages handed to batch() with their signs flipped: `convex` stays empty and a warning says so."""
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrong = Task(task.input_ids, task.mask, -task.advantages, task.old_logprobs, task.old_logits)
    with (
        pytest.warns(UserWarning, match="opposite sign"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective="reinforce") as probe,
    ):
        tell(probe, wrong)
        loss_of(model, task, lg.objective("reinforce")).backward()
        optimizer.step()
    run = lg.load_run(tmp_path / "run")
    assert run.tokens["convex"].isna().tolist() == (run.tokens["advantage"] != 0).tolist()


def test_bf16_hidden_states(tmp_path: Path, device: torch.device) -> None:
    """f' from a bf16 model: under 1 % at nearly every token (design.md, section 2)."""
    model = build("llama", device).bfloat16()
    task = make_task(model, sequences=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run", objective="reinforce") as probe:
        loss = loss_of(model, task, lg.objective("reinforce"))
        tell(probe, task, loss)
        loss.backward()
        optimizer.step()
    run = lg.load_run(tmp_path / "run")
    some = run.tokens["advantage"] != 0
    wanted = (-run.tokens["advantage"] / int(task.mask.sum()))[some]
    error = ((run.tokens["d1"][some] - wanted) / wanted).abs()
    assert error.median() < 0.01
    assert run.tokens["misfit"].max() < 0.05


def test_text_is_the_decoded_token(tmp_path: Path, device: torch.device) -> None:
    from lcogeom.models import load_model

    loaded = load_model("tiny", device=device)
    ids = loaded.tokenizer(["12+34=64\n", "1+1=2\n"], return_tensors="pt", padding=True, padding_side="right")
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.1)
    with lg.attach(loaded.model, optimizer, run=tmp_path / "run", tokenizer=loaded.tokenizer):
        labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100).to(device)
        loaded.model(input_ids=ids.input_ids.to(device), labels=labels).loss.backward()
        optimizer.step()
    text = lg.load_run(tmp_path / "run").tokens["text"]
    assert "".join(text) == "2+34=64\n" + "+1=2\n"


def test_an_objective_without_its_batch_is_said(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(UserWarning, match=r"probe\.batch"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective="ppo"),
    ):
        loss_of(model, task, lg.objective("ppo")).backward()
        optimizer.step()
    assert lg.load_run(tmp_path / "run").tokens["convex"].isna().all()


def test_readable_while_the_run_goes_on(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run", flush_every=2) as probe:
        seen = []
        for _ in range(5):
            optimizer.zero_grad()
            tell(probe, task)
            loss_of(model, task, lg.objective("sft")).backward()
            optimizer.step()
            seen.append(len(lg.load_run(tmp_path / "run").updates))
    assert seen == [0, 2, 2, 4, 4]
    assert len(lg.load_run(tmp_path / "run").updates) == 5
