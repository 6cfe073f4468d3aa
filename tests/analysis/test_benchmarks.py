"""The benchmarks run, small; and what they measure errors against is right."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "analysis" / "benchmarks"


def test_logit_hessian(tmp_path: Path) -> None:
    out = tmp_path / "quick.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "logit_hessian.py"), "--quick", "--out", str(out)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert len(results["rows"]) == 3
    for row in results["rows"]:
        for method, found in row["methods"].items():
            assert min(found["seconds_per_token"]) > 0
            for end in ("lowest", "highest"):
                if method == "autograd" and (row["objective"], end) == ("sft", "lowest"):
                    assert found[end]["missing"] == found[end]["of"]  # an end at 0, which ARPACK does not find
                else:
                    # 16 rounding units for ours; ARPACK is accurate relative to the larger end only
                    assert found[end]["error"] < (4e-15 if method.startswith("ours") else 1e-10)
    assert results["memory"]["extra"] > 0
    assert str(Path.home()) not in out.read_text()


def test_hvp() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "hvp.py"), "--quick"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("| llama"))
    assert line.count("[") == 4  # a ratio with its range for each of our products


def test_sketch_error(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "sketch_error.py"), "--model", "tiny", "--out", str(out)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    error = json.loads(out.read_text())["error"]
    assert error["pairs"] >= 1000
    assert error["rms_error"] <= 0.01
    assert error["largest_error"] <= 0.035
    assert 0.4 < error["rms_error"] / error["rms_standard_error"] < 1.3  # 1,275 pairs, but few independent ones
    low, _, _, _, high = error["cosines_quantiles"]
    assert -1.00001 < low < -0.5 < 0.5 < high < 1.00001
    assert error["directions"]["SFT, PPO unclipped with A > 0"][0] > 0.9  # ratios are still near 1
    assert str(Path.home()) not in out.read_text()


def test_overhead(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "overhead.py"), "--models", "tiny", "--pairs", "2", "--out", str(out)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row in json.loads(out.read_text())["rows"]:
        assert len(row["with"]) == len(row["without"]) == 2
        assert min(row["memory"]) > 100


def test_rollout_buffer() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "rollout_buffer.py"), "--quick"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = ast.literal_eval(done.stdout.splitlines()[0])
    head = 151_936 * 64 * 4
    assert row["ours"]["counted"] == 512 * 64 * 4 + head + 4 * (16 + 128) * 5
    assert row["stored"]["counted"] == 512 * 151_936 * 4
    for how in ("stored", "ours"):  # what is counted is what the process grows by
        assert abs(row[how]["kept"] - row[how]["counted"]) < 4 * 2**20
    assert row["ours"]["peak"] < 150 * 2**20 < row["stored"]["peak"]


def test_rollout_buffer_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the number of tokens named on, and not one token earlier, the buffer is 40 times smaller."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("rollout_buffer")
    for size, logit_size, heads in ((2, 2, 1.0), (4, 4, 1.0), (2, 4, 1 / 8)):
        fewest = benchmark.fewest_tokens(size, logit_size, heads)
        assert fewest > 1
        for tokens, enough in ((fewest, True), (fewest - 1, False)):
            kept = benchmark.kept_bytes(tokens, size, heads)
            assert (benchmark.stored_bytes(tokens, logit_size) >= 40 * kept) is enough
    assert benchmark.fewest_tokens(2, 2, 0.0) == 1
