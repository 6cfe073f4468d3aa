"""Every tap in the ways that real loops call a model: its values against plain float64, and not a bit disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lcogeom as lg
from tests.oracles import PAIRS, derivatives
from tests.recording.wild import SCENES, Pass, fuse, one_fused_update, one_update, sampled_from, task_for
from tests.small_models import build

SINGLE = {"rtol": 5e-6, "atol": 1e-8}
"""Gradients are rounded to float32 (measured: 4e-7); the oracle goes on from the float32 logits in float64."""
EIGHT_BITS = {"rtol": 0.015, "atol": 2e-4}
"""Gradients are rounded to 2^-9 (measured: 3e-3), and so are hidden states under autocast, of which logits are made."""


def flat_norm(tensors: list[Tensor | None]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors if t is not None]).sum().sqrt())


def expected(passes: list[Pass], logits: list[Tensor], objective: str) -> dict[str, Tensor]:
    """The token columns, from full logits in float64: autograd of the plain loss, dense Hessians."""
    minimised, oracle = PAIRS[objective]
    columns: dict[str, list[Tensor]] = {}
    sequences = 0
    for one, rows in zip(passes, logits, strict=True):
        batch, z = one.tokens(), rows.double()
        count = len(batch)
        logp = torch.log_softmax(z, 1)
        _, gradient, hessian = derivatives(oracle, z, batch)
        sequence, place = one.mask.nonzero(as_tuple=True)
        action = logp.gather(1, batch.actions[:, None]).squeeze(1)
        found = {
            "sequence": sequence + sequences,
            "position": place - one.mask.int().argmax(1)[sequence],
            "token_id": batch.actions,
            "advantage": batch.advantages,
            "old_logprob": batch.old_logprobs,
            "logprob": action,
            "prob": action.exp(),
            "ratio": (action - batch.old_logprobs).exp(),
            "entropy": -(logp.exp() * logp).sum(1),
            "sum_sq_prob": logp.exp().square().sum(1),
            "logit_grad_norm": gradient.norm(dim=1) / count,
            "negative_count": (torch.linalg.eigvalsh(hessian) < -1e-10).sum(1),
        }
        if isinstance(minimised, lg.ActionObjective):
            _, d1, d2 = minimised.derivatives(action, batch)
            found |= {"d1": d1 / count, "d2": d2 / count}
        for name, values in found.items():
            columns.setdefault(name, []).append(values.double().cpu())
        sequences += len(one.ids)
    return {name: torch.cat(parts) for name, parts in columns.items()}


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = optimizer.state_dict()["state"]
    moments = [state[key][name] for key in sorted(state) for name in ("exp_avg", "exp_avg_sq")]
    return [p.detach().clone() for p in model.parameters()] + moments


def column(run: lg.Run, name: str) -> Tensor:
    return torch.tensor(run.tokens[name].to_numpy(dtype=np.float64, na_value=np.nan))


@pytest.mark.parametrize("tap", ["auto", "hidden", "logits"])
@pytest.mark.parametrize("objective", ["ppo", "lco-kld"])
@pytest.mark.parametrize("scene", SCENES)
def test_values(scene: str, objective: str, tap: str, tmp_path: Path, device: torch.device) -> None:
    way = SCENES[scene]
    minimised, _ = PAIRS[objective]
    model = build("llama", device)
    task = task_for(model)
    passes = way.passes(task)
    way.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad(), way.running(device):
        logits = [one.logits(model).detach() for one in passes]
    passes = [sampled_from(rows, one) for rows, one in zip(logits, passes, strict=True)]
    losses = one_update(way, model, optimizer, passes=passes, objective=minimised)
    norm = flat_norm([p.grad for p in model.parameters()])
    with lg.attach(model, optimizer, run=tmp_path / "run", objective=minimised, tap=tap) as probe:
        for _ in range(2):
            one_update(way, model, optimizer, passes=passes, objective=minimised, probe=probe)
    run = lg.load_run(tmp_path / "run")
    if way.together:  # the backward pass meets the last forward pass first
        passes, logits = passes[::-1], logits[::-1]
    close = EIGHT_BITS if way.low else SINGLE
    for name, wanted in expected(passes, logits, objective).items():
        twice = torch.cat([wanted, wanted])  # a learning rate of 0
        torch.testing.assert_close(column(run, name), twice, **close, msg=lambda text, n=name: f"{n}: {text}")
    assert column(run, "misfit").nan_to_num().max() < (0.05 if way.low else 5e-3)
    row = run.updates.iloc[1]
    assert row["tokens"] == sum(int(one.mask.sum()) for one in passes)
    assert row["loss"] == pytest.approx(float(torch.stack(losses).double().mean()), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-2 if way.low else 1e-5)
    assert row["entropy"] == pytest.approx(float(column(run, "entropy").mean()))


@pytest.mark.parametrize("tap", ["auto", "hidden", "log_probs"])
@pytest.mark.parametrize("scene", ["right padding", "left padding", "accumulation", "two passes, one loss", "bf16"])
def test_a_fused_head(scene: str, tap: str, tmp_path: Path, device: torch.device) -> None:
    """A forward that returns log-probabilities and no logits, as TRL's does."""
    way = SCENES[scene]
    minimised, _ = PAIRS["ppo"]
    model = build("llama", device)
    passes = way.passes(task_for(model))
    way.prepare(model)
    with torch.no_grad():
        logits = [one.logits(model).detach() for one in passes]
    fuse(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with lg.attach(model, optimizer, run=tmp_path / "run", objective=minimised, tap=tap) as probe:
        one_fused_update(way, model, optimizer, passes=passes, probe=probe)
    run = lg.load_run(tmp_path / "run")
    if way.together:
        passes, logits = passes[::-1], logits[::-1]
    close = EIGHT_BITS if way.low else SINGLE
    for name, wanted in expected(passes, logits, "ppo").items():
        torch.testing.assert_close(column(run, name), wanted, **close, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("scene", SCENES)
def test_ten_updates_are_the_same_to_the_bit(scene: str, tmp_path: Path, device: torch.device) -> None:
    way = SCENES[scene]
    ends = []
    for recorded in (False, True):
        model = build("llama", device)
        passes = way.passes(task_for(model))
        way.prepare(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(0)
        with lg.attach(model, optimizer, run=tmp_path / "run", objective="ppo") if recorded else nullcontext() as probe:
            for _ in range(10):
                one_update(way, model, optimizer, passes=passes, objective=lg.objective("ppo"), probe=probe)
        ends.append(state_of(model, optimizer))
    assert len(lg.load_run(tmp_path / "run").updates) == 10
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With several, inductor's code gives other last bits from run to run, recorder or not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tap", ["auto", "hidden", "logits"])
def test_compiled_after_attach(tap: str, backend: str, one_thread: None, tmp_path: Path, device: torch.device) -> None:
    """Values as without a recorder, and the same ten updates to the bit."""
    way = SCENES["plain"]
    minimised, _ = PAIRS["ppo"]
    ends, logits = [], []
    for recorded in (False, True):
        torch.compiler.reset()
        model = build("llama", device)
        passes = way.passes(task_for(model))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        logits = [one.logits(model).detach() for one in passes]
        with ExitStack() as stack:
            probe = None
            if recorded:
                attached = lg.attach(model, optimizer, run=tmp_path / "run", objective=minimised, tap=tap)
                probe = stack.enter_context(attached)
            compiled = torch.compile(model, backend=backend)
            for _ in range(10):
                one_update(way, model, optimizer, passes=passes, objective=minimised, probe=probe, call=compiled)
        ends.append(state_of(model, optimizer))
    run = lg.load_run(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    first = run.tokens["step"] == 0
    for name, wanted in expected(passes, logits, "ppo").items():
        torch.testing.assert_close(column(run, name)[first.to_numpy()], wanted, **SINGLE)


@pytest.mark.parametrize("how", [torch.compile, lambda model: model.compile() or model], ids=["wrapped", "in place"])
def test_compiled_before_attach(how: Callable, tmp_path: Path, device: torch.device) -> None:
    model = build("llama", device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(lg.TapError, match=r"first, then torch\.compile"):
        lg.attach(how(model), optimizer, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
