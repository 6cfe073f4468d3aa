"""What is recorded of real trainers, against autograd on the log-probabilities that TRL's own kernel computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import lcogeom as lg
from lcogeom.integrations.transformers import RecorderCallback
from lcogeom.integrations.trl import reading_of
from tests.integrations.trainers import HEAD_TOO, LORA, MAKERS, plain, run

UPDATES = 4
pytestmark = pytest.mark.filterwarnings("error:update")  # the recorder's own


@dataclass
class Witness:
    """Keeps the log-probabilities that TRL's kernel computed in every backward pass, their gradient and the labels."""

    rows: list[pd.DataFrame] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def watch(self, trainer: transformers.Trainer) -> None:
        """On the model itself and on the step: nothing that the recorder uses."""
        step = [0]

        def after(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            labels, logprobs = kwargs["labels"][:, 1:], output.log_probs
            kept = labels != -100
            first = kept.int().argmax(1)

            def arrived(gradient: torch.Tensor) -> None:
                sequence, place = kept.nonzero(as_tuple=True)
                columns = {
                    "step": [step[0]] * len(place),
                    "position": (place - first[sequence]).tolist(),
                    "token_id": labels[kept].tolist(),
                    "logprob": logprobs[kept].tolist(),
                    "d1": gradient[kept].tolist(),
                    "micro": [len(self.rows)] * len(place),
                }
                self.rows.append(pd.DataFrame(columns))

            logprobs.register_hook(arrived)

        model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        model.register_forward_hook(after, with_kwargs=True)

        class Count(transformers.TrainerCallback):
            def on_optimizer_step(self, *_: Any, **__: Any) -> None:
                step[0] += 1

        trainer.add_callback(Count())

    def table(self) -> pd.DataFrame:
        return pd.concat(self.rows, ignore_index=True)


def record(
    kind: str, tmp_path: Path, *, before: Callable[[transformers.Trainer], None] | None = None, **options: Any
) -> tuple[transformers.Trainer, Witness, lg.Run]:
    trainer = MAKERS[kind](tmp_path / "out", UPDATES, **options)
    witness = Witness()
    witness.watch(trainer)
    if before is not None:
        before(trainer)
    trainer.add_callback(RecorderCallback(tmp_path / "run", tokens_per_update=1000))
    run(trainer)
    return trainer, witness, lg.load_run(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:RecorderCallback. `convex`")
@pytest.mark.parametrize("setting", ["float32", pytest.param("lora", marks=pytest.mark.slow), "lora and head"])
@pytest.mark.parametrize("kind", ["SFTTrainer", "DPOTrainer", "RLOOTrainer", "GRPOTrainer"])
def test_tokens_of_trl(kind: str, setting: str, tmp_path: Path) -> None:
    adapter = {"float32": None, "lora": LORA, "lora and head": HEAD_TOO}[setting]
    _, witness, found = record(kind, tmp_path, adapter=adapter)
    expected, tokens = witness.table(), found.tokens
    for column in ("step", "position", "token_id"):
        assert tokens[column].tolist() == expected[column].tolist(), column
    np.testing.assert_allclose(tokens["logprob"], expected["logprob"], atol=2e-5)
    # f' is recovered from hidden gradients in float32, whose rounding weighs more where u = e_a - p is small.
    sure = tokens["prob"] < 0.999
    assert sure.sum() > 10
    np.testing.assert_allclose(tokens["d1"][sure], expected["d1"][sure], rtol=2e-3, atol=1e-7)
    assert found.updates["loss"].notna().all()


def test_grpo_says_advantages_and_ratios(tmp_path: Path) -> None:
    """Three inner updates on the same completions: ratios move away from 1, the clip acts, convexity follows."""
    seen: list[dict[str, torch.Tensor]] = []

    def listen(trainer: transformers.Trainer) -> None:
        original = trainer._compute_loss

        def keep(model: Any, inputs: Any) -> Any:
            seen.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
            return original(model, inputs)

        trainer._compute_loss = keep

    options = {"num_iterations": 3, "learning_rate": 3e-3, "loss_type": "dr_grpo", "epsilon_high": 0.28, "beta": 0.05}
    _, witness, found = record("GRPOTrainer", tmp_path, before=listen, **options)
    tokens = found.tokens
    flat = {
        name: torch.cat([value[name][value["completion_mask"].bool()] for value in seen]).numpy()
        for name in ("completion_ids", "old_per_token_logps")
    }
    wide = [value["advantages"][:, None].expand_as(value["completion_mask"]) for value in seen]
    pairs = zip(wide, seen, strict=True)
    advantages = torch.cat([a[value["completion_mask"].bool()] for a, value in pairs]).numpy()
    assert tokens["token_id"].tolist() == flat["completion_ids"].tolist()
    np.testing.assert_allclose(tokens["advantage"], advantages, rtol=1e-6)
    np.testing.assert_allclose(tokens["old_logprob"], flat["old_per_token_logps"], rtol=1e-6)
    ratio = np.exp(witness.table()["logprob"] - flat["old_per_token_logps"])
    np.testing.assert_allclose(tokens["ratio"], ratio, rtol=1e-4)
    assert found.updates["objective"].unique().tolist() == ["dr-grpo + 0.05 * r k3"]
    moved = (tokens["ratio"] - 1).abs().groupby(tokens["step"]).max()
    assert moved[0] < 1e-4
    assert moved[1] > 0.05
    assert tokens["convex"].notna().all()
    assert tokens["convex"].nunique() == 2
    assert tokens["text"].notna().all()


def test_first_iteration_has_ratio_one(tmp_path: Path) -> None:
    """TRL keeps no old log-probabilities where they are the current ones."""
    _, _, found = record("GRPOTrainer", tmp_path)
    np.testing.assert_allclose(found.tokens["ratio"], 1.0, atol=1e-4)


def test_plain_trainer(tmp_path: Path) -> None:
    """Against the gradient at the logits, which the plain Trainer builds."""
    trainer = plain(tmp_path / "out", UPDATES)
    norms: list[float] = []

    def after(_: object, __: object, output: Any) -> None:
        def arrived(gradient: torch.Tensor) -> None:
            rows = gradient.norm(dim=-1)
            norms.extend(rows[rows > 0].tolist())

        output.logits.register_hook(arrived)

    trainer.model.register_forward_hook(after)
    trainer.add_callback(RecorderCallback(tmp_path / "run", tokens_per_update=1000))
    run(trainer)
    tokens = lg.load_run(tmp_path / "run").tokens
    np.testing.assert_allclose(tokens["logit_grad_norm"], norms, rtol=2e-3, atol=1e-6)
    per_update = tokens.groupby("step")["d1"].transform("size")
    sure = tokens["prob"] < 0.999
    np.testing.assert_allclose(tokens["d1"][sure], -1 / per_update[sure], rtol=2e-3)
    assert tokens["convex"].all()
    assert (tokens["position"] == 0).sum() == 4 * UPDATES


LOSSES: list[dict[str, Any]] = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo", "beta": 0.1, "use_bias_correction_kl": False},
    {"loss_type": "grpo", "beta": 0.1},
    {"loss_type": "dr_grpo", "epsilon": 0.1, "epsilon_high": 0.3},
    {"loss_type": "dapo", "epsilon_high": 0.28},
    {"loss_type": "dapo", "epsilon": 0.1, "delta": 1.5},
    {"loss_type": "cispo", "epsilon_high": 1.2},
    {"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.1},
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_the_objective_is_what_the_trainer_minimises(options: dict[str, Any], tmp_path: Path) -> None:
    """f' and f'' of the objective at random points are those of TRL's own _compute_loss, by autograd."""
    trainer = MAKERS["GRPOTrainer"](tmp_path / "out", UPDATES, **options)
    reading = reading_of(trainer)
    assert reading is not None
    objective = reading.objective(trainer)
    assert isinstance(objective, lg.ActionObjective)
    rng = torch.Generator().manual_seed(0)
    shape = (6, 8)
    logps = (-2 * torch.rand(shape, generator=rng)).requires_grad_()
    inputs = {
        "prompt_ids": torch.zeros(6, 3, dtype=torch.long),
        "prompt_mask": torch.ones(6, 3, dtype=torch.long),
        "completion_ids": torch.zeros(shape, dtype=torch.long),
        "completion_mask": torch.ones(shape, dtype=torch.long),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 1.5]),
        "old_per_token_logps": logps.detach() + 0.8 * torch.randn(shape, generator=rng),
        "ref_per_token_logps": logps.detach() + 0.8 * torch.randn(shape, generator=rng),
        "num_items_in_batch": torch.tensor(48.0),
    }
    trainer.current_gradient_accumulation_steps = 1
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros(shape), None)
    (slope,) = torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), logps, create_graph=True)
    bend = torch.zeros(shape)
    if slope.requires_grad:
        (bend,) = torch.autograd.grad(slope.sum(), logps)
    batch = lg.TokenBatch(
        inputs["completion_ids"].flatten(),
        inputs["advantages"][:, None].expand(shape).flatten(),
        inputs["old_per_token_logps"].flatten(),
        inputs["ref_per_token_logps"].flatten(),
    )
    _, d1, d2 = objective.derivatives(logps.detach().flatten(), batch)
    scale = float((slope.detach().flatten() * d1).sum() / d1.square().sum())  # TRL's averaging
    assert scale > 0
    np.testing.assert_allclose(slope.detach().flatten(), scale * d1, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(bend.flatten(), scale * d2, rtol=1e-4, atol=1e-7)
    ratio = (logps.detach() - inputs["old_per_token_logps"]).exp()
    assert (ratio < 0.8).sum() > 3 < (ratio > 1.5).sum()  # on both sides of every clip


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("GRPOTrainer", {"importance_sampling_level": "sequence"}, "couples the tokens"),
        ("GRPOTrainer", {"loss_type": "sapo"}, "sapo"),
        ("GRPOTrainer", {"loss_type": "cispo"}, "epsilon_high=0.2 below 1"),
        ("GRPOTrainer", {"top_entropy_quantile": 0.5}, "leaves tokens out"),
        ("GRPOTrainer", {"entropy_coef": 0.01}, "entropy bonus"),
        ("GRPOTrainer", {"delta": 1.1}, "delta=1.1"),
        ("RLOOTrainer", {}, "couples its tokens"),
        ("DPOTrainer", {}, "couples the tokens of a pair"),
        ("SFTTrainer", {"loss_type": "dft"}, "dft"),
        ("Trainer", {"label_smoothing_factor": 0.1}, "label smoothing"),
    ],
)
def test_a_loss_that_no_objective_is(kind: str, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    trainer = MAKERS[kind](tmp_path / "out", 1, **options)
    trainer.add_callback(RecorderCallback(tmp_path / "run"))
    with pytest.warns(UserWarning, match=f"convex.*{reason}"):
        run(trainer)
    found = lg.load_run(tmp_path / "run")
    assert found.updates["objective"].isna().all()
    assert found.tokens["convex"].isna().all()


@pytest.mark.filterwarnings("ignore:RecorderCallback. `convex`")
@pytest.mark.parametrize(
    ("kind", "options", "divisor"),
    [
        ("SFTTrainer", {}, 1),  # divided by the tokens of the whole update: that is its own average
        ("DPOTrainer", {}, 4),  # the Trainer divides what compute_loss returns
        ("RLOOTrainer", {"num_generations": 2}, 4),
        ("GRPOTrainer", {"num_generations": 2, "loss_type": "dapo"}, 1),
        ("GRPOTrainer", {"num_generations": 2, "loss_type": "grpo"}, 4),  # compute_loss divides
    ],
)
def test_accumulation_is_taken_out(kind: str, options: dict[str, Any], divisor: int, tmp_path: Path) -> None:
    """d1 is f' of the trainer's loss before it was divided by the number of backward passes."""
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "max_grad_norm": 0.5, **options}
    trainer, witness, found = record(kind, tmp_path, **options)
    expected, tokens = witness.table(), found.tokens
    assert expected["micro"].nunique() == 4 * UPDATES
    assert tokens["token_id"].tolist() == expected["token_id"].tolist()
    sure = tokens["prob"] < 0.99
    assert (expected["d1"][sure] != 0).any()
    np.testing.assert_allclose(tokens["d1"][sure], divisor * expected["d1"][sure], rtol=5e-3, atol=1e-6)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    np.testing.assert_allclose(found.updates["loss"], [row["loss"] for row in logged], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.updates["grad_norm"], [row["grad_norm"] for row in logged], rtol=1e-3)
    assert (found.updates["grad_norm_clipped"] < 0.501).all()


@pytest.mark.parametrize("divides", [False, True])
def test_accumulation_in_the_plain_trainer(divides: bool, tmp_path: Path) -> None:
    """Both of its paths: the model divides by the tokens of the update, or the Trainer by the backward passes."""
    trainer = plain(tmp_path / "out", 2, gradient_accumulation_steps=4, per_device_train_batch_size=2)
    if divides:
        trainer.model_accepts_loss_kwargs = False
    trainer.add_callback(RecorderCallback(tmp_path / "run", tokens_per_update=1000))
    run(trainer)
    found = lg.load_run(tmp_path / "run")
    tokens = found.tokens
    assert found.updates["tokens"].tolist() == [18, 18]
    averaged = tokens.groupby(["step", tokens["sequence"] // 2] if divides else "step")["d1"].transform("size")
    sure = tokens["prob"] < 0.99
    np.testing.assert_allclose(tokens["d1"][sure], -1 / averaged[sure], rtol=2e-3)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    np.testing.assert_allclose(found.updates["loss"], [row["loss"] for row in logged], rtol=1e-4)
    np.testing.assert_allclose(found.updates["grad_norm"], [row["grad_norm"] for row in logged], rtol=1e-3)


@pytest.mark.parametrize("kind", ["GRPOTrainer", "RLOOTrainer"])
@pytest.mark.filterwarnings("ignore:RecorderCallback. `convex`")
def test_temperature_is_the_trainers(kind: str, tmp_path: Path) -> None:
    _, witness, found = record(kind, tmp_path, temperature=0.7)
    np.testing.assert_allclose(found.tokens["logprob"], witness.table()["logprob"], atol=2e-5)
    sure = found.tokens["prob"] < 0.99
    np.testing.assert_allclose(found.tokens["d1"][sure], witness.table()["d1"][sure], rtol=2e-3, atol=1e-7)
