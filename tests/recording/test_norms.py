"""Norms of long vectors: what a float32 sum over millions of elements loses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import lcogeom as lg
from lcogeom.recording.norms import squared_norm
from tests.small_models import loss_of, make_task, tell


@pytest.mark.parametrize("length", [0, 1, 1000, 1024, 2500, 16_000_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_squared_norm(length: int, dtype: torch.dtype, device: torch.device) -> None:
    """The norm to 5e-5; float32's own is off by 5e-4 at 16 million elements."""
    values = torch.rand(length, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found = squared_norm(values)
    assert found.dtype == torch.float64
    assert float(found) ** 0.5 == pytest.approx(float(values.double().square().sum()) ** 0.5, rel=5e-5)


def test_squared_norm_of_a_view_and_of_what_is_not_finite(device: torch.device) -> None:
    values = torch.arange(6.0, device=device).view(2, 3).T
    assert float(squared_norm(values)) == pytest.approx(55)
    assert torch.isnan(squared_norm(torch.tensor([1.0, torch.nan], device=device)))
    assert torch.isinf(squared_norm(torch.full((3000,), torch.inf, device=device)))


def test_the_gradient_of_a_large_vocabulary(tmp_path: Path, device: torch.device) -> None:
    """Its embedding's gradient has 4 million entries: the norm recorded is that in float64, of all and of the layer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=65_536, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(device)
    task = make_task(model)
    objective = lg.objective("sft")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with lg.attach(model, optimizer, run=tmp_path / "run", objective=objective) as probe:
        loss = loss_of(model, task, objective)
        tell(probe, task, loss)
        loss.backward()
        embedding = model.get_input_embeddings().weight
        embedding.grad.add_(torch.rand(embedding.shape, generator=torch.Generator().manual_seed(1)).to(device))
        squares = {name: float(p.grad.double().square().sum()) for name, p in model.named_parameters()}
        optimizer.step()
    run = lg.load_run(tmp_path / "run")
    assert run.updates["grad_norm_clipped"][0] == pytest.approx(sum(squares.values()) ** 0.5, rel=2e-5)
    layer = run.norms[run.norms["name"] == "model.embed_tokens"].iloc[0]
    assert layer["grad_norm_clipped"] == pytest.approx(squares["model.embed_tokens.weight"] ** 0.5, rel=2e-5)
