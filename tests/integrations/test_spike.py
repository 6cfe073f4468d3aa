"""A spike put into a GRPO run is found again in the run folder: the update, the tokens it threw furthest, the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers
import trl

import lcogeom as lg
from lcogeom.integrations.transformers import RecorderCallback
from lcogeom.models import load_model
from tests.integrations.trainers import grpo, reward, run, settings

SPIKE = 6
UPDATES = 8


class OneLargeStep(transformers.TrainerCallback):
    """A learning rate of 1 in one update."""

    def on_pre_optimizer_step(self, _: Any, state: Any, __: Any, *, optimizer: Any, **___: Any) -> None:
        if state.global_step == SPIKE:
            for group in optimizer.param_groups:
                group["lr"] = 1.0


def find_the_spike(trainer: transformers.Trainer, name: str, folder: Path) -> None:
    trainer.add_callback(OneLargeStep())
    trainer.add_callback(RecorderCallback(folder, black_box_weights=True))
    with pytest.warns(UserWarning, match=f"black box: update {SPIKE}: the norm of the step"):
        run(trainer)
    found = lg.load_run(folder)
    updates, tokens = found.updates, found.tokens
    assert updates["update_norm"].idxmax() == SPIKE
    assert updates["update_norm"][SPIKE] > 30 * updates["update_norm"].drop(SPIKE).median()
    # The next update sees the same completions, which the wrecked policy no longer writes.
    thrown = np.log(tokens["ratio"]).abs()
    furthest = tokens.loc[thrown.idxmax()]
    assert furthest["step"] == SPIKE + 1
    assert thrown[tokens["step"] == SPIKE + 1].median() > 5 * thrown[tokens["step"] <= SPIKE].max()
    assert furthest["text"] == trainer.processing_class.decode([furthest["token_id"]])
    before, again = (tokens[tokens["step"] == step] for step in (SPIKE, SPIKE + 1))
    assert again["text"].tolist() == before["text"].tolist()

    entry = found.black_box()[0]
    assert entry.step == SPIKE
    model = load_model(name, device="cpu").model
    entry.load_weights(model)
    replayed = lg.replay_batch(entry.batches[-1], model)
    assert replayed.loss == pytest.approx(updates["loss"][SPIKE], rel=1e-4, abs=1e-6)  # near 0: all of one length
    assert replayed.tokens["token_id"].tolist() == before["token_id"].tolist()
    np.testing.assert_allclose(replayed.tokens["logprob"], before["logprob"], atol=1e-4)


def test_on_tiny(tmp_path: Path) -> None:
    options = {"num_iterations": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-4}
    find_the_spike(grpo(tmp_path / "out", UPDATES, **options), "tiny", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.smollm2
def test_on_smollm2(tmp_path: Path) -> None:
    loaded = load_model("smollm2", device="cpu")
    prompts = [f"2 * 9 = 18\n7 * 3 = 21\n{a} * {b} =" for a, b in ((3, 4), (6, 5), (8, 2), (7, 7))]
    options = {"num_generations": 4, "max_completion_length": 5, "num_iterations": 2, "learning_rate": 1e-6}
    args = trl.GRPOConfig(output_dir=str(tmp_path / "out"), max_steps=UPDATES, **settings(options))
    trainer = trl.GRPOTrainer(
        model=loaded.model,
        reward_funcs=reward,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=loaded.tokenizer,
    )
    find_the_spike(trainer, "smollm2", tmp_path / "run")
