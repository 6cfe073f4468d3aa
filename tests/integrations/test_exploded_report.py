"""A GRPO run of TRL's trainer explodes; its report names the update, draws its tokens, and opens in a real browser."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
import trl

import lcogeom as lg
from lcogeom.diagnosis import diagnose
from lcogeom.integrations.transformers import RecorderCallback
from lcogeom.models import load_model
from tests.diagnosis.chromium import Page, chromium
from tests.integrations.trainers import grpo, reward, run, settings

AT, UPDATES = 12, 18
needs_chromium = pytest.mark.skipif(chromium() is None, reason="no Chromium found; apt-get install chromium")
KEPT = os.environ.get("LCOGEOM_KEEP_REPORT")
"""A folder to be made, to which the run is copied."""


class OneLargeStep(transformers.TrainerCallback):
    """A learning rate `rate` in update AT."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def on_pre_optimizer_step(self, _: Any, state: Any, __: Any, *, optimizer: Any, **___: Any) -> None:
        if state.global_step == AT:
            for group in optimizer.param_groups:
                group["lr"] = self.rate


def report(trainer: transformers.Trainer, rate: float, folder: Path) -> None:
    trainer.add_callback(OneLargeStep(rate))
    trainer.add_callback(RecorderCallback(folder / "run"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "black box")
        run(trainer)
    if KEPT:
        shutil.copytree(folder / "run", Path(KEPT))
    found = diagnose(folder / "run")
    assert found.cause == "step-too-large"
    assert found.update == AT
    file = folder / "report.html"
    found.write_html(file)
    assert file.stat().st_size < 5 * 2**20
    with Page(folder / "profile") as page:
        page.open(file)
        assert page.complaints == []
        assert page.value("document.title").startswith("step-too-large")
        rows = lg.load_run(folder / "run").tokens
        count = min(8, rows[rows["step"] == AT]["sequence"].nunique())
        assert page.value(f"document.querySelectorAll('#update-{AT} .sequence').length") == count
        page.point_at(f"#update-{AT} .text .t")
        assert "advantage A" in page.value("document.getElementById('box').innerText")
        assert page.complaints == []


@needs_chromium
def test_on_tiny(tmp_path: Path) -> None:
    options = {"num_iterations": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-5}
    report(grpo(tmp_path / "out", UPDATES, **options), 0.3, tmp_path)


@needs_chromium
@pytest.mark.slow
@pytest.mark.smollm2
def test_on_smollm2(tmp_path: Path) -> None:
    loaded = load_model("smollm2", device="cpu")
    pairs = ((3, 4), (6, 5), (8, 2), (7, 7), (9, 3), (4, 6), (5, 8), (2, 9))
    prompts = [f"2 * 9 = 18\n7 * 3 = 21\n{a} * {b} =" for a, b in pairs]
    options = {"num_generations": 4, "max_completion_length": 12, "num_iterations": 2, "learning_rate": 1e-6}
    options |= {"per_device_train_batch_size": 8}
    args = trl.GRPOConfig(output_dir=str(tmp_path / "out"), max_steps=UPDATES, **settings(options))
    trainer = trl.GRPOTrainer(
        model=loaded.model,
        reward_funcs=reward,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=loaded.tokenizer,
    )
    report(trainer, 1e-3, tmp_path)
