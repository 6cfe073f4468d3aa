"""Observe, never disturb: the same parameters and optimiser state, bit for bit, with and without the recorder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lcogeom as lg
from lcogeom.models import load_model
from lcogeom.training.replay import DEFAULT_OBJECTIVES, ReplaySettings, make_batch, one_update, variant_objective

UPDATES = 10


@pytest.mark.parametrize("tap", ["hidden", "logits"])
@pytest.mark.parametrize("variant", DEFAULT_OBJECTIVES)
def test_ten_replay_updates(variant: str, tap: str, tmp_path: Path, device: torch.device) -> None:
    minimised, advantage = variant_objective(variant)
    ends = []
    for recorded in (False, True):
        loaded = load_model("tiny", device=device)
        batch = make_batch(loaded, ReplaySettings(sequences=6), 0, lambda *_: None)
        optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-3)
        random_state = torch.random.get_rng_state()
        if recorded:
            with lg.attach(
                loaded.model,
                optimizer,
                run=tmp_path / "run",
                objective=minimised,
                tap=tap,
                tokens_per_update=9,
                audit_every=4,
            ) as probe:
                for _ in range(UPDATES):
                    one_update(loaded.model, optimizer, minimised, batch, advantage=advantage, probe=probe)
        else:
            for _ in range(UPDATES):
                one_update(loaded.model, optimizer, minimised, batch, advantage=advantage)
        assert torch.equal(random_state, torch.random.get_rng_state())
        state = optimizer.state_dict()["state"]
        moments = [state[key][name] for key in sorted(state) for name in ("exp_avg", "exp_avg_sq")]
        ends.append([p.detach().clone() for p in loaded.model.parameters()] + moments)
    start = list(load_model("tiny", device=device).model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(start, ends[0], strict=False))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    updates = lg.load_run(tmp_path / "run").updates
    assert len(updates) == UPDATES
    assert updates["audit_actual"].notna().tolist() == [step % 4 == 0 for step in range(UPDATES)]
