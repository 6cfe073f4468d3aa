"""The columns of an update against direct computation, and the hooks' manners."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lcogeom as lg
from lcogeom.recording.gradients import layer_of
from tests.small_models import build, loss_of, make_task, tell


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("copies", [True, False])
def test_norms_and_directions(copies: bool, tmp_path: Path, device: torch.device) -> None:
    """Steps exactly from copies; from sketches of 16384 numbers within 4.5 of their standard errors."""
    model = build("llama", device)
    task = make_task(model)
    objective = lg.objective("sft")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    seen = []
    with lg.attach(model, optimizer, run=tmp_path / "run", objective=objective, copies=copies) as probe:
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(model, task, objective)
            tell(probe, task, loss)
            loss.backward()
            raw = flat([p.grad for p in model.parameters()])
            named = {name: p.grad.double().norm() for name, p in model.named_parameters()}
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            clipped, before = flat([p.grad for p in model.parameters()]), flat(list(model.parameters()))
            optimizer.step()
            seen.append((raw, clipped, flat(list(model.parameters())) - before, named, loss.detach(), before.norm()))
    run = lg.load_run(tmp_path / "run")
    updates = run.updates
    previous = None
    for step, (raw, clipped, change, named, loss, weights) in enumerate(seen):
        row = updates.iloc[step]
        qkv = [norm for name, norm in named.items() if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")]
        assert len(qkv) == 6
        expected = {
            "loss": float(loss),
            "grad_norm": float(raw.norm()),
            "grad_norm_clipped": float(clipped.norm()),
            "update_norm": float(change.norm()),
            "weight_norm": float(weights),
            "learning_rate": 1e-2,
            "step_grad_cos": cosine(change, -clipped),
            "qkv_mean_frobenius": float(torch.stack(qkv).mean()),
        }
        if previous is not None:
            expected["grad_cos_prev"] = cosine(raw, previous)
        for name, value in expected.items():
            sketched = not copies and name in ("update_norm", "weight_norm", "step_grad_cos", "grad_cos_prev")
            error = {"rel": 4.5 / 181} if name.endswith("norm") else {"abs": 4.5 / 128}
            assert row[name] == pytest.approx(value, **(error if sketched else {"rel": 2e-5})), name
        previous = raw
        layers = run.norms[(run.norms["step"] == step) & (run.norms["scope"] == "layer")].set_index("name")
        first = [norm.square() for name, norm in named.items() if name.startswith("model.layers.1.")]
        assert layers.loc["model.layers.1", "grad_norm"] == pytest.approx(
            float(torch.stack(first).sum().sqrt()), rel=1e-5
        )
        group = run.norms[(run.norms["step"] == step) & (run.norms["scope"] == "group")]
        for column in ("grad_norm", "update_norm", "weight_norm"):
            assert group[column].tolist() == pytest.approx([row[column]], rel=1e-5)
        for column in ("grad_norm", "grad_norm_clipped", "update_norm"):
            assert np.sqrt((layers[column] ** 2).sum()) == pytest.approx(row[column], rel=1e-5)
    assert np.isnan(updates["grad_cos_prev"].iloc[0])
    assert run.meta["weights"] == {"float32": len(seen[0][0])}
    assert run.meta["optimizer_options"]["eps"] == 1e-8
    assert updates["grad_norm_clipped"].max() < 0.0501 < updates["grad_norm"].min()


@pytest.mark.parametrize("tap", ["logits", "hidden"])
def test_the_gradient_outside_the_marked_tokens(tap: str, tmp_path: Path, device: torch.device) -> None:
    """Two backward passes, the second of a loss over prompts and padding too, of the same logits as the first."""
    model = build("llama", device)
    task = make_task(model)
    objective = lg.objective("sft")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with lg.attach(model, optimizer, run=tmp_path / "run", objective=objective, tap=tap, temperature=2.0) as probe:
        for everywhere in (False, True):
            tell(probe, task)
            output = model(input_ids=task.input_ids, output_hidden_states=True)
            read = output.logits if tap == "logits" else output.hidden_states[-1]
            read.retain_grad()
            logp = torch.log_softmax(output.logits[:, :-1] / 2.0, 2)
            logp = logp.gather(2, task.input_ids[:, 1:, None]).squeeze(2)
            (-logp * (1.0 if everywhere else task.mask[:, 1:].float())).sum().backward()
            optimizer.step()
    updates = lg.load_run(tmp_path / "run").updates
    squares = read.grad[:, :-1].double().square().sum(2)
    tokens = lg.load_run(tmp_path / "run").tokens
    if tap == "logits":
        assert tokens["logit_grad_sum"].abs().max() < 1e-6
    else:
        assert tokens["logit_grad_sum"].isna().all()
    assert updates["outside_share"].tolist() == pytest.approx(
        [0.0, float(squares[~task.mask[:, 1:]].sum() / squares.sum())], abs=1e-6
    )
    assert updates["outside_share"].iloc[1] > 0.1
    normaliser = torch.logsumexp(output.logits.detach()[:, :-1][task.mask[:, 1:]].double() / 2.0, 1)
    assert updates["logsumexp"].tolist() == pytest.approx([float(normaliser.mean())] * 2, abs=1e-5)


def test_what_changes_the_weights_between_steps(tmp_path: Path, device: torch.device) -> None:
    """Momentum shows in the cosine of steps; a step taken back, and weights scaled by hand, in what lies between."""
    model = build("llama", device)
    task = make_task(model)
    objective = lg.objective("sft")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    flats, between = [], []
    with lg.attach(model, optimizer, run=tmp_path / "run", objective=objective) as probe:
        for update in range(4):
            with torch.no_grad():
                start = flat(list(model.parameters()))
                if update == 2:  # half of the last step
                    for p, old, new in zip(model.parameters(), *flats[-1], strict=True):
                        p.add_(new - old, alpha=-0.5)
                if update == 3:
                    model.lm_head.weight.mul_(1.5)
                between.append(flat(list(model.parameters())) - start)
                old = [p.clone() for p in model.parameters()]
            optimizer.zero_grad()
            loss = loss_of(model, task, objective)
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
            flats.append((old, [p.detach().clone() for p in model.parameters()]))
    run = lg.load_run(tmp_path / "run")
    updates = run.updates
    steps = [flat(new) - flat(old) for old, new in flats]
    cosines = [cosine(a, b) for a, b in itertools.pairwise(steps)]
    assert updates["step_cos_prev"].tolist()[1:] == pytest.approx(cosines, abs=4.5 / 128)
    assert updates["moved_between"].iloc[1] == 0.0
    assert updates["moved_between"].tolist()[2:] == pytest.approx([float(b.norm()) for b in between[2:]], rel=4.5 / 181)
    assert updates["step_undone"].tolist()[1:3] == pytest.approx([0.0, 0.5], abs=1e-3)
    at = run.norms[(run.norms["step"] == 3) & (run.norms["scope"] == "layer")].set_index("name")["moved_between"]
    assert at["lm_head"] == pytest.approx(updates["moved_between"].iloc[3])
    assert at["model.layers.0"] == 0.0


def test_weights_changed_through_data_are_no_step(tmp_path: Path, device: torch.device) -> None:
    """`.data` leaves no trace but in the values. On a GPU the recorder does not wait to see it: the step is unknown."""
    model = build("llama", device)
    task = make_task(model)
    objective = lg.objective("sft")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with lg.attach(model, optimizer, run=tmp_path / "run", objective=objective) as probe:
        for update in range(4):
            if update == 2:
                model.lm_head.weight.data.mul_(1.5)
            before = flat(list(model.parameters()))
            optimizer.zero_grad()
            loss = loss_of(model, task, objective)
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
            if update == 2:
                step, moved = flat(list(model.parameters())) - before, model.lm_head.weight.norm()
    updates = lg.load_run(tmp_path / "run").updates
    assert updates["moved_between"][1] == 0.0
    if device.type == "cpu":
        assert updates["moved_between"][3] == 0.0
        assert updates["update_norm"][2] == pytest.approx(float(step.norm()), rel=4.5 / 128)
        assert updates["moved_between"][2] == pytest.approx(float(moved) / 3, rel=0.1)
    else:
        assert np.isnan(updates["update_norm"][2])
        assert np.isnan(updates["moved_between"][2])


def gpt2_parts(grad: Tensor) -> list[Tensor]:
    return [grad[:, :32], grad[:, 32:64], grad[:, 64:]]  # Conv1D: columns q | k | v


def neox_parts(grad: Tensor) -> list[Tensor]:
    rows = torch.arange(96).reshape(4, 24)  # a head: 8 rows of q, 8 of k, 8 of v
    return [grad[rows[:, start : start + 8].reshape(-1)] for start in (0, 8, 16)]


def phi3_parts(grad: Tensor) -> list[Tensor]:
    return [grad[:32], grad[32:48], grad[48:]]  # 4 query heads, 2 key and 2 value heads of size 8


@pytest.mark.parametrize(
    ("name", "fused", "parts"),
    [("gpt2", "c_attn", gpt2_parts), ("gpt-neox", "query_key_value", neox_parts), ("phi3", "qkv_proj", phi3_parts)],
)
def test_fused_attention_is_split(name: str, fused: str, parts, tmp_path: Path, device: torch.device) -> None:
    model = build(name, device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run"):
        loss_of(model, task, lg.objective("sft")).backward()
        grads = [p.grad for n, p in model.named_parameters() if n.endswith(f"{fused}.weight")]
        optimizer.step()
    norms = [part.double().norm() for grad in grads for part in parts(grad)]
    assert len(norms) == 6
    found = lg.load_run(tmp_path / "run").updates["qkv_mean_frobenius"].iloc[0]
    assert found == pytest.approx(float(torch.stack(norms).mean()), rel=1e-5)


def test_gradient_accumulation_is_one_update(tmp_path: Path, device: torch.device) -> None:
    """Two backward passes of half the batch record what one of the whole batch records."""
    objective = lg.objective("ppo")
    runs = []
    for halves in (1, 2):
        model = build("llama", device)
        task = make_task(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        total = int(task.mask.sum())
        with lg.attach(model, optimizer, run=tmp_path / str(halves), objective=objective) as probe:
            for start in range(0, 4, 4 // halves):
                part = task.rows(slice(start, start + 4 // halves))
                loss = loss_of(model, part, objective) * int(part.mask.sum()) / total
                tell(probe, part, loss)
                loss.backward()
            optimizer.step()
        runs.append(lg.load_run(tmp_path / str(halves)))
    whole, parts = runs
    for column in whole.tokens.columns.difference(["text", "misfit"]):
        a, b = (run.tokens[column].to_numpy(dtype=float, na_value=np.nan) for run in runs)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=column)
    for column in ("grad_norm", "qkv_mean_frobenius", "tokens", "logit_grad_norm", "convex_share"):
        assert whole.updates[column].iloc[0] == pytest.approx(parts.updates[column].iloc[0], rel=1e-4)


@pytest.mark.parametrize("tap", ["hidden", "logits"])
def test_the_budget_holds_over_accumulated_passes(tap: str, tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model, sequences=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run", tokens_per_update=12, tap=tap, objective="ppo") as probe:
        for start in range(0, 8, 2):
            part = task.rows(slice(start, start + 2))
            tell(probe, part)
            loss_of(model, part, lg.objective("ppo")).backward()
        optimizer.step()
    run = lg.load_run(tmp_path / "run")
    assert len(run.tokens) == 12
    assert run.updates["tokens"].tolist() == [int(task.mask.sum())]
    first = task.mask.int().argmax(1)
    for _, token in run.tokens.iterrows():  # what batch() said of a token stays with that token
        place = int(first[token["sequence"]]) + token["position"]
        assert token["token_id"] == int(task.input_ids[token["sequence"], place])
        assert token["old_logprob"] == pytest.approx(float(task.old_logprobs[token["sequence"], place]))


def test_split_by_the_sign_of_the_advantage(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run", objective="ppo") as probe:
        tell(probe, task)
        loss_of(model, task, lg.objective("ppo")).backward()
        optimizer.step()
    run = lg.load_run(tmp_path / "run")
    row, tokens = run.updates.iloc[0], run.tokens
    for end, chosen in (("_positive", tokens["advantage"] > 0), ("_negative", tokens["advantage"] < 0)):
        some = tokens[chosen]
        assert row["tokens" + end] == len(some) > 0
        assert row["action_prob" + end] == pytest.approx(some["prob"].mean())
        assert row["ratio_max" + end] == pytest.approx(some["ratio"].max())
        assert row["convex_share" + end] == pytest.approx(some["convex"].astype(float).mean())
        assert row["logit_grad_norm" + end] == pytest.approx(np.sqrt((some["logit_grad_norm"] ** 2).sum()))
    assert row["tokens"] == len(tokens)


@pytest.mark.parametrize("tap", ["hidden", "logits"])
def test_a_token_budget_stays_unbiased(tap: str, tmp_path: Path, device: torch.device) -> None:
    """Weighted sums over few recorded tokens average to the sum over all; the heaviest are always there."""
    model = build("llama", device)
    task = make_task(model, sequences=16)
    count = int(task.mask.sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def recorded(budget: int, seed: int) -> lg.Run:
        folder = tmp_path / f"{budget}-{seed}"
        with lg.attach(model, optimizer, run=folder, tokens_per_update=budget, seed=seed, tap=tap) as probe:
            optimizer.zero_grad()
            tell(probe, task)
            loss_of(model, task, lg.objective("sft")).backward()
            optimizer.step()
        return lg.load_run(folder)

    full = recorded(10_000, 0)
    assert (full.tokens["weight"] == 1).all()
    means = []
    for seed in range(30):
        run = recorded(20, seed)
        assert len(run.tokens) == 20
        assert run.tokens["weight"].sum() == pytest.approx(count)
        assert run.updates["tokens"].iloc[0] == count
        if tap == "logits":  # the hidden tap ranks by the gradient that it sees
            assert run.tokens["logit_grad_norm"].max() == pytest.approx(full.tokens["logit_grad_norm"].max())
        means.append(run.updates["entropy"].iloc[0])
    error = np.std(means, ddof=1) / np.sqrt(len(means))
    assert error > 0
    assert abs(np.mean(means) - full.updates["entropy"].iloc[0]) < 4 * error


def test_evaluation_passes_are_ignored_and_hooks_come_off(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) + sum(
            len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()
        )

    before = hooks(), len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    with lg.attach(model, optimizer, run=tmp_path / "run") as probe:
        with torch.no_grad():
            model(input_ids=task.input_ids)
        tell(probe, task)
        loss_of(model, task, lg.objective("sft")).backward()
        with torch.no_grad():
            model(input_ids=task.input_ids)
        optimizer.step()
    assert lg.load_run(tmp_path / "run").updates["tokens"].tolist() == [int(task.mask.sum())]
    assert (hooks(), len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == before


def test_a_run_that_explodes_is_recorded_to_the_end(tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(UserWarning, match="not finite"),
        lg.attach(model, optimizer, run=tmp_path / "run", objective="ppo", tap="logits") as probe,
    ):
        for step in range(3):
            if step == 1:
                with torch.no_grad():
                    model.lm_head.weight[3] = float("inf")
            optimizer.zero_grad()
            loss = loss_of(model, task, lg.objective("ppo"))
            tell(probe, task, loss)
            loss.backward()
            optimizer.step()
    run = lg.load_run(tmp_path / "run")
    assert run.updates["step"].tolist() == [0, 1, 2]
    assert np.isfinite(run.updates["grad_norm"].astype(float).iloc[0])
    assert not np.isfinite(run.updates["grad_norm"].astype(float).iloc[2])
    assert run.tokens.loc[run.tokens["step"] == 0, "convex"].notna().all()
    assert run.tokens.loc[run.tokens["step"] == 2, "convex"].isna().all()


def test_gradients_thrown_away_before_the_step(tmp_path: Path, device: torch.device) -> None:
    """zero_grad() in the wrong place: the row says that the optimiser had no gradient and made no step."""
    model = build("llama", device)
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run"):
        loss_of(model, task, lg.objective("sft")).backward()
        optimizer.zero_grad()
        optimizer.step()
    row = lg.load_run(tmp_path / "run").updates.iloc[0]
    assert row["logit_grad_norm"] > 0
    assert np.isnan(row["grad_norm"])
    assert row["grad_norm_clipped"] == row["update_norm"] == 0


def test_layer_names() -> None:
    assert layer_of("model.layers.3.self_attn.q_proj.weight") == "model.layers.3"
    assert layer_of("transformer.h.11.attn.c_attn.bias") == "transformer.h.11"
    assert layer_of("model.embed_tokens.weight") == "model.embed_tokens"
