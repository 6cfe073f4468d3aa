"""Audits recorded from running loops: right numbers, every forward pass of the update, nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lcogeom as lg
from lcogeom.models import load_model
from lcogeom.recording.audit import FIELDS
from lcogeom.training.replay import ReplaySettings, make_batch, one_update, variant_objective
from tests.small_models import build, loss_of, make_task, tell


def parts_of(row: dict[str, float]) -> float:
    return sum(row[f"audit_{name}"] for name in ("first_order", "gauss_newton", "residual", "remainder"))


@pytest.mark.parametrize("variant", ["ppo", "sft", "lco-kld"])
def test_fifty_updates_of_tiny(variant: str, tmp_path: Path, device: torch.device) -> None:
    """The shares add up to the change; that change is the loss's own; convex objectives bend upwards only."""
    minimised, _ = variant_objective(variant)
    loaded = load_model("tiny", device=device)
    batch = make_batch(loaded, ReplaySettings(sequences=16), 0, lambda *_: None)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=3e-4, weight_decay=0.0)
    losses = []
    with lg.attach(loaded.model, optimizer, run=tmp_path / "run", objective=minimised, audit_every=1) as probe:
        for _ in range(50):
            losses.append(float(one_update(loaded.model, optimizer, minimised, batch, probe=probe)))
    updates = lg.load_run(tmp_path / "run").updates
    for _, row in updates.iterrows():
        assert parts_of(row) == pytest.approx(row["audit_actual"], rel=1e-9)
    # The loop's own float32 losses, one update later, are another measurement of the same change.
    changes = np.diff(losses)
    assert np.abs(changes - updates["audit_actual"].to_numpy()[:-1]).max() <= 3e-6 + 1e-5 * np.abs(losses).max()
    if variant != "ppo":
        assert (updates["audit_gauss_newton"] >= 0).all()
        assert (updates["audit_logit_curvature"] >= 0).all()
    # Second order explains the smaller steps: there the shares without the remainder come near.
    small = updates["audit_overshoot"].abs() < 0.5
    if small.any():
        unexplained = (updates["audit_remainder"] / updates["audit_actual"]).abs()[small]
        assert unexplained.median() < 1.0


@pytest.mark.parametrize("tap", ["hidden", "logits"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa-tied", "gemma2-softcap"])
def test_equals_the_audit_by_hand(name: str, tap: str, tmp_path: Path, device: torch.device) -> None:
    """Two micro-batches of an update, a model in training mode with dropout in its configuration."""
    objective = lg.objective("ppo")
    model = build(name, device)
    task = make_task(model)
    halves = [task.rows(slice(0, 2)), task.rows(slice(2, 4))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with lg.attach(model, optimizer, run=tmp_path / "run", objective=objective, tap=tap, audit_every=2) as probe:
        for _ in range(3):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            for half in halves:
                share = len(half.tokens()) / len(task.tokens())
                loss = loss_of(model, half, objective) * share
                tell(probe, half)
                loss.backward()
            optimizer.step()

    def logits() -> torch.Tensor:
        found: torch.Tensor = model(input_ids=task.input_ids).logits[:, :-1][task.mask[:, 1:]]
        return found

    wanted = lg.audit_step(logits, objective, task.tokens(), list(model.parameters()), before)
    row = lg.load_run(tmp_path / "run").updates.iloc[2]
    for field in FIELDS:
        assert row[f"audit_{field}"] == pytest.approx(getattr(wanted, field), rel=1e-3, abs=1e-7), field


def test_training_mode_and_dropout_stay(tmp_path: Path, device: torch.device) -> None:
    ends = []
    for every in (None, 1):
        model = build("gpt2", device).train()
        model.transformer.drop.p = 0.2
        model.transformer.h[0].mlp.eval()  # a module that somebody froze
        task = make_task(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(3)
        run = tmp_path / str(every)
        with lg.attach(model, optimizer, run=run, objective="sft", tap="logits", audit_every=every) as probe:
            for _ in range(3):
                optimizer.zero_grad()
                loss = loss_of(model, task, lg.objective("sft"))
                tell(probe, task)
                loss.backward()
                optimizer.step()
        assert model.training
        assert not model.transformer.h[0].mlp.training
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_what_cannot_be_audited_is_said(tmp_path: Path) -> None:
    model = build("llama", torch.device("cpu"))
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ValueError, match="audit_every: an audit needs to know what is minimised"):
        lg.attach(model, optimizer, run=tmp_path / "a", audit_every=1)
    with pytest.raises(ValueError, match="audit_every: 0; must be at least 1"):
        lg.attach(model, optimizer, run=tmp_path / "a", objective="sft", audit_every=0)
    with (
        lg.attach(model, optimizer, run=tmp_path / "run", objective="ppo", audit_every=1) as probe,
        pytest.warns(UserWarning, match="audit: left out, because"),
    ):
        for said in ({}, {"action_mask": task.mask}):
            optimizer.zero_grad()
            loss = loss_of(model, task, lg.objective("ppo"))
            probe.batch(input_ids=task.input_ids, **said)
            loss.backward()
            optimizer.step()
    assert lg.load_run(tmp_path / "run").updates["audit_actual"].isna().all()
