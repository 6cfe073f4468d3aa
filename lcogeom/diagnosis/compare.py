"""Two runs side by side: what was usual in each, how they pointed, and the first update at which they part."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lcogeom.diagnosis.comparison import BOUNDED, Compared, Comparison, Directions, Layer
from lcogeom.runs import COLLECTION, Run, load_run

ROUNDING = 1e-6
"""Values that are nearer than this, relatively, count as equal."""
SCALES = (
    *("loss", "grad_norm", "grad_norm_clipped", "qkv_mean_frobenius", "update_norm", "logit_grad_norm"),
    *("grad_cos_prev", "step_grad_cos", "entropy", "action_prob", "ratio_min", "ratio_median", "ratio_max"),
    *("convex_share", "audit_first_order", "audit_gauss_newton", "audit_residual", "audit_overshoot"),
    *("reward", "heldout_reward", "learning_rate", "tokens"),
)
"""Columns of `updates` that are compared, where either run has them."""


def compare(a: Run | str | Path, b: Run | str | Path, *, apart: float = 0.1) -> Comparison:
    """Set two runs side by side, update by update.

    Args:
        a, b: run folders, or what `load_run` gave. Not collections: name one of their runs.
        apart: how much a value may differ before the runs have parted: relatively, or absolutely for columns between
            -1 and 1.

    Raises:
        FileNotFoundError: not a run folder.
        ValueError: `apart` is not positive; a collection; a run without updates; no update in common.
    """
    if not apart > 0:
        raise ValueError(f"apart: {apart}; must be a positive number, such as 0.1.")
    first, second = _run("a", a), _run("b", b)
    left, right = (
        run.updates.drop_duplicates("step", keep="last").set_index("step").sort_index() for run in (first, second)
    )
    common = left.index.intersection(right.index)
    if not len(common):
        raise ValueError(
            f"a, b: no update in common; {str(first.path)!r} has {left.index.min()} to {left.index.max()}, "
            f"{str(second.path)!r} {right.index.min()} to {right.index.max()}."
        )
    units = first.columns[first.columns["table"] == "updates"].set_index("name")["unit"].to_dict()
    columns = [_compared(name, str(units.get(name, "")), left, right, apart) for name in SCALES]
    notes = [f"{which}: {line}" for which, run in (("A", first), ("B", second)) for line in run.damaged]
    directions, why = _directions_of(first, second)
    return Comparison(
        str(first.path),
        str(second.path),
        (len(left), len(right)),
        len(common),
        apart,
        tuple(one for one in columns if one is not None),
        _layers_of(first, second, common),
        directions,
        _settings(first, second),
        tuple(notes + why),
    )


def _run(name: str, given: Run | str | Path) -> Run:
    if isinstance(given, Run):
        run = given
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is damaged stands in the notes
            run = load_run(given)
    if run.meta.get("kind") == COLLECTION:
        found = sorted(str(file.parent) for file in run.path.rglob("run.json") if file.parent != run.path)
        raise ValueError(
            f"{name}: {str(run.path)!r} is a collection of {len(found)} runs; name one, such as {found[:1]}."
        )
    if run.updates.empty:
        raise ValueError(f"{name}: {str(run.path)!r} holds no updates yet.")
    return run


def _compared(name: str, unit: str, left: pd.DataFrame, right: pd.DataFrame, apart: float) -> Compared | None:
    one, other = _values(left, name), _values(right, name)
    if one.isna().all() and other.isna().all():
        return None
    both = pd.concat([one, other], axis=1, join="inner").dropna().to_numpy()
    steps = pd.concat([one, other], axis=1, join="inner").dropna().index.to_numpy()
    x, y = both[:, 0], both[:, 1]
    with np.errstate(invalid="ignore"):
        gap = np.where(x == y, 0.0, np.abs(x - y))  # inf - inf
        size = np.maximum(np.abs(x), np.abs(y))
        relative = np.where(gap == 0, 0.0, gap / np.where(size > 0, size, 1.0))
    relative = np.where(np.isfinite(relative), relative, math.inf)
    far = gap if any(word in name for word in BOUNDED) else relative
    return Compared(
        name,
        unit,
        _median(one),
        _median(other),
        _extreme(one),
        _extreme(other),
        len(steps),
        _first(steps, relative > ROUNDING),
        _first(steps, far > apart),
    )


def _values(updates: pd.DataFrame, name: str) -> pd.Series:
    if name not in updates.columns:
        return pd.Series(np.nan, index=updates.index, dtype=np.float64)
    return pd.to_numeric(updates[name], errors="coerce").astype(np.float64)


def _median(values: pd.Series) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.median()) if len(finite) else None


def _extreme(values: pd.Series) -> float | None:
    known = values.dropna()
    return None if known.empty else float(known.iloc[int(np.argmax(np.abs(known.to_numpy())))])


def _first(steps: np.ndarray, where: np.ndarray) -> int | None:
    return int(steps[where][0]) if where.any() else None


def _layers_of(first: Run, second: Run, common: pd.Index) -> tuple[Layer, ...]:
    medians = []
    for run in (first, second):
        rows = run.norms
        rows = rows[(rows["scope"] == "layer") & rows["step"].isin(common)]
        norms = pd.to_numeric(rows["grad_norm"], errors="coerce").astype(np.float64).replace([np.inf, -np.inf], np.nan)
        medians.append(norms.groupby(rows["name"], sort=False).median().dropna())
    a, b = medians
    return tuple(Layer(str(name), float(a[name]), float(b[name])) for name in a.index if name in b.index)


def _directions_of(first: Run, second: Run) -> tuple[Directions | None, list[str]]:
    try:
        a, b = first.sketches(), second.sketches()
    except ValueError as error:
        return None, [f"no cosines between the runs: {error}"]
    if a.start.size != b.start.size:
        return None, [f"no cosines between the runs: sketches of {a.start.size} and of {b.start.size} numbers."]
    names = ("model", "vocabulary")
    if any(first.meta.get(name) != second.meta.get(name) for name in names):
        return None, ["no cosines between the runs: they are of different models."]
    common, at, by = np.intersect1d(a.updates, b.updates, return_indices=True)
    if not len(common):
        return None, ["no cosines between the runs: no update with sketches in common."]
    gradients = [_cosine(a.gradients[i], b.gradients[j]) for i, j in zip(at, by, strict=True)]
    steps = [_cosine(a.steps[i], b.steps[j]) for i, j in zip(at, by, strict=True)]
    return (
        Directions(
            start=_cosine(a.start, b.start),
            first_gradient=gradients[0],
            gradient=_middle(gradients),
            step=_middle(steps),
            travelled=_cosine(a.steps[at].sum(0, dtype=np.float64), b.steps[by].sum(0, dtype=np.float64)),
        ),
        [],
    )


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Of two sketches, which keep inner products; NaN where one is 0 or not finite."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        size = float(np.linalg.norm(x) * np.linalg.norm(y))
        return float(x @ y) / size if 0 < size < math.inf else math.nan


def _middle(cosines: Sequence[float]) -> float:
    known = [value for value in cosines if not math.isnan(value)]
    return float(np.median(known)) if known else math.nan


def _settings(first: Run, second: Run) -> tuple[tuple[str, str, str], ...]:
    names = [name for name in {**first.meta, **second.meta} if name not in ("schema", "kind", "check")]
    pairs = [(name, first.meta.get(name), second.meta.get(name)) for name in names]
    return tuple((name, str(one), str(other)) for name, one, other in pairs if one != other)
