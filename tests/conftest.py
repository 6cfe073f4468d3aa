"""Offline, on the GPU when there is one; one small replay is recorded once and read by many tests."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest
import torch

from lcogeom.training import ReplaySettings, replay


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Accelerate keeps the precision of a process's first Accelerator for all others: bf16 of one test for the next."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def tiny_replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every default objective, two seeds, 12 updates on `tiny`, every fourth of them audited."""
    settings = ReplaySettings(model="tiny", sequences=8, updates=12, seeds=2, audit_every=4)
    return replay(settings, tmp_path_factory.mktemp("replay") / "tiny")
