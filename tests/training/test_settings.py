"""Settings: overrides by type, clear errors, presets that all hold, and what a rollout asks of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lcogeom as lg
from lcogeom.training import PRESETS, TrainSettings, override, preset
from lcogeom.training.buffer import token_weights
from lcogeom.training.critic import value_losses
from lcogeom.training.dry_run import dry_run
from lcogeom.training.learner import build_learner, needed_fields
from lcogeom.training.trainer import exchange_groups, train
from lcogeom.training.update import rate_factor
from tests.training.runs import small


def test_overrides_are_read_by_their_fields_type() -> None:
    changed = override(
        preset("tiny-lco-kld"),
        [
            "learning_rate=1e-5",
            "samples=4",
            "record=false",
            "clip_norm=none",
            "stop=\\n",
            "adam_betas=[0.9,0.95]",
            "objective_options.beta=5",
            "objective_options.target=current",
            "intervention=bapo",
        ],
    )
    assert (changed.learning_rate, changed.samples, changed.record) == (1e-5, 4, False)
    assert (changed.clip_norm, changed.stop, changed.adam_betas) == (None, "\n", (0.9, 0.95))
    assert changed.objective_options == {"beta": 5, "target": "current"}
    assert TrainSettings.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("learning_rat=1", "no field 'learning_rat'. Did you mean 'learning_rate'?"),
        ("learning_rate", "write it as field=value"),
        ("learning_rate=fast", "learning_rate='fast'; must be a number"),
        ("samples=2.5", "samples='2.5'; must be an integer"),
        ("record=maybe", "record='maybe'; must be true or false"),
        ("model.size=3", "'model' has no options"),
        ("updates=0", "updates: 0; must be at least 1"),
        ("updates=7", "updates: 7 is no multiple of 2"),
        ("micro_batches=3", "128 completions (prompts x samples) cannot be cut into 3 equal parts"),
        ("objective=pop", "no objective 'pop'. Did you mean 'ppo'?"),
        ("objective_options.beta=-1", "beta: -1; must be"),
        ("objective_options.size=1", "has no option 'size'"),
        ("advantages=luck", "advantages: 'luck'; must be one of none, group"),
        ("advantages=q-rm", "advantage_model: None with advantages='q-rm'"),
        ("completions=gold", "advantages: 'group' with completions='gold'"),
        ("samples=1", "samples: 1; advantages='group' compare at least 2"),
        ("learning_rate=inf", "learning_rate: inf; must be a finite number > 0"),
        ("gamma=1.5", "gamma: 1.5; must be in [0, 1]"),
        ("intervention=nobody", "no intervention 'nobody'"),
        ("intervention_options.tau_h=1", "given without an intervention"),
        ("overlong_buffer=5", "overlong_buffer: 5; must be below max_new_tokens"),
        ("dtype=float16", "dtype: 'float16'; must be one of float32, bfloat16"),
    ],
)
def test_bad_settings_say_what_to_do(assignment: str, said: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        override(preset("tiny-grpo"), [assignment])
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"advantages": "none"}, "advantages: 'none', but objective 'grpo' needs some"),
        ({"objective": "dpo", "objective_options": {}}, "cannot be trained on rollouts with these advantages: pairs"),
        ({"fsdp": True}, "fsdp: there is one process"),
    ],
)
def test_learners_that_cannot_be(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_learner(small("tiny-grpo", **changes), lg.load_model("tiny", device="cpu"))


def test_needed_fields_are_found_by_asking() -> None:
    def fields(name: str, **options: object) -> set[str]:
        loss = lg.objective(name, **options)
        return set(needed_fields(lambda batch: loss.loss(torch.zeros(2, 4), batch), dense=False))

    assert fields("sft") == set()
    assert fields("grpo") == {"advantages", "old_logprobs", "ref_logprobs"}
    assert fields("grpo", beta=0.0) == {"advantages", "old_logprobs"}
    assert fields("lco-mse") == {"advantages", "old_logits"}
    assert fields("lco-mse", target="current") == {"advantages"}
    assert fields("gspo") >= {"advantages", "old_logprobs", "sequences"}
    assert fields("reverse-kl") == {"ref_logits"}


def test_weights_of_tokens() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]]).bool()
    kept = torch.tensor([True, False, True, False])

    def weights(reduction: str, kept: torch.Tensor | None = None) -> list[float]:
        found = token_weights(mask, reduction, completions=4, tokens=10, longest=5, kept=kept)
        return [round(value, 6) for value in found.tolist()]

    assert weights("token") == [0.1] * 4
    assert weights("sum") == [0.25] * 4
    assert weights("constant") == [0.05] * 4
    assert weights("sequence") == [round(1 / 12, 6)] * 3 + [0.25]
    assert weights("sequence", kept) == [0.125] * 3 + [0.25]  # lengths 2 and, of none, 1


def test_value_losses() -> None:
    values, returns, old = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
    assert value_losses(values, returns, old, None).tolist() == [0.5, 0.5]
    assert value_losses(torch.tensor([0.1]), torch.zeros(1), torch.ones(1), 0.2).tolist() == pytest.approx([0.32])
    assert value_losses(torch.tensor([0.9]), torch.ones(1), torch.zeros(1), 0.2).tolist() == pytest.approx([0.32])


def test_learning_rates() -> None:
    settings = small("tiny-sft", updates=10, warmup=0.2, schedule="linear")
    assert [rate_factor(settings, step) for step in range(10)] == [0.5, 1.0, *(left / 8 for left in range(8, 0, -1))]
    cosine = small("tiny-sft", updates=10, schedule="cosine")
    assert [round(rate_factor(cosine, step), 3) for step in (0, 5, 9)] == [1.0, 0.5, 0.024]


def test_dull_groups_are_exchanged_for_lively_ones() -> None:
    old, new = ["a", "b", "c", "d", "e", "f"], ["A", "B", "C", "D", "E", "F"]
    dull, lively = [True, True, False, False, True, True], [False, False, True, True, False, False]
    assert exchange_groups(old, dull, new, lively, 2) == ["C", "D", "c", "d", "e", "f"]  # type: ignore[arg-type]


QUICK = {
    "smollm2-sft",
    "qwen2.5-3b-math-lco-kld-authors",
    "qwen2.5-3b-math-ppo",
    "qwen2.5-3b-math-grpo",
    "capo-aggressive",
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
)
def test_every_preset_runs_dry(name: str, tmp_path: Path) -> None:
    settings = dry_run(preset(name), tmp_path / "model")
    run = lg.load_run(train(settings, tmp_path / "run"))
    assert run.updates["step"].tolist() == [0, 1]
    assert (run.updates["grad_norm"] > 0).all()
    assert run.updates["heldout_reward_after"].notna().tolist() == [False, True]
    assert (run.updates["convex_share"].notna()).all()


@pytest.mark.parametrize("advantages", ["dpo-log-ratio", "q-rm", "adpa"])
def test_dense_advantages_run_dry(advantages: str, tmp_path: Path) -> None:
    objective = {"adpa": "expected-advantage"}.get(advantages, "lco-kld")
    settings = small("tiny-grpo", objective=objective, objective_options={}, advantages=advantages, advantage_model="x")
    settings = dry_run(settings, tmp_path / "model")
    other = lg.load_model("tiny", device="cpu").model
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    other.save_pretrained(tmp_path / "other")
    lg.load_model("tiny", device="cpu").tokenizer.save_pretrained(tmp_path / "other")
    settings = override(settings, [f"advantage_model={tmp_path / 'other'}"])
    run = lg.load_run(train(settings, tmp_path / "run"))
    assert (run.updates["grad_norm"] > 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "dapo", "objective_options": {}, "dynamic_sampling": 2, "overlong_buffer": 2},
        {"advantages": "rloo", "objective": "rloo", "objective_options": {}, "reduction": "sum"},
        {"advantages": "adora", "temperature": 0.8, "objective_options": {"beta": 0.1}},
        {"intervention": "bapo", "mini_batches": 2, "inner_epochs": 1},
        {"objective": "reverse-kl", "objective_options": {}, "lora_rank": 2},
        {"objective": "gspo", "objective_options": {}, "reduction": "sum", "record": False},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_other_ways_to_train(changes: dict[str, object], tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    train(small("tiny-grpo", **changes), tmp_path / "run", progress=lambda row: rows.append(dict(row)))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["grad_norm"] >= 0 for row in rows)  # type: ignore[operator]
