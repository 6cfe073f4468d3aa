"""A run that ends in an exception says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lcogeom as lg
from tests.small_models import build, loss_of, make_task, tell


def test_what_training_raised_is_in_the_folder(tmp_path: Path, device: torch.device) -> None:
    """Old log-probabilities that are NaN stop the loop in batch(), before there is a row of that update."""
    model = build("llama", device)
    task, objective = make_task(model), lg.objective("ppo")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def loop() -> None:
        with lg.attach(model, optimizer, run=tmp_path / "run", objective=objective) as probe:
            for update in range(4):
                if update == 3:
                    task.old_logprobs[task.mask] = torch.nan
                tell(probe, task)
                optimizer.zero_grad()
                loss_of(model, task, objective).backward()
                optimizer.step()

    with pytest.raises(ValueError, match="old_logprobs: NaN"):
        loop()
    run = lg.load_run(tmp_path / "run")
    assert len(run.updates) == 3
    [event] = run.events()
    assert event["step"] == 3
    assert str(event["reason"]).startswith("training raised ValueError: old_logprobs: NaN")
    finding = next(one for one in lg.diagnose(run).findings if one.cause == "non-finite")
    assert finding.update == 3
    assert "old_logprobs" in finding.sentence
