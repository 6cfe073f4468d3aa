"""Reading the stored sketches of one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lcogeom.runs.parts import DamagedPart, flushes

VECTORS = ("gradient", "step", "weights")


@dataclass(frozen=True, eq=False)
class Sketches:
    """One run's sketches, a row for each update (`lcogeom.sketch` with seed 0)."""

    updates: np.ndarray
    """(T,) int64, the column `step` of the updates table."""
    gradients: np.ndarray
    """(T, size) float32, of g_t as the optimiser received it: clipped, unscaled, accumulated."""
    steps: np.ndarray
    """(T, size) float32, of d_t = theta_t+1 - theta_t."""
    start: np.ndarray
    """(size,) float32, of the parameters before the first recorded update."""

    @property
    def weights(self) -> np.ndarray:
        """(T, size) float64, of theta_t before each update: `start` plus the steps before it."""
        moved = np.cumsum(self.steps[:-1], axis=0, dtype=np.float64)
        return self.start + np.concatenate([np.zeros((1, self.start.size)), moved])


def read_sketches(path: Path, layer: str | None) -> Sketches:
    """The sketches of a run folder's finished updates.

    Raises:
        ValueError: nothing was sketched, or not this layer, or an update before the last is missing.
    """
    parts, updates = [], []
    for flush in flushes(path, []):
        updates += flush.updates["step"].to_pylist()
        try:
            table = flush.rows("sketches")
        except DamagedPart as error:
            raise ValueError(f"run: {error}.") from None
        if table is None:
            continue
        chosen = pc.is_null(table["layer"]) if layer is None else pc.equal(table["layer"], layer)
        parts.append(table.filter(pc.fill_null(chosen, False)))
        if layer is not None and not len(parts[-1]):
            names = sorted(set(table["layer"].to_pylist()) - {None})
            raise ValueError(
                f"layer: {layer!r} has no sketches in {str(path)!r}; there are {', '.join(names) or 'none'}."
            )
    if not parts or not updates:
        raise ValueError(
            f"run: {str(path)!r} holds no sketches of finished updates. Record them with attach(..., sketch=16384)."
        )
    rows = pa.concat_tables(parts, promote_options="permissive")
    found = {vector: _vectors(rows, vector) for vector in VECTORS}
    updates.sort()
    first = updates[0] if updates[0] in found["weights"] else 0
    for update in range(first, updates[-1] + 1):  # a gap would make every sum of steps wrong
        if update not in found["gradient"] or update not in found["step"]:
            raise ValueError(
                f"run: {str(path)!r} lacks update {update} or its sketches; was a part damaged or removed?"
            )
    return Sketches(
        np.array(updates),
        np.stack([found["gradient"][update] for update in updates]),
        np.stack([found["step"][update] for update in updates]),
        found["weights"][first],
    )


def _vectors(rows: pa.Table, vector: str) -> dict[int, np.ndarray]:
    """Update -> sketch."""
    some = rows.filter(pc.equal(rows["vector"], vector))
    values = (np.frombuffer(value.as_buffer(), dtype="<f4") for value in some["values"])
    return dict(zip(some["step"].to_pylist(), values, strict=True))
