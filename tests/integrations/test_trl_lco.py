"""LCOTrainer: real TRL runs on `tiny`, against objectives on the logits of whole forward passes."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from safetensors.torch import load_file
from torch import Tensor

import lcogeom as lg
from lcogeom.integrations.transformers import RecorderCallback
from lcogeom.integrations.trl import LCOTrainer, reading_of
from lcogeom.integrations.trl_lco import OVERRIDDEN, require_internals, require_trl
from tests.integrations.lco_halves import blocks_of
from tests.integrations.trainers import HEAD_TOO, LORA, PROMPTS, reward, run, settings, tiny
from tests.small_models import build

TRAINER_OPTIONS = ("objective", "advantages", "old_policy", "old_k")
pytestmark = pytest.mark.filterwarnings("error:update", "error:RecorderCallback")


def lco(folder: Path, updates: int, **options: Any) -> Any:
    loaded = tiny(options.pop("adapter", None))
    given = {name: options.pop(name) for name in TRAINER_OPTIONS if name in options}
    callbacks, scored = options.pop("callbacks", None), options.pop("reward_funcs", reward)
    prompts = options.pop("prompts", PROMPTS)
    if "eval_strategy" in options:
        given["eval_dataset"] = datasets.Dataset.from_dict({"prompt": prompts[:4]})
    defaults = {"num_generations": 4, "max_completion_length": 5}
    return LCOTrainer(
        model=loaded.model,
        reward_funcs=scored,
        args=trl.GRPOConfig(output_dir=str(folder), max_steps=updates, **settings(defaults | options)),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=loaded.tokenizer,
        callbacks=callbacks,
        **given,
    )


class Oracle:
    """At each loss: the same from whole forward passes of the model, and of a twin with the weights of the rollout."""

    def __init__(self, trainer: Any, adapter: Any = None) -> None:
        self.trainer, self.losses, self.gradients, self.late = trainer, [], [], 0
        self.twin = tiny(adapter).model  # not a copy: the forward that TRL gave the model would run the model's own
        generate, compute = trainer._generate_and_score_completions, trainer._compute_loss
        self.computes = compute

        def generated(inputs: Any) -> Any:
            self.twin.load_state_dict(trainer.model.state_dict())
            return generate(inputs)

        def computed(model: torch.nn.Module, inputs: Any) -> Tensor:
            loss: Tensor = compute(model, inputs)
            if torch.is_grad_enabled():
                wanted = self.wanted(model, inputs)
                self.losses.append((loss.detach(), wanted.detach()))
                parameters = [p for p in model.parameters() if p.requires_grad]
                found, expected = (torch.autograd.grad(each, parameters, retain_graph=True) for each in (loss, wanted))
                self.gradients.append(tuple(torch.cat([g.flatten() for g in each]) for each in (found, expected)))
            return loss

        trainer._generate_and_score_completions, trainer._compute_loss = generated, computed

    def logits(self, model: torch.nn.Module, inputs: Any, mask: Tensor) -> Tensor:
        ids, attention = (
            torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1) for part in ("ids", "mask")
        )
        whole = model(input_ids=ids, attention_mask=attention).logits
        return whole[:, inputs["prompt_ids"].shape[1] - 1 : -1][mask] / self.trainer.temperature

    def wanted(self, model: torch.nn.Module, inputs: Any) -> Tensor:
        trainer, mask = self.trainer, inputs["completion_mask"].bool()
        logits = self.logits(model, inputs, mask)
        with torch.no_grad():
            old = self.logits(self.twin, inputs, mask)
        self.late += bool((old - logits).abs().max() > 1e-3)
        if trainer.old_form == "topk":
            raw = (old * trainer.temperature).topk(trainer.old_k)
            old = torch.full_like(old, -100).scatter(1, raw.indices, raw.values.half().float()) / trainer.temperature
        actions = inputs["completion_ids"][mask]
        rows = mask.nonzero()[:, 0]
        advantages = inputs["advantages"][rows]
        per_token = trainer.minimised.loss(logits, lg.TokenBatch(actions, advantages, old_logits=old))
        if trainer.beta:
            logp = torch.log_softmax(logits, 1).gather(1, actions[:, None])[:, 0]
            gap = inputs["ref_per_token_logps"][mask] - logp
            ratio = (logp - inputs["old_per_token_logps"][mask]).exp() if trainer.args.use_bias_correction_kl else 1.0
            per_token = per_token + trainer.beta * ratio * (gap.exp() - gap - 1)
        accumulated = trainer.args.gradient_accumulation_steps
        if trainer.loss_type == "dapo":  # every accumulation window has its share of the rollout's tokens
            share = accumulated / trainer.args.steps_per_generation
            return per_token.sum() / (inputs["num_items_in_batch"] / trainer.accelerator.num_processes * share)
        if trainer.loss_type == "bnpo":
            return per_token.mean() / accumulated
        if trainer.loss_type == "dr_grpo":
            return per_token.sum() / (len(mask) * 5) / accumulated
        means = [per_token[rows == row].mean() for row in range(len(mask))]
        return torch.stack(means).mean() / accumulated

    def check(self, tolerance: float = 1e-5) -> None:
        assert self.losses
        for found, wanted in self.losses:
            assert abs(found - wanted) <= tolerance * (1 + wanted.abs())
        for found, wanted in self.gradients:
            assert (found - wanted).norm() <= tolerance * wanted.norm() + 1e-8
        assert max(wanted.norm() for _, wanted in self.gradients) > 1e-4


CASES: dict[str, dict[str, Any]] = {
    "one update": {"objective": "lco-kld"},
    "kld": {"objective": "lco-kld", "num_iterations": 3},
    "mse": {"objective": "lco-mse", "num_iterations": 2, "loss_type": "grpo", "gradient_accumulation_steps": 2},
    "lch": {"objective": "lco-lch", "num_iterations": 2, "loss_type": "bnpo", "gradient_accumulation_steps": 2},
    "rule": {
        "objective": lg.objective("lco-kld", negative_beta_scale=100.0, beta=0.5), "advantages": "rule",
        "num_iterations": 2, "loss_type": "dr_grpo", "gradient_accumulation_steps": 2,
    },
    "one update, top k": {"objective": "lco-kld", "old_policy": "topk"},
    "top k": {"objective": "lco-kld", "old_policy": "topk", "num_iterations": 2},
    "temperature": {"objective": "lco-mse", "temperature": 0.7, "num_iterations": 2},
    "accumulation": {
        "objective": "lco-kld", "num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
        "per_device_train_batch_size": 2,
    },
    "penalty": {
        "objective": "lco-kld", "beta": 0.1, "num_iterations": 2, "loss_type": "grpo", "use_bias_correction_kl": False,
    },
    "corrected penalty": {"objective": "lco-kld", "beta": 0.1, "num_iterations": 2},
    "lora": {"objective": "lco-kld", "num_iterations": 2, "adapter": LORA},
    "lora and head": {"objective": "lco-kld", "num_iterations": 2, "adapter": HEAD_TOO},
    "moving target": {"objective": lg.objective("lco-mse", target="current"), "num_iterations": 2},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_the_objectives(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in blocks of seven tokens, of a rollout of twelve or more."""
    monkeypatch.setattr("lcogeom.training.old_policy.CPU_BLOCK", 7 * tiny().model.config.vocab_size)
    options = dict(CASES[case])
    trainer = lco(tmp_path, 4, learning_rate=3e-3, **options)
    oracle = Oracle(trainer, options.get("adapter"))
    run(trainer)
    oracle.check()
    assert len(oracle.losses) == 4 * trainer.args.gradient_accumulation_steps
    assert (oracle.late > 0) == (not case.startswith("one update"))


def test_bf16(tmp_path: Path) -> None:
    """Under autocast: the objective on bf16 logits, to the rounding of bf16."""
    trainer = lco(tmp_path, 4, num_iterations=2, bf16=True, learning_rate=3e-3)
    oracle = Oracle(trainer)
    run(trainer)
    assert len(oracle.losses) == 4
    for found, wanted in oracle.losses:
        assert abs(found - wanted) < 0.02 * (1 + wanted.abs())
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def right(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """1 for the sum, its last digit first, and nothing else."""
    wanted = [str(sum(map(int, prompt[:-1].split("+"))))[::-1] for prompt in prompts]
    return [float(text.strip() == answer) for text, answer in zip(completions, wanted, strict=True)]


AUTHORS = {"beta": 0.5, "negative_beta_scale": 100.0}
LEARNING = [
    ("lco-kld", "rule", 6e-4, AUTHORS),
    pytest.param("lco-mse", "group", 3e-4, {"beta": 0.5}, marks=pytest.mark.slow),
    pytest.param("lco-lch", "group", 3e-4, {"beta": 0.5}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "advantages", "rate", "options"), LEARNING)
def test_it_learns(name: str, advantages: str, rate: float, options: dict[str, float], tmp_path: Path) -> None:
    """Two updates on each rollout, on four sums that `tiny` gets right half of the time."""
    trainer = lco(
        tmp_path, 50, objective=lg.objective(name, **options), advantages=advantages, reward_funcs=right,
        prompts=["37+48=", "19+26=", "54+27=", "68+15="], num_iterations=2, per_device_train_batch_size=64,
        num_generations=16, learning_rate=rate, lr_scheduler_type="constant_with_warmup", warmup_steps=5,
    )  # fmt: skip
    run(trainer)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 25
    first, last = torch.tensor(rewards[:3]).mean(), torch.tensor(rewards[-3:]).mean()
    assert last > first + 0.15


def test_the_recorder_beside_it(tmp_path: Path) -> None:
    """It records the objective that is minimised, whose gradient is the one that is seen: no misfit, all convex."""
    trainer = lco(tmp_path / "out", 4, objective="lco-kld", num_iterations=2, temperature=0.8, learning_rate=3e-3)
    trainer.add_callback(RecorderCallback(tmp_path / "run", tokens_per_update=1000))
    oracle = Oracle(trainer)
    run(trainer)
    found = lg.load_run(tmp_path / "run")
    assert found.updates["objective"].tolist() == ["lco-kld"] * 4
    known = found.tokens["logit_grad_norm"] > 1e-3  # elsewhere the advantage is 0, and rounding is all there is
    assert known.sum() > 10
    assert found.tokens["misfit"][known].max() < 1e-3
    assert found.tokens["convex"][known].all()
    assert found.updates["loss"].tolist() == pytest.approx([float(wanted) for _, wanted in oracle.losses], abs=1e-5)
    assert found.tokens["advantage"].abs().max() > 0.1


def test_the_recorder_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for recorded in (False, True):
        trainer = lco(tmp_path / f"out-{recorded}", 4, num_iterations=2, gradient_accumulation_steps=2)
        if recorded:
            trainer.add_callback(RecorderCallback(tmp_path / "run", tokens_per_update=9))
        ends.append(list(run(trainer).model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_evaluation_between_updates_on_one_rollout(tmp_path: Path) -> None:
    trainer = lco(tmp_path, 4, num_iterations=4, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    oracle = Oracle(trainer)
    twin = oracle.twin.load_state_dict
    oracle.twin.load_state_dict = lambda state: twin(state) if trainer.model.training else None  # type: ignore[assignment]
    run(trainer)
    oracle.check()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 4


def test_completions_that_were_all_cut_off(tmp_path: Path) -> None:
    trainer = lco(tmp_path, 2, num_iterations=2, max_completion_length=1, mask_truncated_completions=True)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    never = lco(tmp_path, 1).processing_class.convert_tokens_to_ids("=")
    trainer.generation_config.eos_token_id = trainer.eos_token_ids = [never]
    trainer.generation_config.suppress_tokens = [never]
    run(trainer)
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.model.parameters(), strict=True))


def test_importance_weights_of_vllm(tmp_path: Path) -> None:
    """They multiply the tokens' losses; as vLLM cannot run here, the weights are put into a real rollout's batch."""
    trainer = lco(tmp_path, 1, loss_type="bnpo")
    kept: list[Any] = []
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (kept.append(inputs), compute(model, inputs))[1]
    run(trainer)
    inputs, mask = kept[0], kept[0]["completion_mask"].bool()
    trainer.model.eval()
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = [compute(trainer.model, inputs | {"importance_sampling_ratio": w}) for w in (torch.ones(4, 1), weights)]
        logits = Oracle(trainer).logits(trainer.model, inputs, mask)
    advantages = inputs["advantages"][mask.nonzero()[:, 0]]
    batch = lg.TokenBatch(inputs["completion_ids"][mask], advantages, old_logits=logits)
    per_token = lg.objective("lco-kld").loss(logits, batch)
    torch.testing.assert_close(plain[0], per_token.mean())
    torch.testing.assert_close(plain[1], (per_token * weights[mask]).mean())


def test_rule_advantages(tmp_path: Path) -> None:
    """From the weighted sum of rewards; 0 for a completion that no function scored."""
    seen: list[Tensor] = []

    def length(completions: Sequence[str], **_: Any) -> list[float | None]:
        return [None if row == 0 else float(row % 2) for row, _ in enumerate(completions)]

    trainer = lco(tmp_path, 1, advantages="rule", reward_funcs=length, shuffle_dataset=False)
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (
        found := generate(inputs),
        seen.append(found["advantages"]),
    )[0]
    run(trainer)
    assert seen[0].tolist() == [0.0, 1.0, -1.0, 1.0]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes(tmp_path: Path) -> None:
    """DDP under TRL: each process's loss is the objective of its half, and both end with the same parameters. FSDP2:
    values and gradients of the blocks inside a sharded model's forward are those of one process."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.integrations.lco_halves", str(tmp_path)]
    running = [
        subprocess.Popen(
            command, cwd=root, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in running:
        _, said = process.communicate(timeout=180)
        assert process.returncode == 0, said[-3000:]
    ends = [load_file(tmp_path / f"ddp-{rank}.safetensors") for rank in (0, 1)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    model = build("llama-gqa-tied", torch.device("cpu"))
    values, gradients = blocks_of(model, [0, 1, 2, 3])
    halves = [load_file(tmp_path / f"fsdp2-{rank}.safetensors") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([half["values"] for half in halves]), values, rtol=1e-5, atol=1e-5)
    for half in halves:
        for place, wanted in enumerate(gradients):
            assert (half[str(place)] - wanted / 2).norm() <= 1e-5 * wanted.norm()  # FSDP2 averages over processes


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "cispo"}, "loss_type='cispo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"entropy_coef": 0.1}, "entropy_coef"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"delta": 4.0}, "delta=4.0"),
        ({"off_policy_mask_threshold": 1.0}, "off_policy_mask_threshold"),
        ({"advantages": "gae"}, "advantages: 'gae'"),
        ({"old_policy": "logits"}, "old_policy: 'logits'"),
        ({"objective": "lco"}, "no objective 'lco'"),
    ],
)
def test_settings_that_have_no_place(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        lco(tmp_path, 1, **options)


def test_another_version_of_trl() -> None:
    require_trl("1.16.0")
    require_trl("1.16.3")
    for found in ("1.17.0", "1.15.2", "1.160.0", "2.16.0"):
        with pytest.raises(ImportError, match=r"Install 'trl==1\.16"):
            require_trl(found)


def test_internals_that_have_moved() -> None:
    """A TRL that says 1.16 but is not: renamed, with other arguments."""
    require_internals(trl.GRPOTrainer)

    class Renamed:
        pass

    class Grown(trl.GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any: ...

    for kind, said in ((Renamed, "it is gone"), (Grown, "num_items_in_batch")):
        with pytest.raises(RuntimeError, match=said):
            require_internals(kind)


READ = {
    "_compute_loss": "80295546bbdbf6f7",
    "_generate_and_score_completions": "1fa48922792dcd5c",
    "_calculate_rewards": "736ae29b083840b5",
    "_prepare_inputs": "f824e7fb07147956",
    "compute_loss": "a2d6ef8bd29c3e26",
    "prediction_step": "008b555451073a5a",
}


@pytest.mark.parametrize("name", READ)
def test_trl_is_as_it_was_read(name: str) -> None:
    """Fails when the text of a method changes on which LCOTrainer relies: read what changed, then renew the digest."""
    assert version("trl").startswith("1.16.")
    digest = hashlib.sha256(inspect.getsource(getattr(trl.GRPOTrainer, name)).encode()).hexdigest()[:16]
    assert digest == READ[name], f"GRPOTrainer.{name} of TRL {version('trl')} is not the one that was read"


def test_what_is_used_of_trl_is_there(tmp_path: Path) -> None:
    trainer = lco(tmp_path, 1)
    assert set(OVERRIDDEN) < set(READ)
    reading = reading_of(trainer)
    assert reading is not None
    assert reading.objective(trainer) is trainer.minimised
    for name in ("loss_type", "temperature", "reward_weights", "_metrics", "beta", "aux_loss_enabled"):
        assert hasattr(trainer, name)


def test_importing_the_adapter_imports_no_trl() -> None:
    """RecorderCallback imports it where TRL may not be installed."""
    module = sys.modules["lcogeom.integrations.trl"]
    imported = [
        node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [getattr(node, "module", None) or node.names[0].name for node in imported]
    assert len(names) > 5
    assert not any(name.startswith(("trl", "lcogeom.integrations.trl_lco")) for name in names)
    assert module.LCOTrainer is LCOTrainer
