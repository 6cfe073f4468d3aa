"""Losses from hidden states in blocks, against the objective on the whole logits of the model's own forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor

import lcogeom as lg
from lcogeom.recording.head import output_head
from lcogeom.training.chunked_loss import chunked_loss, in_blocks
from lcogeom.training.old_policy import keep_old_policy
from tests.small_models import build, make_task
from tests.training.test_old_policy import close, logits_now, rollout, train


def hidden_of(model: transformers.PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    hidden = model.base_model(input_ids=ids).last_hidden_state
    return hidden[:, :-1][mask[:, 1:]]


def batch_of(model: transformers.PreTrainedModel, seed: int = 0) -> tuple[Tensor, Tensor, lg.TokenBatch]:
    """Everything that an objective may read."""
    task = make_task(model, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    logits = task.old_logits + 0.5 * torch.randn(task.old_logits.shape, generator=rng).to(task.old_logits)
    ref = torch.log_softmax(logits, 1).gather(1, task.input_ids[task.mask][:, None]).squeeze(1)
    rows = task.mask.nonzero()[:, 0]
    whole = replace(task.tokens(), ref_logprobs=ref, ref_logits=logits, sequences=rows)
    return task.input_ids, task.mask, replace(whole, pairs=rows // 2, chosen=rows % 2 == 0)


def gradients(loss: Tensor, model: torch.nn.Module) -> Tensor:
    weights = torch.linspace(0.5, 2.0, len(loss)).to(loss)  # tokens count differently
    found = torch.autograd.grad((loss * weights).sum(), list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("name", lg.objective_names())
@pytest.mark.parametrize("architecture", ["llama", "gemma2-softcap"])
def test_every_objective_of_one_token(name: str, architecture: str, device: torch.device) -> None:
    model = build(architecture, device)
    ids, mask, batch = batch_of(model)
    head = output_head(model)
    assert head is not None
    minimised = lg.objective(name)
    logits = model(input_ids=ids).logits[:, :-1][mask[:, 1:]]
    stored = batch.old_logits
    assert stored is not None
    if name == "adpa":  # a teacher's advantages, of its most likely tokens
        known = stored.topk(4, dim=1)
        batch = replace(batch, advantages=known.values, advantage_ids=known.indices)
    without = replace(batch, old_logits=None)
    try:
        wanted = minimised.loss(logits, replace(batch, sequences=None, pairs=None))
    except ValueError:  # it couples tokens
        with pytest.raises(ValueError, match=r"^(sequences|pairs): objective"):
            chunked_loss(minimised, hidden_of(model, ids, mask), head, without, old_logits=lambda some: stored[some])
        return
    found = chunked_loss(
        minimised, hidden_of(model, ids, mask), head, without, old_logits=lambda some: stored[some], tokens=5
    )
    close(found, wanted)
    close(gradients(found, model), gradients(wanted, model))


@pytest.mark.parametrize("architecture", ["llama", "llama-gqa-tied", "gpt2", "gemma2-softcap", "cohere-scale"])
def test_float64(architecture: str) -> None:
    """To rounding, with a temperature, and whatever the size of the blocks."""
    model = build(architecture, torch.device("cpu")).double()
    ids, mask, batch = batch_of(model)
    head = output_head(model)
    assert head is not None
    stored = batch.old_logits
    assert stored is not None
    minimised = lg.objective("lco-kld", beta=0.5) + 0.1 * lg.objective("k3")
    logits = model(input_ids=ids).logits[:, :-1][mask[:, 1:]] / 0.7
    wanted = minimised.loss(logits, replace(batch, old_logits=stored / 0.7))
    gradient = gradients(wanted, model)
    for tokens in (1, 7, 1000, None):
        found = chunked_loss(
            minimised, hidden_of(model, ids, mask), head, replace(batch, old_logits=None),
            old_logits=lambda some: stored[some], temperature=0.7, tokens=tokens,
        )  # fmt: skip
        close(found, wanted, 1e-7)  # a Llama's norms stay in float32
        close(gradients(found, model), gradient, 1e-6)


@pytest.mark.parametrize("form", ["hidden", "topk"])
@pytest.mark.parametrize("name", ["lco-kld", "lco-mse", "lco-lch"])
def test_with_an_old_policy(name: str, form: str, device: torch.device) -> None:
    """First and later inner epochs, with no old logits of all tokens either."""
    model = build("llama", device)
    sequences = rollout(model)
    stored = logits_now(model, sequences)
    if form == "topk":
        top = stored.topk(5)
        stored = torch.full_like(stored, -100).scatter(1, top.indices, top.values.half().float())
    old = keep_old_policy(model, sequences, form=form)  # type: ignore[arg-type]
    head, mask = output_head(model), sequences.action_mask
    assert head is not None
    signs = torch.where(mask.nonzero()[:, 0] % 2 == 0, 1.0, -1.0).to(device)
    batch = lg.TokenBatch(sequences.input_ids[mask], signs)
    for epoch in range(2):
        if epoch:
            train(model, sequences)
        reader = old.blocks(torch.arange(5, device=device), mask)
        hidden = hidden_of(model, sequences.input_ids, mask)
        found = chunked_loss(lg.objective(name), hidden, head, batch, old_logits=reader, tokens=4)
        wanted = lg.objective(name).loss(
            model(input_ids=sequences.input_ids).logits[:, :-1][mask[:, 1:]], replace(batch, old_logits=stored)
        )
        close(found, wanted)
        close(gradients(found, model), gradients(wanted, model))


def test_current_logits_are_the_old_ones_on_the_first_update(device: torch.device) -> None:
    model = build("llama", device)
    ids, mask, batch = batch_of(model)
    head = output_head(model)
    assert head is not None
    found = chunked_loss(lg.objective("lco-kld"), hidden_of(model, ids, mask), head, replace(batch, old_logits=None))
    logits = model(input_ids=ids).logits[:, :-1][mask[:, 1:]]
    wanted = lg.objective("lco-kld").loss(logits, replace(batch, old_logits=logits.detach()))
    close(gradients(found, model), gradients(wanted, model))
    with pytest.raises(ValueError, match="it holds old_logits"):
        chunked_loss(lg.objective("lco-kld"), hidden_of(model, ids, mask), head, batch)


def test_logits_of_few_tokens_at_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass and in the backward pass; nothing of V columns is kept in between."""
    model = build("llama", device)
    ids, mask, batch = batch_of(model)
    head = output_head(model)
    assert head is not None
    rows: list[int] = []
    linear = torch.nn.functional.linear

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == 41:
            rows.append(len(x))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    hidden = hidden_of(model, ids, mask)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t):
        loss = chunked_loss(lg.objective("sft"), hidden, head, replace(batch, old_logits=None), tokens=6)
    assert not any(shape[-1:] == (41,) for shape in saved)
    count = len(rows)
    loss.sum().backward()
    assert len(rows) == 2 * count
    assert max(rows) == 6
    assert sum(rows) == 2 * len(hidden)


def test_no_token_and_no_gradient(device: torch.device) -> None:
    model = build("llama", device)
    head = output_head(model)
    assert head is not None
    hidden = torch.zeros(0, 32, device=device, requires_grad=True)
    nothing = in_blocks(lambda logits, _: logits.sum(1), hidden, head)
    assert nothing.shape == (0,)
    nothing.sum().backward()
    with torch.no_grad():
        ids, mask, batch = batch_of(model)
        found = chunked_loss(lg.objective("sft"), hidden_of(model, ids, mask), head, replace(batch, old_logits=None))
    assert not found.requires_grad
