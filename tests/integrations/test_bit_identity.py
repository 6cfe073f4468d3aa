"""A real trainer ends with the same parameters and optimiser state, bit for bit, with the recorder and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lcogeom as lg
from lcogeom.integrations.transformers import RecorderCallback
from tests.integrations.trainers import HEAD_TOO, LORA, MAKERS, run

UPDATES = 10
pytestmark = pytest.mark.filterwarnings("error:update")  # the recorder's own
USUAL = ("SFTTrainer", "GRPOTrainer", "Trainer")  # the others differ from these in their loss alone
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
    "bf16": {"bf16": True},
    "lora": {"adapter": LORA},
    "lora and head": {"adapter": HEAD_TOO},
}


def state(trainer: transformers.Trainer) -> list[torch.Tensor]:
    inner = trainer.optimizer.optimizer
    kept = inner.state_dict()["state"]
    moments = [kept[key][name] for key in sorted(kept) for name in ("exp_avg", "exp_avg_sq")]
    return [parameter.detach() for parameter in trainer.model.parameters()] + moments


CASES = [
    pytest.param(kind, setting, marks=[] if setting == "float32" or kind in USUAL else pytest.mark.slow)
    for kind in MAKERS
    for setting in SETTINGS
]


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_ten_updates(kind: str, setting: str, tmp_path: Path) -> None:
    options = dict(SETTINGS[setting])
    if kind in ("RLOOTrainer", "GRPOTrainer") and setting == "accumulation":
        options |= {"num_generations": 2}
    without = run(MAKERS[kind](tmp_path / "without", UPDATES, **options))
    recorded = MAKERS[kind](tmp_path / "with", UPDATES, **options)
    start = [parameter.detach().clone() for parameter in recorded.model.parameters()]
    objective = "sft" if kind in ("Trainer", "SFTTrainer") else None
    recorded.add_callback(RecorderCallback(tmp_path / "run", objective=objective, tokens_per_update=9))
    run(recorded)
    assert any(not torch.equal(a, b) for a, b in zip(start, recorded.model.parameters(), strict=True))
    ends = state(without), state(recorded)
    assert len(ends[0]) > 8
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    recorded_run = lg.load_run(tmp_path / "run")
    assert len(recorded_run.updates) == UPDATES
    assert recorded_run.tokens["misfit"].notna().any()
