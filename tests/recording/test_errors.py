"""What the recorder refuses, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import lcogeom as lg
from tests.small_models import Task, build, loss_of, make_task, tell


@pytest.fixture
def model(device: torch.device) -> transformers.PreTrainedModel:
    return build("llama", device)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_compiled_before_attach(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    compiled = torch.compile(model)
    with pytest.raises(lg.TapError, match=r"first, then torch\.compile"):
        lg.attach(compiled, sgd(model), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_update_that_no_tap_saw(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    task = make_task(model)
    optimizer = sgd(model)
    start = model.lm_head.weight.detach().clone()
    with lg.attach(model, optimizer, run=tmp_path / "run"):
        loss_of(model, task, lg.objective("sft")).backward()
        optimizer.step()
        model.lm_head.weight.square().sum().backward()  # a loss that never ran the model
        moved = model.lm_head.weight.detach().clone()
        with pytest.raises(lg.TapError, match="no gradient reached the recorder"):
            optimizer.step()
    assert torch.equal(moved, model.lm_head.weight)  # raised before the step
    assert not torch.equal(start, moved)
    assert len(lg.load_run(tmp_path / "run").updates) == 1  # what was recorded is kept


def test_logits_tap_on_a_fused_loss(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    """A fused head calls the base model alone: the logits tap says so, the hidden tap records."""
    task = make_task(model)

    def fused() -> torch.Tensor:
        hidden = model.model(input_ids=task.input_ids).last_hidden_state[:, :-1][task.mask[:, 1:]]
        logits = torch.nn.functional.linear(hidden, model.lm_head.weight)
        return torch.nn.functional.cross_entropy(logits, task.input_ids[task.mask])

    optimizer = sgd(model)
    with lg.attach(model, optimizer, run=tmp_path / "logits", tap="logits"):
        fused().backward()
        with pytest.raises(lg.TapError, match="tap='hidden'"):
            optimizer.step()
    optimizer.zero_grad()
    with lg.attach(model, optimizer, run=tmp_path / "hidden", objective="sft") as probe:
        tell(probe, task)
        fused().backward()
        optimizer.step()
    tokens = lg.load_run(tmp_path / "hidden").tokens
    assert tokens["misfit"].max() < 1e-3
    assert tokens["d1"].tolist() == pytest.approx([-1 / len(tokens)] * len(tokens), rel=1e-4)


def test_logits_changed_in_place(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    task = make_task(model)
    with lg.attach(model, sgd(model), run=tmp_path / "run", tap="logits"):
        logits = model(input_ids=task.input_ids).logits
        logits.div_(0.7)
        with pytest.raises(lg.TapError, match="in place"):
            logits.square().mean().backward()


def test_a_head_the_recorder_does_not_know(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    task = make_task(model)
    model.lm_head.register_forward_hook(lambda _, __, output: output.sin())
    with (
        lg.attach(model, sgd(model), run=tmp_path / "hidden", tap="hidden"),
        pytest.raises(lg.TapError, match="not the output head"),
    ):
        model(input_ids=task.input_ids)
    optimizer = sgd(model)
    with lg.attach(model, optimizer, run=tmp_path / "auto", objective="sft") as probe:  # the logits do not need it
        tell(probe, task)
        loss_of(model, task, lg.objective("sft")).backward()
        optimizer.step()
    tokens = lg.load_run(tmp_path / "auto").tokens
    assert tokens["d1"].tolist() == pytest.approx([-1 / len(tokens)] * len(tokens), rel=1e-4)


def test_an_encoder_without_a_head(device: torch.device, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    encoder = transformers.BertModel(config).to(device)
    with pytest.raises(TypeError, match="no LM head"):
        lg.attach(encoder, sgd(encoder), run=tmp_path / "run")
    with pytest.raises(TypeError, match="not a transformers model"):
        lg.attach(torch.nn.Linear(2, 2), sgd(encoder), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_arguments_of_attach(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="optimizer"):
        lg.attach(model, sgd(other), run=tmp_path / "run")
    with pytest.raises(ValueError, match="tap: 'loss'"):
        lg.attach(model, sgd(model), run=tmp_path / "run", tap="loss")
    with pytest.raises(ValueError, match="tokens_per_update: 0"):
        lg.attach(model, sgd(model), run=tmp_path / "run", tokens_per_update=0)
    with pytest.raises(ValueError, match="Did you mean 'ppo'"):
        lg.attach(model, sgd(model), run=tmp_path / "run", objective="pppo")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="exists already"):
        lg.attach(model, sgd(model), run=tmp_path / "run")
    assert (tmp_path / "run" / "mine.txt").read_text() == "kept"
    assert not any(m._forward_hooks for m in model.modules())


def broken(task: Task, what: str) -> dict[str, torch.Tensor]:
    good = {"input_ids": task.input_ids, "action_mask": task.mask, "advantages": task.advantages}
    spoiled = task.advantages.clone()
    spoiled[1, 5] = float("nan")
    first = task.mask.clone()
    first[0, 0] = True
    return (
        good
        | {
            "no completion token": {"action_mask": torch.zeros_like(task.mask)},
            "advantages: shape": {"advantages": task.advantages[:, :-1]},
            "advantages: NaN": {"advantages": spoiled},
            "old_logprobs: shape": {"old_logprobs": task.old_logprobs[:2]},
            "first token of a sequence": {"action_mask": first},
            "input_ids: shape": {"input_ids": task.input_ids[0]},
            "old_logits: shape": {"old_logits": task.old_logits[:-1]},
        }[what]
    )


@pytest.mark.parametrize(
    "what",
    [
        "no completion token",
        "advantages: shape",
        "advantages: NaN",
        "old_logprobs: shape",
        "first token of a sequence",
        "input_ids: shape",
        "old_logits: shape",
    ],
)
def test_arguments_of_batch(what: str, model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    task = make_task(model)
    with (
        lg.attach(model, sgd(model), run=tmp_path / "run") as probe,
        pytest.raises(ValueError, match=what),
    ):
        probe.batch(**broken(task, what))


def test_a_batch_of_another_forward_pass(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    task = make_task(model)
    optimizer = sgd(model)
    with lg.attach(model, optimizer, run=tmp_path / "a") as probe:
        tell(probe, task)
        with pytest.raises(ValueError, match="once for each forward"):
            loss_of(model, task.rows(slice(0, 2)), lg.objective("sft")).backward()
    others = Task(task.input_ids.roll(1, 0), task.mask, task.advantages, task.old_logprobs, task.old_logits)
    with (
        pytest.warns(UserWarning, match="other input_ids"),
        lg.attach(model, optimizer, run=tmp_path / "b") as probe,
    ):
        tell(probe, others)
        loss_of(model, task, lg.objective("sft")).backward()
        optimizer.step()
