"""Two processes record what one process records of the same batch: DistributedDataParallel and FSDP2, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lcogeom as lg
from tests.recording import two_processes as half

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

KEYS = ["step", "token_id", "position", "advantage", "logprob"]


def in_two_processes(folder: Path, cases: list[str]) -> None:
    for case in cases:
        (folder / case).mkdir()
    command = [sys.executable, "-m", "tests.recording.two_processes", str(folder), *cases]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, cwd=root, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for process in running:
        _, said = process.communicate(timeout=180)
        assert process.returncode == 0, said[-3000:]


CASES = [
    "ddp_llama_auto_accumulate",
    "fsdp2_gpt-neox_hidden_accumulate",  # query, key and value interleaved in one sharded matrix
]
SLOW = [
    "ddp_gpt2_hidden_once",
    "fsdp2_llama_auto_once",
    "fsdp2_gpt2_hidden_once",
    "fsdp2_llama-gqa-tied_hidden_once",
]


@pytest.fixture(scope="module")
def default_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All in one pair of processes, whose imports take longer than the cases."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(folder, CASES)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_record_what_one_does(case: str, default_cases: Path) -> None:
    compare(case, default_cases / case)


@pytest.mark.slow
def test_other_models_and_taps(tmp_path: Path) -> None:
    in_two_processes(tmp_path, SLOW)
    for case in SLOW:
        compare(case, tmp_path / case)


def compare(case: str, tmp_path: Path) -> None:
    _, name, tap, backwards = case.split("_")
    model, tasks = half.model_and_tasks(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with lg.attach(model, optimizer, tmp_path / "one", **half.options(tap)) as probe:
        half.updates(model, optimizer, tasks if backwards == "accumulate" else tasks[:1], probe)
    two, one = lg.load_run(tmp_path / "run"), lg.load_run(tmp_path / "one")

    assert [(tmp_path / f"identical-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
    assert two.updates["tokens"].tolist() == one.updates["tokens"].tolist()
    for column in ("loss", "grad_norm", "grad_norm_clipped", "qkv_mean_frobenius", "update_norm", "step_grad_cos"):
        np.testing.assert_allclose(two.updates[column], one.updates[column], rtol=2e-3, err_msg=column)
    for column in ("logprob", "entropy", "logit_grad_norm", "ratio_max", "convex_share", "logit_grad_norm_negative"):
        np.testing.assert_allclose(two.updates[column], one.updates[column], rtol=2e-3, err_msg=column)
    np.testing.assert_allclose(two.updates["grad_cos_prev"][1:], one.updates["grad_cos_prev"][1:], atol=1e-3)

    norms = [run.norms.sort_values(["step", "scope", "name"]) for run in (two, one)]
    assert norms[0]["name"].tolist() == norms[1]["name"].tolist()
    for column in ("grad_norm", "update_norm"):
        np.testing.assert_allclose(norms[0][column], norms[1][column], rtol=2e-3, err_msg=column)

    tokens = [run.tokens.sort_values(KEYS).reset_index() for run in (two, one)]
    assert len(tokens[0]) == two.updates["tokens"].sum()
    for column in ("step", "token_id", "position", "weight", "convex", "negative_count"):
        assert tokens[0][column].tolist() == tokens[1][column].tolist(), column
    for column in ("advantage", "logprob", "old_logprob", "ratio", "entropy", "sum_sq_prob", "logit_grad_norm", "d1"):
        np.testing.assert_allclose(tokens[0][column], tokens[1][column], rtol=2e-3, atol=1e-6, err_msg=column)
    sizes = tokens[0].groupby(["step", "sequence"]).size()
    assert sizes.groupby("step").size().tolist() == [8 if backwards == "accumulate" else 4] * half.UPDATES

    sketches = [run.sketches() for run in (two, one)]
    for vector in ("gradients", "steps", "weights"):
        a, b = (np.asarray(getattr(found, vector)) for found in sketches)
        assert np.linalg.norm(a - b) < 2e-3 * np.linalg.norm(b), vector

    if backwards == "accumulate":
        assert "FileExistsError: run:" in (tmp_path / "taken-0").read_text()
        assert "RuntimeError: run: process 0 could not" in (tmp_path / "taken-1").read_text()
        broken = lg.load_run(tmp_path / "broken")
        assert broken.updates["step"].tolist() == list(range(half.UPDATES))
        seen = broken.tokens.groupby("step").size().tolist()
        assert seen[:2] == one.updates["tokens"].tolist()[:2]
        assert 0 < seen[2] < seen[1]  # what process 0 had seen since the last flush
        asked, poisoned = lg.load_run(tmp_path / "boxed").black_box()
        assert asked.reason == "asked"
        assert asked.batches[-1].tensors()["input.input_ids"].tolist() == tasks[1].input_ids[:2].tolist()  # process 0's
        assert poisoned.step == half.UPDATES
        assert poisoned.first_non_finite.what == "gradient"  # its own loss is finite: the other's was not
        assert "did not run again" in poisoned.note
