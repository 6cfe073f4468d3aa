"""Run folders to be read, damaged and written on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import lcogeom as lg
from lcogeom.runs import RunWriter


def write(path: Path, steps: int, per_part: int = 2, labels: dict | None = None) -> Path:
    """`steps` updates of three tokens and two norms each."""
    writer = RunWriter(path, {"labels": labels or {}})
    add(writer, range(steps), per_part)
    writer.close()
    return path


def add(writer: RunWriter, steps: range, per_part: int = 2, loss: float = 0.0) -> None:
    """Update t has the loss t + `loss` and took 2 t + 2 s."""
    for step in steps:
        writer.add("tokens", {"step": [step] * 3, "token_id": np.array([1.0, 2.0, np.nan]), "prob": [0.1, None, 0.3]})
        writer.add("norms", {"step": [step] * 2, "name": ["a", "b"], "grad_norm": [1.0, 2.0]})
        writer.add("sketches", {"step": [step], "vector": ["gradient"], "values": [b"\0" * 40]})
        writer.add("updates", {"step": [step], "loss": [step + loss], "seconds": [2.0 * step + 2]})
        if step % per_part == per_part - 1:
            writer.flush()
    writer.flush()
    writer.flush()  # nothing pending: no empty part


def part_file(run: lg.Run | Path, table: str, number: int) -> Path:
    """The part of one flush."""
    path = run.path if isinstance(run, lg.Run) else run
    [found] = (path / table).glob(f"part-{number:06d}.*parquet")
    return found
