"""A spike put into a GRPO run is found again in the run folder: the update, and the tokens it threw furthest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transformers

import lcogeom as lg
from lcogeom.integrations.transformers import RecorderCallback
from tests.integrations.trainers import grpo, run

SPIKE = 6
UPDATES = 10


class OneLargeStep(transformers.TrainerCallback):
    """A learning rate of 1 in one update."""

    def on_pre_optimizer_step(self, _: Any, state: Any, __: Any, *, optimizer: Any, **___: Any) -> None:
        if state.global_step == SPIKE:
            for group in optimizer.param_groups:
                group["lr"] = 1.0


def test_the_spike_is_found_with_its_tokens(tmp_path: Path) -> None:
    options = {"num_iterations": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-4}
    trainer = grpo(tmp_path / "out", UPDATES, **options)
    trainer.add_callback(OneLargeStep())
    trainer.add_callback(RecorderCallback(tmp_path / "run"))
    run(trainer)
    found = lg.load_run(tmp_path / "run")
    updates, tokens = found.updates, found.tokens
    assert updates["update_norm"].idxmax() == SPIKE
    assert updates["update_norm"][SPIKE] > 30 * updates["update_norm"].drop(SPIKE).median()
    # The next update sees the same completions, which the wrecked policy no longer writes.
    thrown = np.log(tokens["ratio"]).abs()
    furthest = tokens.loc[thrown.idxmax()]
    assert furthest["step"] == SPIKE + 1
    assert thrown[tokens["step"] == SPIKE + 1].median() > 5 * thrown[tokens["step"] <= SPIKE].max()
    assert furthest["text"] == trainer.processing_class.decode([furthest["token_id"]])
    before = tokens[tokens["step"] == SPIKE]
    again = tokens[tokens["step"] == SPIKE + 1]
    assert again["text"].tolist() == before["text"].tolist()
