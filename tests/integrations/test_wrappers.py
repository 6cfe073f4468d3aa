"""What attach() takes off a model and an optimiser, and what it refuses to look into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import peft
import pytest
import torch
import transformers

import lcogeom as lg
from lcogeom.models import load_model
from tests.integrations.trainers import HEAD_TOO, LORA, tiny


def ids() -> torch.Tensor:
    return torch.randint(2, 18, (4, 10), generator=torch.Generator().manual_seed(0))


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


def sft(model: Any, batch: torch.Tensor) -> torch.Tensor:
    loss = model(input_ids=batch, labels=batch).loss
    assert isinstance(loss, torch.Tensor)
    return loss


@pytest.mark.parametrize("tap", ["auto", "hidden", "logits"])
@pytest.mark.parametrize("adapter", [LORA, HEAD_TOO], ids=["lora", "lora and head"])
def test_lora(adapter: peft.LoraConfig, tap: str, tmp_path: Path) -> None:
    """Only what trains is metered; f' is that of the head which is in use."""
    model = tiny(adapter).model
    with torch.no_grad():  # away from the start, at which B = 0 and both heads are equal
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.add_(0.1 * noise)
    optimizer = sgd(model)
    with lg.attach(model, optimizer, tmp_path / "run", objective="sft", tap=tap) as probe:
        probe.batch(input_ids=ids(), action_mask=torch.ones(4, 10).index_fill(1, torch.tensor([0]), 0))
        sft(model, ids()).backward()
        trained = [(n, p.grad.double().square().sum()) for n, p in model.named_parameters() if p.requires_grad]
        optimizer.step()
    found = lg.load_run(tmp_path / "run")
    assert found.updates["grad_norm"].item() == pytest.approx(float(sum(s for _, s in trained)) ** 0.5, rel=1e-5)
    np.testing.assert_allclose(found.tokens["d1"], -1 / 36, rtol=2e-3)
    assert found.tokens["misfit"].max() < 1e-3
    assert found.tokens["convex"].all()
    layers = found.norms[found.norms["scope"] == "layer"].set_index("name")["grad_norm"]
    first = sum(square for name, square in trained if "layers.0." in name)
    assert layers["model.layers.0"] == pytest.approx(float(first) ** 0.5, rel=1e-5)
    assert not any("embed" in name for name in layers.index)
    assert any("lm_head" in name for name in layers.index) == (adapter is HEAD_TOO)


def test_an_adapter_on_the_head(tmp_path: Path) -> None:
    """The hidden-state tap would read half of it: refused. The logits tap reads it right."""
    model = tiny(peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)).model
    with pytest.raises(TypeError, match=r"LM head.*modules_to_save"):
        lg.attach(model, sgd(model), tmp_path / "run")
    optimizer = sgd(model)
    with lg.attach(model, optimizer, tmp_path / "run", tap="logits"):
        loss = sft(model, ids())
        loss.backward()
        optimizer.step()
    tokens = lg.load_run(tmp_path / "run").tokens
    assert -tokens["logprob"].mean() == pytest.approx(float(loss.detach()), rel=1e-5)
    np.testing.assert_allclose(tokens["d1"], -1 / 36, rtol=1e-4)


def test_prompt_learning(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(load_model("tiny", device="cpu").model, config)
    with pytest.raises(TypeError, match="prompt learning"):
        lg.attach(model, sgd(model), tmp_path / "run")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Path) -> None:
    """accelerator.prepare, accumulate and clip_grad_norm_ in a loop of one's own: bit-identical, in true units."""
    ends = []
    for recorded in (False, True):
        accelerate.state.AcceleratorState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        loaded = load_model("tiny", device="cpu").model
        model, optimizer = accelerator.prepare(loaded, torch.optim.AdamW(loaded.parameters(), lr=1e-3))
        probe = lg.attach(model, optimizer, tmp_path / "run", objective="sft", copies=True) if recorded else None
        for number in range(8):
            batch = (ids() + number) % 16 + 2
            with accelerator.accumulate(model):
                loss = sft(model, batch)
                if probe is not None:
                    probe.batch(input_ids=batch, loss=loss)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        if probe is not None:
            probe.close()
        state = optimizer.state_dict()["state"]
        ends.append([p.detach().clone() for p in loaded.parameters()] + [s["exp_avg_sq"] for s in state.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    found = lg.load_run(tmp_path / "run")
    assert found.updates["tokens"].tolist() == [72] * 4
    np.testing.assert_allclose(found.updates["grad_norm_clipped"], 0.1, rtol=1e-4)
    assert (found.updates["grad_norm"] > 0.2).all()
    sure = found.tokens["prob"] < 0.9
    np.testing.assert_allclose(found.tokens["d1"][sure], -1 / 36, rtol=2e-3 if precision == "no" else 0.05)


def test_rows_are_handed_over(tmp_path: Path) -> None:
    """on_update, for a loop that logs by itself."""
    model = load_model("tiny", device="cpu").model
    optimizer, rows = sgd(model), []
    with lg.attach(model, optimizer, tmp_path / "run", flush_every=2, on_update=rows.append):
        for number in range(3):
            sft(model, ids()).backward()
            optimizer.step()
            assert len(rows) == (0, 2, 2)[number]
    updates = lg.load_run(tmp_path / "run").updates
    assert [row["step"] for row in rows] == [0, 1, 2]
    for name in ("grad_norm", "entropy", "tokens"):
        assert [row[name] for row in rows] == updates[name].tolist()


def named(name: str, module: str, *bases: type) -> type:
    return type(name, bases, {"__module__": module})


def test_deepspeed(tmp_path: Path) -> None:
    """By the name of its package, which cannot run here."""
    model = load_model("tiny", device="cpu").model
    engine = named("DeepSpeedEngine", "deepspeed.runtime.engine", torch.nn.Module)()
    with pytest.raises(TypeError, match=r"model: DeepSpeed.*lcogeom audit"):
        lg.attach(engine, sgd(model), tmp_path / "run")
    zero = named("DeepSpeedZeroOptimizer", "deepspeed.runtime.zero.stage_1_and_2", torch.optim.SGD)(model.parameters())
    with pytest.raises(TypeError, match=r"optimizer: DeepSpeed.*lcogeom audit"):
        lg.attach(model, zero, tmp_path / "run")
    wrapped = accelerate.optimizer.AcceleratedOptimizer.__new__(accelerate.optimizer.AcceleratedOptimizer)
    wrapped.optimizer = zero
    with pytest.raises(TypeError, match="optimizer: DeepSpeed"):
        lg.attach(model, wrapped, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_parallel(tmp_path: Path) -> None:
    model = load_model("tiny", device="cpu").model
    with pytest.raises(TypeError, match="DataParallel runs copies"):
        lg.attach(torch.nn.DataParallel(model), sgd(model), tmp_path / "run")


@pytest.mark.parametrize("part", ["model", "base", "peft"])
def test_compiled_in_place(part: str, tmp_path: Path) -> None:
    model: Any = tiny(LORA if part == "peft" else None).model
    (model.model if part == "base" else model).compile(backend="eager")
    with pytest.raises(lg.TapError, match=r"first, then torch\.compile"):
        lg.attach(model, sgd(model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    other = transformers.AutoModel.from_config(load_model("tiny", device="cpu").model.config)
    with pytest.raises(TypeError, match="no LM head"):
        lg.attach(other, sgd(other), tmp_path / "run")
