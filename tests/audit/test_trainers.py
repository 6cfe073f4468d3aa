"""Files as TRL and verl write them: recognised, refused with the remedy, and audited once the remedy was taken."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import lcogeom as lg
from lcogeom.audit.trainers import RECIPES
from tests.audit.logged import as_lists, logged_tokens, write


def trl_table(conversational: bool) -> pd.DataFrame:
    """As GRPOTrainer.log of TRL 1.16 builds it."""
    prompts = [[{"role": "user", "content": "1+1="}]] * 3 if conversational else ["1+1="] * 3
    completions = [[{"role": "assistant", "content": str(i)}] for i in range(3)] if conversational else list("012")
    rewards = {"accuracy_reward": [0.0, 0.0, 1.0], "format_reward": [1.0, None, 1.0]}
    return pd.DataFrame(
        {"step": [7] * 3, "prompt": prompts, "completion": completions, **rewards, "advantage": [-0.7, -0.7, 1.4]}
    )


def verl_rows(**more: list) -> list[dict]:
    """As RayPPOTrainer._write_generations of verl 0.9.1 builds them."""
    columns = {
        "input": ["user\n1+1="] * 3,
        "output": ["0", "1", "2"],
        "gts": ["2"] * 3,
        "score": [0.0, 0.0, 1.0],
        "step": [10] * 3,
        "acc": [False, False, True],
        "request_id": ["a", "b", "c"],
        **more,
    }
    return [{key: values[i] for key, values in columns.items()} for i in range(3)]


@pytest.mark.parametrize("conversational", [False, True])
def test_trl_completions(conversational: bool, tmp_path: Path) -> None:
    file = tmp_path / "completions_00007.parquet"
    trl_table(conversational).to_parquet(file)
    with pytest.raises(ValueError, match=r"no log-probabilities in this file\. This is a table of TRL's log_comp") as e:
        lg.audit_file(file)
    assert "--how-to-log trl" in str(e.value)
    assert "Columns found: step, prompt, completion, accuracy_reward, format_reward, advantage." in str(e.value)


@pytest.mark.parametrize("gts", [False, True], ids=["0.5.0", "0.9.1"])
def test_verl_dump(gts: bool, tmp_path: Path) -> None:
    file = tmp_path / "10.jsonl"
    rows = [{key: row[key] for key in row if gts or key not in ("gts", "request_id")} for row in verl_rows()]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"This is a dump of verl's trainer\.rollout_data_dir") as error:
        lg.audit_file(file)
    assert "--how-to-log verl" in str(error.value)


def test_a_trl_table_with_logged_columns_is_audited(tmp_path: Path) -> None:
    table = trl_table(True).assign(per_token_logps=[[-1.0, -2.0], [-1.0], [-0.1, -0.2, -0.3]])
    table["old_per_token_logps"] = table["per_token_logps"]
    table.to_parquet(tmp_path / "completions_00007.parquet")
    report = lg.audit_file(tmp_path / "completions_00007.parquet")
    assert {name: group.tokens for name, group in report.groups.items()} == {
        "all": 6,
        "positive": 3,
        "negative": 3,
        "zero": 0,
    }


def test_verl_with_old_log_probs_only(tmp_path: Path) -> None:
    frame = as_lists(logged_tokens()[1])[:3]
    width = max(map(len, frame["logprobs"]))

    def padded(column: str) -> list[list[float]]:
        return [[*row, *[0.0] * (width - len(row))] for row in frame[column]]

    more = {
        "old_log_probs": padded("logprobs"),
        "rollout_log_probs": padded("old_logprobs"),
        "advantages": [[a] * width for a in frame["advantages"]],
        "response_mask": [[1] * len(row) + [0] * (width - len(row)) for row in frame["logprobs"]],
        "responses": padded("token_id"),
    }
    file = tmp_path / "10.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in verl_rows(**more)))
    with pytest.raises(ValueError, match=r"no column of logprobs.*pass --logprobs old_log_probs"):
        lg.audit_file(file)
    report = lg.audit_file(file, columns={"logprobs": "old_log_probs", "old_logprobs": "rollout_log_probs"})
    reference = lg.audit_file(write(frame, tmp_path / "reference.jsonl"))
    assert report.groups == reference.groups
    assert [(t.sequence, t.token_id) for t in report.worst] == [
        ("abc"[t.sequence], t.token_id) for t in reference.worst
    ]


def test_the_verl_recipe_writes_what_the_audit_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run against stand-ins for the three names of verl 0.9.1 that it touches; verl itself needs ray and a GPU."""
    frame = as_lists(logged_tokens()[1])[:2]
    nested = {
        "old_log_probs": [torch.tensor(row) for row in frame["logprobs"]],
        "advantages": [
            torch.full((len(row),), a) for row, a in zip(frame["logprobs"], frame["advantages"], strict=True)
        ],
        "response_mask": [torch.ones(len(row), dtype=torch.long) for row in frame["logprobs"]],
    }

    class Trainer:
        global_steps = 3

        def _log_rollout_data(self, *arguments: object) -> None:
            pass

    class RayTrainer:
        def _log_rollout_data(self, batch: object, infos: dict, timing: dict, folder: str) -> None:
            self.infos = infos

    modules = {name: types.ModuleType(name) for name in ("transfer_queue", "verl", "verl.trainer", "verl.trainer.ppo")}
    modules["transfer_queue"].kv_batch_get = lambda **_: nested  # type: ignore[attr-defined]
    modules["verl.trainer.ppo.v1"] = v1 = types.ModuleType("v1")
    v1.PPOTrainerSync, v1.register_trainer = Trainer, lambda name: lambda cls: cls  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    names: dict = {"RayPPOTrainer": RayTrainer}
    exec(RECIPES["verl"], names)

    batch = types.SimpleNamespace(keys=["a", "b"], partition_id="train")
    names["LoggingTrainer"]()._log_rollout_data(batch, {}, str(tmp_path))
    columns = {"logprobs": "old_log_probs", "old_logprobs": "old_log_probs"}
    report = lg.audit_file(tmp_path / "3.tokens.jsonl", columns=columns)
    assert report.groups["all"].tokens == sum(map(len, frame["logprobs"]))

    ray = names["LoggingRayTrainer"]()
    padded = {"old_log_probs": torch.zeros(2, 3), "advantages": torch.ones(2, 3), "prompts": torch.zeros(2, 9)}
    ray._log_rollout_data(types.SimpleNamespace(batch=padded), {"acc": [1, 0]}, {}, str(tmp_path))
    assert ray.infos == {"acc": [1, 0], "old_log_probs": [[0.0] * 3] * 2, "advantages": [[1.0] * 3] * 2}


def test_the_trl_recipe_logs_a_real_training_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL: pip install -e .[trl]")
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(RECIPES["trl"], names)
    model, tokenizer = lg_tiny()
    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        num_iterations=2,
        max_steps=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        log_completions=True,
    )
    trainer = names["LoggingGRPOTrainer"](
        model=model,
        reward_funcs=lambda completions, **_: [float(i % 4) for i in range(len(completions))],
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1+1=", "2+3="]}),
        processing_class=tokenizer,
    )
    trainer.train()
    report = lg.audit_file(tmp_path / "tokens-0.jsonl", worst=1000)
    assert report.rows == 16
    assert report.groups["all"].tokens + report.masked >= 16
    ratios = np.array([token.ratio for token in report.worst])
    assert (ratios == 1.0).any()  # the first iteration on a batch
    assert (ratios != 1.0).any()  # the second, after an update
    with pytest.raises(ValueError, match="TRL's log_completions"):
        lg.audit_file(next((tmp_path / "out" / "completions").glob("*.parquet")))


def lg_tiny() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    from lcogeom.models import load_model

    loaded = load_model("tiny", device="cpu")
    return loaded.model, loaded.tokenizer
