"""Columns that the training loop fills: of the update under way, and of the one just made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lcogeom as lg
from tests.small_models import build, make_task


def test_notes_reach_the_rows_of_their_updates(tmp_path: Path) -> None:
    model = build("llama", torch.device("cpu"))
    task = make_task(model, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lg.attach(model, optimizer, tmp_path / "run", flush_every=None) as probe:
        for update in range(3):
            if update != 1:
                probe.note({"reward": 0.25 * update})
            model(input_ids=task.input_ids, labels=task.input_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if update == 1:
                assert lg.load_run(tmp_path / "run").updates.empty  # nothing is written before it is asked for
                probe.flush()
        probe.note({"heldout_reward_after": 0.5}, done=True)
        with pytest.raises(ValueError, match="no column 'score'; there are reward"):
            probe.note({"score": 1.0})
    updates = lg.load_run(tmp_path / "run").updates
    assert updates["reward"].fillna(-1).tolist() == [0.0, -1, 0.5]
    assert updates["heldout_reward_after"].fillna(-1).tolist() == [-1, -1, 0.5]


def test_a_row_that_was_written_takes_no_notes(tmp_path: Path) -> None:
    model = build("llama", torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        lg.attach(model, optimizer, tmp_path / "run") as probe,
        pytest.raises(ValueError, match="no update waits to be flushed"),
    ):
        probe.note({"heldout_reward_after": 0.5}, done=True)
