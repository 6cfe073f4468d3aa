"""The callback's manners: what it leaves behind, what it refuses, where its numbers go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lcogeom as lg
from lcogeom.integrations.transformers import RecorderCallback
from tests.integrations.trainers import MAKERS, grpo, plain, run, sft


def hooks(trainer: transformers.Trainer) -> int:
    model = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules())
    parameters = sum(len(p._post_accumulate_grad_hooks or ()) for p in trainer.model.parameters())
    inner = trainer.optimizer.optimizer
    return model + parameters + len(inner._optimizer_step_pre_hooks) + len(inner._optimizer_step_post_hooks)


def replaced(trainer: transformers.Trainer) -> set[str]:
    return {name for name in vars(trainer) if callable(getattr(type(trainer), name, None))}


@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_is_left_behind(kind: str, tmp_path: Path) -> None:
    without = run(MAKERS[kind](tmp_path / "without", 2))
    trainer = MAKERS[kind](tmp_path / "out", 2)
    before = replaced(trainer)
    during: list[tuple[int, set[str]]] = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            during.append((hooks(trainer), replaced(trainer)))

    trainer.add_callback(Look())
    trainer.add_callback(RecorderCallback(tmp_path / "run", objective=None))
    run(trainer)
    assert during[0][0] > hooks(without) == hooks(trainer)  # TRL leaves some of its own
    assert {"compute_loss", "log"} <= during[0][1]
    assert replaced(trainer) == before


@pytest.mark.parametrize("kind", MAKERS)
def test_the_line_in_the_readme(kind: str, tmp_path: Path) -> None:
    run(MAKERS[kind](tmp_path / "out", 1, callbacks=[RecorderCallback(tmp_path / "run", objective=None)]))
    found = lg.load_run(tmp_path / "run")
    assert found.updates["tokens"].item() == len(found.tokens) > 5
    assert found.tokens["text"].notna().all()


def test_training_that_raises(tmp_path: Path) -> None:
    """The Trainer calls no callback then; everything comes off all the same, and what was recorded is there."""
    trainer = plain(tmp_path / "out", 5)
    original, calls = trainer.training_step, []

    def broken(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise OverflowError("the user's own")
        return original(*args)

    trainer.training_step = broken
    recorder = RecorderCallback(tmp_path / "run", flush_every=100)
    trainer.add_callback(recorder)
    with pytest.raises(OverflowError, match="the user's own"):
        run(trainer)
    assert hooks(trainer) == 0
    assert recorder.probe is None
    assert "compute_loss" not in vars(trainer)
    assert lg.load_run(tmp_path / "run").updates["step"].tolist() == [0, 1, 2]


def test_training_twice_needs_another_folder(tmp_path: Path) -> None:
    trainer = plain(tmp_path / "out", 1)
    trainer.add_callback(RecorderCallback(tmp_path / "run"))
    run(trainer)
    with pytest.raises(FileExistsError, match="exists already"):
        trainer.train()
    assert hooks(trainer) == 0


def test_tensorboard_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = grpo(tmp_path / "out", 4, report_to=["tensorboard"], logging_steps=2, num_iterations=2)
    trainer.add_callback(RecorderCallback(tmp_path / "run", flush_every=100))
    run(trainer)
    updates = lg.load_run(tmp_path / "run").updates
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in ("grad_norm", "update_norm", "entropy", "convex_share", "ratio_max", "step_grad_cos"):
        events = board.Scalars(f"train/lcogeom/{name}")
        assert [event.step for event in events] == [2, 4]  # optimiser steps done: that of row 1, of row 3
        assert [event.value for event in events] == pytest.approx(updates[name].iloc[[1, 3]].tolist(), rel=1e-5)
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert all("lcogeom/grad_norm" in row for row in history)


def test_evaluation_is_not_recorded(tmp_path: Path) -> None:
    trainer = sft(tmp_path / "out", 4)
    trainer.args.eval_strategy, trainer.args.eval_steps = transformers.IntervalStrategy.STEPS, 1
    trainer.eval_dataset = trainer.train_dataset
    trainer.add_callback(RecorderCallback(tmp_path / "run"))
    run(trainer)
    found = lg.load_run(tmp_path / "run")
    assert len(found.updates) == 4
    assert found.tokens.groupby("step")["sequence"].nunique().tolist() == [4] * 4
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluations) == 4
    assert not any(name.startswith("lcogeom/") for row in evaluations for name in row)


@pytest.mark.parametrize("kind", ["Trainer", pytest.param("SFTTrainer", marks=pytest.mark.slow)])
def test_a_model_that_the_trainer_compiles(kind: str, tmp_path: Path) -> None:
    """torch_compile=True compiles at the first forward pass, after the callback has put its hooks there."""
    ends = []
    for recorded in (False, True):
        torch._dynamo.reset()
        options = {"torch_compile": True, "torch_compile_backend": "eager", "per_device_train_batch_size": 8}
        trainer = MAKERS[kind](tmp_path / f"out{recorded}", 3, **options)
        if recorded:
            trainer.add_callback(RecorderCallback(tmp_path / "run"))
        run(trainer)
        assert isinstance(trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    found = lg.load_run(tmp_path / "run")
    assert found.updates["tokens"].tolist() == [18] * 3
    assert found.tokens["misfit"].max() < 1e-2


def test_a_model_that_was_compiled_before(tmp_path: Path) -> None:
    """A second train() runs what the first one compiled, where the base model has no hook: an error, and no silence."""
    torch._dynamo.reset()
    trainer = plain(tmp_path / "out", 2, torch_compile=True, torch_compile_backend="eager")
    run(trainer)
    trainer.add_callback(RecorderCallback(tmp_path / "run", tap="hidden"))
    with pytest.raises(lg.TapError, match=r"torch\.compile"):
        run(trainer)
    assert hooks(trainer) == 0
    assert not any(name in vars(trainer) for name in ("compute_loss", "log", "_run_epoch"))


def test_another_version_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = grpo(tmp_path / "out", 1)
    trainer.add_callback(RecorderCallback(tmp_path / "run"))
    monkeypatch.setattr("lcogeom.integrations.trl.version", lambda _: "1.17.0")
    with pytest.raises(lg.TapError, match=r"TRL 1\.17\.0.*Install 'trl==1\.16"):
        trainer.train()
    monkeypatch.undo()
    monkeypatch.delattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies")
    with pytest.raises(lg.TapError, match="lacks _get_per_token_logps_and_entropies"):
        trainer.train()
    assert not (tmp_path / "run").exists()


def test_a_batch_without_completion_tokens(tmp_path: Path) -> None:
    """The trainer goes on with such a batch; so does the recorder, and says so."""
    trainer = plain(tmp_path / "out", 2)
    rows = [dict(row) for row in trainer.train_dataset]
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    trainer.train_dataset = rows
    trainer.add_callback(RecorderCallback(tmp_path / "run"))
    with pytest.warns(UserWarning, match="no completion token"):
        run(trainer)
    assert lg.load_run(tmp_path / "run").updates["tokens"].tolist() == [0, 0]


def test_called_by_no_trainer() -> None:
    with pytest.raises(RuntimeError, match=r"lcogeom\.attach"):
        RecorderCallback("run").on_train_begin(None, None, None)
