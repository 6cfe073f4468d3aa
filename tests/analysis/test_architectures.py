"""The study of architectures runs on a few types and says of each what holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd

SCRIPT = Path(__file__).parent.parent.parent / "analysis" / "architectures.py"


def test_a_few_types(tmp_path: Path) -> None:
    out = tmp_path / "few.csv"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--types", "llama", "mamba", "musicgen", "gemma4_assistant", "--out", str(out)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(out).set_index("type")
    assert table["status"].to_dict() == {
        "llama": "attached", "mamba": "attached", "musicgen": "attached", "gemma4_assistant": "not built"
    }  # fmt: skip
    assert table["taps"][["llama", "musicgen"]].tolist() == ["auto hidden logits", "auto logits"]
    assert table["qkv_recognised"][["llama", "mamba"]].astype(str).tolist() == ["True", "False"]
    assert table["d1_error"].max() < 1e-5
    assert "Use tap='logits'" in table["error"]["musicgen"]
    assert "**3 of 3 types that were built are attached**" in done.stdout


def test_an_unknown_type(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--types", "lama"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert "lama: not in transformers' causal-LM mapping" in done.stderr
