"""The black box of a run: one folder for each dump, complete from its first moment, and how it is read.

RUN/black_box/step-000123/report.json            why, which batches, what was not finite, the heaviest tokens
                          batch-000123-0.safetensors   one for each forward and backward pass kept
                          weights.safetensors    before the step, and optimizer.safetensors: only where asked for
RUN/black_box/triggers.jsonl                     every event, those too that were not dumped
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    import torch

FOLDER, REPORT, WEIGHTS, OPTIMIZER, TRIGGERS = (
    "black_box",
    "report.json",
    "weights.safetensors",
    "optimizer.safetensors",
    "triggers.jsonl",
)
SCHEMA_VERSION = 1
TOKENS = ("step", "sequence", "position", "token_id", "text", "logprob", "logit_grad_norm", "share")


@dataclass(frozen=True)
class NonFinite:
    """The first tensor of an update, in the order in which it was computed, that holds a NaN or an infinity."""

    what: str
    """'weight', 'output' (of a module), 'logits', 'loss' (per token), 'gradient' (of a module's output or a weight)."""
    name: str
    """Of the weight or module; of a loss, the token: "sequence 3, position 0, token 17"."""
    kind: str
    """'nan', 'inf', or 'nan and inf'."""
    share: float | None
    """Of its entries that are not finite; None where it was not looked at."""
    part: int | None = None
    """Which of the update's passes, from 0."""


@dataclass(frozen=True, eq=False)
class RecordedBatch:
    """One forward and backward pass, as `replay_batch` needs it."""

    path: Path
    """The tensors' file."""
    step: int
    part: int
    """Which of the update's passes, from 0."""
    loss: float | None
    """As handed to batch(), or the model's own (from its `labels`); None if neither was there."""
    objective: Mapping[str, Any] | None
    """{"name": ..., "options": ...} as named at attach()."""
    module: str
    """Whose forward was called with the recorded arguments, by its name in the model: "" is the model itself."""
    options: Mapping[str, Any]
    """Its arguments that are not tensors."""
    left_out: Mapping[str, str]
    """What was not kept -> why."""
    training: bool
    """Whether the model was in train mode."""
    other_mode: tuple[str, ...]
    """The modules whose mode was not the model's."""
    autocast: str | None
    """The dtype of autocast, such as "bfloat16"; None if it was off."""
    temperature: float
    """What the logits were divided by, as named at attach()."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """`input.NAME`: the arguments of forward; `batch.NAME`: those of batch(); `rng.DEVICE`: before the pass.

        Raises:
            ValueError: the file is damaged.
        """
        return _load(self.path)


@dataclass(frozen=True, eq=False)
class BlackBoxEntry:
    """One dump: why, and the passes of the last updates up to the one that caused it."""

    path: Path
    step: int
    """The update that caused it."""
    reason: str
    batches: tuple[RecordedBatch, ...]
    """Oldest first; those of the update that caused it come last."""
    updates: pd.DataFrame
    """step, loss, grad_norm, update_norm of the updates kept; null where it was not known yet."""
    first_non_finite: NonFinite | None
    note: str
    """How `first_non_finite` was found, or why there is none."""
    tokens: pd.DataFrame
    """The recorded tokens of that update with the largest gradient; `share` is theirs of its square."""
    has_weights: bool

    def load_weights(self, model: torch.nn.Module) -> None:
        """Put the weights and buffers from before the step into a model of the same architecture.

        Raises:
            ValueError: none were kept, or they are of another architecture.
        """
        if not self.has_weights:
            raise ValueError(
                f"weights: {str(self.path)!r} holds none. Load your own checkpoint of update {self.step}, or record "
                "with attach(..., black_box_weights=True)."
            )
        state = _load(self.path / WEIGHTS)
        for alias, name in _read_report(self.path)["tied"].items():
            state[alias] = state[name]
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"model: the weights of {str(self.path)!r} do not fit it: {error}") from error

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state before the step, for `optimizer.load_state_dict`.

        Raises:
            ValueError: none was kept.
        """
        plain = _read_report(self.path).get("optimizer")
        if plain is None:
            raise ValueError(f"optimizer: {str(self.path)!r} holds no state; see attach(..., black_box_weights=True).")
        state: dict[int, dict[str, Any]] = {int(key): dict(values) for key, values in plain["state"].items()}
        groups = [dict(group) for group in plain["param_groups"]]
        file = self.path / OPTIMIZER
        for name, tensor in (_load(file) if file.exists() else {}).items():
            where, number, key = name.split(".", 2)
            (state.setdefault(int(number), {}) if where == "state" else groups[int(number)])[key] = tensor
        return {"state": state, "param_groups": groups}


def write_entry(
    run: Path, step: int, report: Mapping[str, Any], files: Mapping[str, Mapping[str, torch.Tensor]]
) -> Path:
    """Write one dump: aside, synced, then renamed into place.

    Args:
        run: the run folder.
        report: the content of report.json; floats may be NaN or infinite.
        files: file name -> its tensors, contiguous and sharing no memory.

    Raises:
        OSError, safetensors.SafetensorError: it could not be written; nothing is left behind.
    """
    from safetensors.torch import save_file

    parent = run / FOLDER
    parent.mkdir(exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".step-{step:06d}-", dir=parent))
    try:
        for name, tensors in files.items():
            save_file(dict(tensors), unfinished / name)
        text = json.dumps({"schema": SCHEMA_VERSION, **_strict(report)}, indent=1, ensure_ascii=False)
        (unfinished / REPORT).write_text(text + "\n", encoding="utf-8")
        for file in [*unfinished.iterdir(), unfinished]:
            _sync(file)
        unfinished.chmod(0o755)
        place = parent / f"step-{step:06d}"
        again = 1
        while place.exists():
            again += 1
            place = parent / f"step-{step:06d}-{again}"
        unfinished.rename(place)
        _sync(parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return place


def write_trigger(run: Path, event: Mapping[str, Any]) -> None:
    """Add one line to the list of events. Raises OSError."""
    (run / FOLDER).mkdir(exist_ok=True)
    with (run / FOLDER / TRIGGERS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(_strict(event)) + "\n")


def read_triggers(run: Path) -> list[dict[str, Any]]:
    """Every event of a run folder, oldest first: `step`, `reason`, `dumped`. A line that is damaged is left out."""
    try:
        lines = (run / FOLDER / TRIGGERS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("step"), int) and isinstance(event.get("reason"), str):
                found.append(event)
    return found


def read_entries(run: Path) -> list[BlackBoxEntry]:
    """Every whole dump of a run folder, by update. A damaged one is left out with a warning."""
    entries = []
    for folder in (run / FOLDER).glob("step-*"):
        try:
            entries.append(_read_entry(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"black box: {str(folder)!r} is damaged and was left out ({error})", stacklevel=3)
    return sorted(entries, key=lambda entry: (entry.step, entry.path.name))


def _read_entry(folder: Path) -> BlackBoxEntry:
    report = _read_report(folder)
    batches = []
    for batch in report["batches"]:
        found = dict(batch, path=folder / batch["file"], other_mode=tuple(batch["other_mode"]))
        del found["file"]
        found["loss"] = None if batch["loss"] is None else float(batch["loss"])
        if not found["path"].is_file():
            raise ValueError(f"no file {batch['file']}")
        batches.append(RecordedBatch(objective=report["objective"], temperature=float(report["temperature"]), **found))
    first = report["first_non_finite"]
    updates = pd.DataFrame(report["updates"], columns=["step", "loss", "grad_norm", "update_norm"])
    tokens = pd.DataFrame(report["tokens"], columns=list(TOKENS))
    for frame in (updates, tokens):
        for name in frame.columns.intersection(["loss", "grad_norm", "update_norm", *TOKENS[5:]]):
            frame[name] = frame[name].astype(float)  # "inf" and "nan" are texts in JSON
    return BlackBoxEntry(
        path=folder,
        step=int(report["step"]),
        reason=report["reason"],
        batches=tuple(batches),
        updates=updates,
        first_non_finite=None if first is None else NonFinite(**first),
        note=report["note"],
        tokens=tokens,
        has_weights=(folder / WEIGHTS).is_file(),
    )


def _load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"black box: {str(file)!r} is damaged ({error}).") from error


def _read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    if report["schema"] > SCHEMA_VERSION:
        raise ValueError(f"schema {report['schema']}; this version reads up to {SCHEMA_VERSION}. Upgrade")
    return report


def _strict(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become the texts that float() reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, NonFinite):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
