"""Plain logs: what a trainer wrote down, read as far as it goes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lcogeom as lg

ROWS = 30


def history(**changed: object) -> list[dict[str, object]]:
    """TRL's log_history, one row an update from 1 on; evaluations between, a summary at the end."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for step in range(1, ROWS + 1):
        rows.append(
            {
                "loss": 0.01 * rng.normal(),
                "grad_norm": 2 * np.exp(0.2 * rng.normal()),
                "learning_rate": 1e-6 * min(1, step / 4),
                "reward": 0.5,
                "frac_reward_zero_std": 0.2,
                "entropy": 0.5 + 0.02 * rng.normal(),
                "clip_ratio/region_mean": 0.02,
                "step": step,
            }
        )
        if step % 10 == 0:
            rows.append({"eval_loss": float("nan"), "eval_reward": 0.4, "step": step})
    rows.append({"train_runtime": 3.0, "train_loss": 0.1, "step": ROWS})
    for row in rows:
        for name, change in changed.items():
            if name in row:
                row[name] = change(row["step"], row[name])  # type: ignore[operator]
    return rows


def from_20(value: float):
    return lambda step, before: value if step >= 20 else before


CASES = {
    "non-finite": {"grad_norm": from_20(float("nan"))},
    "no-signal": {"frac_reward_zero_std": from_20(1.0)},
    "step-too-large": {"learning_rate": from_20(1e-4), "grad_norm": lambda step, g: g * (30 if step > 20 else 1)},
    "entropy-collapse": {"entropy": from_20(0.05)},
    "clip-saturation": {"clip_ratio/region_mean": from_20(0.8)},
    "healthy": {},
}


@pytest.mark.parametrize("cause", CASES)
def test_trl(cause: str, tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(json.dumps(history(**CASES[cause])))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": 1, "log_history": history(**CASES[cause])}))
    reports = [lg.diagnose(tmp_path / name) for name in ("log.json", "trainer_state.json")]
    for report in reports:
        assert report.cause == cause
        assert report.updates == ROWS
        assert report.update is None or abs(report.update - 20) <= 1 + 3 * (cause == "entropy-collapse")
        assert {one.cause for one in report.missing} >= {"advantage-outlier", "layer-amplification", "unmasked-tokens"}
        assert all(one.table == "log" for finding in report.findings for one in finding.evidence)


def test_verl_and_wandb(tmp_path: Path) -> None:
    rows = pd.DataFrame(row for row in history(**CASES["no-signal"], **CASES["clip-saturation"]) if "loss" in row)
    verl = rows.rename(
        columns={
            "loss": "actor/pg_loss",
            "grad_norm": "actor/grad_norm",
            "learning_rate": "actor/lr",
            "clip_ratio/region_mean": "actor/pg_clipfrac",
        }
    )
    verl.to_csv(tmp_path / "verl.csv", index=False)
    assert lg.diagnose(tmp_path / "verl.csv").cause == "no-signal"
    panel = rows[["step", "grad_norm"]].rename(columns={"step": "Step", "grad_norm": "my run - train/grad_norm"})
    panel["my run - train/grad_norm__MAX"] = 1.0
    panel = panel.astype(object)
    panel.loc[panel["Step"] == 12, "my run - train/grad_norm"] = "NaN"  # spelt out, as W&B does
    panel.loc[panel["Step"] == 5, "my run - train/grad_norm"] = ""  # logged elsewhere
    panel.rename(columns={"Step": "_step"}).to_csv(tmp_path / "panel.csv", index=False)
    report = lg.diagnose(tmp_path / "panel.csv")
    assert (report.cause, report.update) == ("non-finite", 12)
    lines = [json.dumps({"step": row["step"], "data": {"actor/grad_norm": row["grad_norm"]}}) for row in history()[:9]]
    (tmp_path / "verl.jsonl").write_text("\n".join(lines))
    assert lg.diagnose(tmp_path / "verl.jsonl").updates == 9


def test_a_spike_without_a_reason_is_a_note_and_no_finding(tmp_path: Path) -> None:
    rows = history(grad_norm=lambda step, g: 100 * g if step == 15 else g)
    (tmp_path / "log.json").write_text(json.dumps(rows))
    report = lg.diagnose(tmp_path / "log.json")
    assert report.findings == ()
    assert any("update 15" in note and "nothing that was recorded says why" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.csv", "", "empty"),
        ("other.csv", "a,b\n1,2\n", "no column that is known"),
        ("text.json", "hello", "not JSON"),
        ("number.json", "3", "no list of rows"),
        ("dict.json", '{"a": 1}', "no list of rows"),
        ("nothing.json", '{"log_history": []}', "no list of rows"),
        ("binary.csv", "\x00\x01\x02", "run: "),
    ],
)
def test_what_is_no_log_is_refused(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        lg.diagnose(tmp_path / name)
