"""One real update of a tiny model of every type in transformers' causal-LM mapping, recorded by each tap.

The oracle is a plain float64 computation from the logits that the model itself returned in that update.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import lcogeom as lg
from lcogeom.recording.base_model import hidden_modules
from lcogeom.recording.head import output_head
from tests.architectures import MAPPING, NOT_BUILT, ROWS, build
from tests.attached import one_update

HIDDEN_REFUSED = {
    "musicgen": "several LM heads on one hidden state",
    "musicgen_melody": "several LM heads on one hidden state",
    "prophetnet": "not the output head applied to the last hidden state",  # its head reads the n-gram stream
}
"""Where the hidden-state tap raises, and what it says; the other taps must work."""


@pytest.mark.parametrize("model_type", sorted(set(MAPPING) - set(NOT_BUILT)))
def test_one_update_of_every_type(model_type: str, tmp_path: Path) -> None:
    refused = HIDDEN_REFUSED.get(model_type)
    taps = ["hidden", "logits"] if refused is None else ["hidden", "logits", "auto"]
    found = one_update(build(model_type), taps, tmp_path, ROWS.get(model_type, 2))
    if refused is not None:
        hidden = found.pop("hidden")
        assert hidden.error is not None
        assert refused in hidden.error
        assert "Use tap='logits'" in hidden.error
    for tap, recorded in found.items():
        assert recorded.right, f"{tap}: {recorded}"


@pytest.mark.parametrize("model_type", NOT_BUILT)
def test_types_that_cannot_be_built(model_type: str) -> None:
    """The day they can, this says so."""
    if model_type == "gemma3n" and importlib.util.find_spec("timm") is not None:
        pytest.skip("timm is installed")
    with pytest.raises((ImportError, ValueError), match=NOT_BUILT[model_type]):
        build(model_type)


@pytest.mark.parametrize("model_type", ["gemma3", "llama4", "bart", "opt", "bert", "qwen3_5"])
def test_input_ids_are_known_without_batch(model_type: str, tmp_path: Path) -> None:
    """Wrappers hand embeddings to the inner module, and some skip the outer one: the tokens are named all the same."""
    model = build(model_type).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wanted = []
    with lg.attach(model, optimizer, run=tmp_path / "run", tap="hidden"):
        for update in range(3):
            ids = torch.arange(3, 27).view(2, 12) + update
            with torch.no_grad():
                model(input_ids=ids.flip(1))  # an evaluation in between is not recorded
            logits = model(input_ids=ids).logits[:, 4:-1].flatten(0, 1)
            targets = ids[:, 5:].flatten()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, targets).backward()
            optimizer.step()
            logprob = torch.log_softmax(logits.detach().double(), 1).gather(1, targets[:, None]).squeeze(1)
            wanted += [(update, token, value) for token, value in zip(targets.tolist(), logprob.tolist(), strict=True)]
    tokens = lg.load_run(tmp_path / "run").tokens
    assert list(zip(tokens["step"], tokens["token_id"], strict=True)) == [(step, token) for step, token, _ in wanted]
    assert tokens["logprob"].tolist() == pytest.approx([value for _, _, value in wanted], abs=1e-5)
    assert tokens["d1"].tolist() == pytest.approx([-1 / 14] * 42, rel=1e-4)


@pytest.mark.parametrize("model_type", ["granite", "cohere", "gemma2", "gemma3", "opt", "hyperclovax"])
def test_a_fused_loss_that_never_builds_logits(model_type: str, tmp_path: Path) -> None:
    """The base model called as TRL's fused head calls it, its own forward and output embedding never."""
    model = build(model_type).eval()
    head = output_head(model)
    assert head is not None
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        whole = torch.log_softmax(model(input_ids=ids).logits[:, 4:-1].double(), -1)
        wanted = whole.gather(2, ids[:, 5:, None]).flatten()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run", tap="hidden"):
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, 4:-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(head.logits(hidden), ids[:, 5:].flatten()).backward()
        optimizer.step()
    tokens = lg.load_run(tmp_path / "run").tokens
    assert tokens["logprob"].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    assert tokens["d1"].tolist() == pytest.approx([-1 / 14] * 14, rel=1e-4)
    assert tokens["misfit"].max() < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_loop_that_calls_base_model_and_head_itself(model_type: str, tmp_path: Path) -> None:
    model = build(model_type).eval()
    ids = torch.arange(3, 27).view(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run"):
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, 4:-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 5:].flatten()).backward()
        optimizer.step()
    tokens = lg.load_run(tmp_path / "run").tokens
    assert tokens["token_id"].tolist() == ids[:, 5:].flatten().tolist()
    assert tokens["d1"].tolist() == pytest.approx([-1 / 14] * 14, rel=1e-4)


@pytest.mark.parametrize("tap", ["hidden", pytest.param("auto", marks=pytest.mark.slow)])
def test_compiled_after_attach(tap: str, tmp_path: Path) -> None:
    """BERT's head changes the hidden state: which tensor enters it is found in the first pass, itself compiled."""
    torch.compiler.reset()
    model = build("bert").eval()
    ids = torch.arange(3, 27).view(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run", tap=tap):
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            optimizer.zero_grad()
            logits = compiled(input_ids=ids).logits[:, 4:-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, ids[:, 5:].flatten()).backward()
            optimizer.step()
    tokens = lg.load_run(tmp_path / "run").tokens
    assert tokens["token_id"].tolist() == 2 * ids[:, 5:].flatten().tolist()
    assert tokens["d1"].tolist() == pytest.approx([-1 / 14] * 28, rel=1e-4)
    assert tokens["misfit"].max() < 1e-4


def test_the_outermost_module_that_returns_has_the_last_word(tmp_path: Path) -> None:
    """A base model that transforms its decoder's output: the head follows the base model, not the decoder."""
    model = build("gemma3").eval()
    decoder, base = hidden_modules(model)
    assert (decoder, base) == (model.model.language_model, model.model)

    def doubled(_: object, __: object, output: object) -> object:
        output.last_hidden_state = output.last_hidden_state * 2  # type: ignore[attr-defined]
        return output

    base.register_forward_hook(doubled)
    ids = torch.arange(3, 27).view(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, run=tmp_path / "run", tap="hidden"):
        logits = model(input_ids=ids).logits[:, 4:-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 5:].flatten()).backward()
        optimizer.step()
    tokens = lg.load_run(tmp_path / "run").tokens
    assert len(tokens) == 14
    assert tokens["d1"].tolist() == pytest.approx([-1 / 14] * 14, rel=1e-4)
