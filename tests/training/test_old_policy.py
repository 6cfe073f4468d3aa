"""Old logits that are kept as hidden states, against the logits that the old model gave, after it has moved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import lcogeom as lg
from lcogeom.training.old_policy import HiddenStates, keep_old_policy
from lcogeom.training.replay import completion_logits
from lcogeom.training.rollout import Sequences
from tests.small_models import build, make_task

MODELS = ["llama", "llama-gqa-tied", "gpt2", "gemma2-softcap", "cohere-scale"]
LORA = {"r": 2, "lora_alpha": 8, "init_lora_weights": False}


def rollout(model: transformers.PreTrainedModel, count: int = 5) -> Sequences:
    """Sequences of different lengths, padded on the right."""
    task = make_task(model, sequences=count)
    attention = torch.ones_like(task.input_ids)
    for row in range(count):
        attention[row, 12 - row % 3 :] = 0
    return Sequences(task.input_ids, attention, task.mask, 4)


def some(sequences: Sequences, rows: Tensor) -> Sequences:
    return replace(
        sequences,
        input_ids=sequences.input_ids[rows],
        attention_mask=sequences.attention_mask[rows],
        action_mask=sequences.action_mask[rows],
    )


def train(model: torch.nn.Module, sequences: Sequences, updates: int = 3) -> None:
    """Real updates, large enough for the logits to change altogether."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(updates):
        optimizer.zero_grad()
        batch = lg.TokenBatch(sequences.input_ids[sequences.action_mask])
        lg.objective("sft").loss(completion_logits(model, sequences), batch).mean().backward()
        optimizer.step()


@torch.no_grad()
def logits_now(model: torch.nn.Module, sequences: Sequences) -> Tensor:
    """The oracle: the model's own whole forward pass."""
    logits = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask).logits
    return logits[:, :-1][sequences.action_mask[:, 1:]]


def close(found: Tensor, wanted: Tensor, relative: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    spread = wanted.float().abs().max()
    assert (found.float() - wanted.float()).abs().max() <= relative * spread


@pytest.mark.parametrize("name", MODELS)
def test_old_logits_after_the_weights_have_moved(name: str, device: torch.device) -> None:
    model = build(name, device)
    sequences = rollout(model)
    before = logits_now(model, sequences)
    old = keep_old_policy(model, sequences, rows_per_pass=2)
    everything = torch.arange(5, device=device)
    close(old.logits(everything, sequences.action_mask), before)  # first inner epoch
    for _ in range(2):  # later ones
        train(model, sequences)
        assert (logits_now(model, sequences) - before).abs().max() > 0.1 * before.abs().max()
        close(old.logits(everything, sequences.action_mask), before)


@pytest.mark.parametrize("name", MODELS)
def test_old_logprobs_of_the_same_pass(name: str, device: torch.device) -> None:
    model = build(name, device)
    sequences = rollout(model)
    for temperature in (1.0, 0.7):
        old = keep_old_policy(model, sequences, temperature=temperature)
        logp = torch.log_softmax(logits_now(model, sequences).double() / temperature, 1)
        chosen = logp.gather(1, sequences.input_ids[sequences.action_mask][:, None]).squeeze(1)
        torch.testing.assert_close(old.old_logprobs[sequences.action_mask].double(), chosen, rtol=1e-5, atol=2e-5)
        assert (old.old_logprobs[~sequences.action_mask] == 0).all()


def test_micro_batches_in_any_order_and_without_their_padding(device: torch.device) -> None:
    model = build("llama", device)
    sequences = rollout(model)
    old = keep_old_policy(model, sequences, rows_per_pass=2)
    for rows in ([4, 0], [2], [3, 1, 3]):
        picked = some(sequences, torch.tensor(rows, device=device))
        wanted = logits_now(model, picked)
        width = int(picked.attention_mask.sum(1).max())
        close(old.logits(torch.tensor(rows, device=device), picked.action_mask[:, :width]), wanted)
    fewer = sequences.action_mask.clone()
    fewer[:, 6] = False  # a mask that leaves tokens out, as an intervention does
    kept = fewer[sequences.action_mask]
    close(old.logits(torch.arange(5, device=device), fewer), logits_now(model, sequences)[kept])


def test_same_shapes_give_the_same_bits(device: torch.device) -> None:
    model = build("llama", device)
    sequences = rollout(model)
    old = keep_old_policy(model, sequences)
    with torch.no_grad():
        hidden = model.model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask).last_hidden_state
        wanted = model.lm_head(hidden[:, :-1][sequences.action_mask[:, 1:]])
    train(model, sequences)
    assert torch.equal(old.logits(torch.arange(5, device=device), sequences.action_mask), wanted)


@pytest.mark.parametrize(
    ("name", "options", "moves"),
    [
        ("llama", {"target_modules": ["q_proj", "up_proj"]}, False),
        ("llama-gqa-tied", {"target_modules": ["q_proj"]}, False),
        ("gemma2-softcap", {"target_modules": ["v_proj"]}, False),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    ],
)
def test_lora_keeps_the_head_only_where_it_moves(name: str, options: dict, moves: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(build(name, device), peft.LoraConfig(**LORA, **options)).eval()
    sequences = rollout(model.get_base_model())
    before = logits_now(model, sequences)
    old = keep_old_policy(model, sequences)
    assert isinstance(old.kept, HiddenStates)
    assert old.kept.copied is moves
    train(model, sequences)
    assert (logits_now(model, sequences) - before).abs().max() > 0.1 * before.abs().max()
    close(old.logits(torch.arange(5, device=device), sequences.action_mask), before)


def test_bytes_are_those_of_what_is_kept(device: torch.device) -> None:
    model = build("llama", device)
    sequences = rollout(model)
    tokens, beside = int(sequences.action_mask.sum()), 5 * 12 * (1 + 4)  # a mask and old log-probabilities
    old = keep_old_policy(model, sequences)
    assert old.nbytes == tokens * 32 * 4 + 41 * 32 * 4 + beside
    model.lm_head.requires_grad_(False)
    assert keep_old_policy(model, sequences).nbytes == tokens * 32 * 4 + beside
    assert keep_old_policy(model, sequences, form="topk", k=5).nbytes == tokens * 5 * (2 + 4) + beside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, device: torch.device) -> None:
    model = build("llama", device).to(dtype)
    sequences = rollout(model)
    before = logits_now(model, sequences)
    old = keep_old_policy(model, sequences)
    assert isinstance(old.kept, HiddenStates)
    assert old.kept.states.dtype is dtype
    train(model, sequences)
    found = old.logits(torch.arange(5, device=device), sequences.action_mask)
    assert found.dtype is dtype
    close(found, before, 2**-8 if dtype is torch.bfloat16 else 1e-7)  # one rounding of bf16


def test_top_k_as_the_authors_keep_it(device: torch.device) -> None:
    """systems.md 1.2: the five largest logits in float16, and -100 elsewhere; the target is built from those."""
    model = build("gemma2-softcap", device)
    sequences = rollout(model)
    before = logits_now(model, sequences)
    old = keep_old_policy(model, sequences, form="topk", k=5)
    train(model, sequences)
    found = old.logits(torch.arange(5, device=device), sequences.action_mask)
    assert found.shape == before.shape
    ranks = before.argsort(1, descending=True).argsort(1)
    assert torch.equal(found[ranks < 5], before[ranks < 5].half())
    assert (found[ranks >= 5] == -100).all()


@pytest.mark.parametrize("name", ["lco-kld", "lco-mse", "lco-lch"])
@pytest.mark.parametrize("advantages", ["sparse", "dense"])
@pytest.mark.parametrize("epoch", ["first", "later"])
def test_objectives_see_no_difference(name: str, advantages: str, epoch: str, device: torch.device) -> None:
    """LCO's loss and gradient on recomputed old logits are those on old logits that were stored."""
    model = build("llama", device)
    sequences = rollout(model)
    stored = logits_now(model, sequences)
    old = keep_old_policy(model, sequences)
    if epoch == "later":
        train(model, sequences)
    actions = sequences.input_ids[sequences.action_mask]
    signs = torch.where(sequences.action_mask.nonzero()[:, 0] % 2 == 0, 1.0, -1.0)
    if advantages == "dense":
        known = {"advantage_ids": stored.topk(5, dim=1).indices, "advantages": torch.randn(len(actions), 5).to(stored)}
    else:
        known = {"advantages": signs}
    recomputed = old.logits(torch.arange(5, device=device), sequences.action_mask)
    found, wanted = (
        loss_and_gradients(model, sequences, name, lg.TokenBatch(actions, old_logits=logits, **known))
        for logits in (recomputed, stored)
    )
    for ours, oracle in zip(found, wanted, strict=True):
        close(ours, oracle)


def loss_and_gradients(
    model: torch.nn.Module, sequences: Sequences, name: str, batch: lg.TokenBatch
) -> tuple[Tensor, Tensor]:
    loss = lg.objective(name).loss(completion_logits(model, sequences), batch)
    model.zero_grad()
    loss.mean().backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_model_is_left_as_it_was(device: torch.device) -> None:
    """Modes of single modules, gradients, weights, hooks and the random state."""
    model = build("gpt2", device).train()
    model.transformer.h[0].eval()  # the user's own choice
    sequences = rollout(model)
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    first, second = (keep_old_policy(model, sequences) for _ in range(2))
    rows = torch.arange(5, device=device)
    mask = sequences.action_mask
    assert torch.equal(first.logits(rows, mask), second.logits(rows, mask))  # GPT-2's dropout is off
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not first.logits(rows, mask).requires_grad


def test_no_logits_of_all_tokens_are_ever_made(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass makes logits of the last position alone; the log-probabilities are made in blocks."""
    model = build("llama", device)
    sequences = rollout(model)
    for name in ("CPU_BLOCK", "GPU_BLOCK"):
        monkeypatch.setattr(f"lcogeom.training.old_policy.{name}", 41 * 6)
    rows = []
    linear = torch.nn.functional.linear

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == 41:
            rows.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    old = keep_old_policy(model, sequences, rows_per_pass=2)
    assert max(rows) == 6
    monkeypatch.undo()
    whole = keep_old_policy(model, sequences)
    torch.testing.assert_close(old.old_logprobs, whole.old_logprobs, rtol=1e-5, atol=1e-6)


def test_a_recorder_beside_it(device: torch.device, tmp_path: Path) -> None:
    """The pass fires the recorder's hooks without a gradient, which it ignores."""
    model = build("llama", device)
    sequences = rollout(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with lg.attach(model, optimizer, tmp_path / "run", objective="sft", tap="hidden") as probe:
        for _ in range(2):
            keep_old_policy(model, sequences)
            probe.batch(input_ids=sequences.input_ids, action_mask=sequences.action_mask)
            batch = lg.TokenBatch(sequences.input_ids[sequences.action_mask])
            lg.objective("sft").loss(completion_logits(model, sequences), batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    run = lg.load_run(tmp_path / "run")
    assert run.updates["tokens"].tolist() == [int(sequences.action_mask.sum())] * 2


def test_a_rollout_without_a_token(device: torch.device) -> None:
    """A process whose completions were all cut off and masked still takes part."""
    model = build("llama", device)
    sequences = rollout(model)
    nothing = replace(sequences, action_mask=sequences.action_mask & False)
    for form in ("hidden", "topk"):
        old = keep_old_policy(model, nothing, form=form)  # type: ignore[arg-type]
        assert old.logits(torch.arange(5, device=device), nothing.action_mask).shape == (0, 41)


BAD: list[tuple[Callable[[transformers.PreTrainedModel, Sequences], object], str]] = [
    (lambda m, s: keep_old_policy(m, s, form="logits"), "form: 'logits'"),  # type: ignore[arg-type]
    (lambda m, s: keep_old_policy(m, s, form="topk", k=42), "k: 42; must be between 1 and the vocabulary, 41"),
    (lambda m, s: keep_old_policy(m, s, rows_per_pass=0), "rows_per_pass"),
    (lambda m, s: keep_old_policy(m, s, temperature=0.0), "temperature"),
    (lambda m, s: keep_old_policy(m, replace(s, action_mask=s.action_mask | True)), "first column"),
    (lambda m, s: keep_old_policy(m, s).logits(torch.tensor([0, 1]), s.action_mask), "one row for each"),
    (lambda m, s: keep_old_policy(m, s).logits(torch.tensor([2]), s.action_mask[:1]), "2 of its tokens are no"),
]


@pytest.mark.parametrize(("call", "said"), BAD)
def test_bad_input(call: Callable[[transformers.PreTrainedModel, Sequences], object], said: str) -> None:
    model = build("llama", torch.device("cpu"))
    with pytest.raises(ValueError, match=said):
        call(model, rollout(model))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_head_that_is_not_understood(wrapped: bool) -> None:
    """BERT's has a dense layer in front, whose image of the hidden state is what enters the output embedding."""
    model = build("llama", torch.device("cpu"))
    model.model.norm.register_forward_hook(lambda _, __, output: output)
    model.lm_head.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    sequences = rollout(model)
    given = peft.get_peft_model(model, peft.LoraConfig(**LORA, target_modules=["q_proj"])) if wrapped else model
    with pytest.raises(lg.TapError, match="not"):
        keep_old_policy(given, sequences)


def test_an_adapter_on_the_head() -> None:
    model = build("llama", torch.device("cpu"))
    sequences = rollout(model)
    with pytest.raises(TypeError, match="adapter"):
        keep_old_policy(peft.get_peft_model(model, peft.LoraConfig(**LORA, target_modules=["lm_head"])), sequences)


def test_a_head_that_zero_3_has_taken_apart() -> None:
    """By the mark that DeepSpeed leaves on such a parameter; DeepSpeed itself is not installed."""
    model = build("llama", torch.device("cpu"))
    model.lm_head.weight.ds_id = 0
    with pytest.raises(TypeError, match="ZeRO-3"):
        keep_old_policy(model, rollout(model))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes(tmp_path: Path) -> None:
    """FSDP2 and DDP: each process has the old logits of its own half of the sequences, those of one process."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.old_policy_halves", str(tmp_path)]
    running = [
        subprocess.Popen(command, cwd=root, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for process in running:
        _, said = process.communicate(timeout=180)
        assert process.returncode == 0, said[-3000:]
    for how, name in (("fsdp2", "llama"), ("fsdp2", "llama-gqa-tied"), ("ddp", "gpt2")):
        model = build(name, torch.device("cpu"))
        wanted = logits_now(model, rollout(model, 4))
        halves = [load_file(tmp_path / f"{how}-{name}-{rank}.safetensors") for rank in (0, 1)]
        close(torch.cat([half["logits"] for half in halves]), wanted)
        assert all(half["moved"] > 0.1 for half in halves)
        vocabulary, width = 41, 32
        whole = vocabulary * width * 4
        copies = sum(int(half["head"]) for half in halves)
        assert copies == (whole if how == "fsdp2" else 2 * whole)  # FSDP2's copies are sharded like the head
