"""A training run's folder: its settings, and the recorder that writes the rest of it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from accelerate.utils import LoggerType

from lcogeom.recording import Probe, attach
from lcogeom.runs import create_folder
from lcogeom.training.learner import Learner
from lcogeom.training.settings import TrainSettings

FILE = "training.json"
MAY_CHANGE = ("updates", "evaluate_every", "checkpoint_every", "keep_checkpoints", "generation_batch")
"""Settings that a resumed run may have otherwise."""
Row = Mapping[str, object]
Labels = Mapping[str, str | int | float]
TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Name -> module that it needs."""


def stored(run: Path) -> TrainSettings:
    """The settings of a run folder.

    Raises:
        FileNotFoundError: it is not the folder of a training run.
    """
    file = run / FILE
    if not file.is_file():
        raise FileNotFoundError(f"run: {str(run)!r} holds no {FILE}; it is not the folder of a training run.")
    return TrainSettings.from_dict(json.loads(file.read_text())["settings"])


def require(run: Path, settings: TrainSettings, resume: bool) -> None:
    """Refuse a folder that is taken, or one of other settings.

    Raises:
        FileExistsError: taken, without `resume`.
        ValueError: its settings differ in what may not change.
    """
    if not run.exists():
        return
    if not resume:
        raise FileExistsError(f"run: {str(run)!r} exists already. Give another folder, or resume it.")
    if not (run / FILE).exists() and (run / "run.json").exists():
        return  # killed before its settings were written
    before = stored(run)
    same = replace(before, **{name: getattr(settings, name) for name in MAY_CHANGE})
    if same != settings:
        names = [name for name, value in same.to_dict().items() if value != settings.to_dict()[name]]
        raise ValueError(
            f"resume: {names[0]} was {getattr(before, names[0])!r} in {str(run)!r} and is "
            f"{getattr(settings, names[0])!r} now; only {', '.join(MAY_CHANGE)} may change."
        )


@contextlib.contextmanager
def recorder(
    learner: Learner, run: Path, step: int, *, there: bool, labels: Labels, on_row: Callable[[Row], None]
) -> Iterator[Probe | None]:
    """The recorder on this run's folder, from update `step` on, and the settings beside it.

    there: the folder is one to go on in.
    on_row: called with each update's row, by process 0.

    Yields:
        The probe; None where the settings want none.
    """
    settings, main = learner.settings, learner.accelerator.is_main_process
    if there and (run / FILE).is_file():
        labels = json.loads((run / FILE).read_text())["labels"]
    if not settings.record:
        if main and not there:
            create_folder(run, {"labels": dict(labels)})
        _write_settings(run, settings, labels, main)
        learner.accelerator.wait_for_everyone()
        yield None
        return
    probe = attach(
        learner.policy,
        learner.optimizer,
        run,
        objective=learner.objective,
        tokens_per_update=settings.tokens_per_update,
        temperature=settings.temperature,
        tokenizer=learner.tokenizer,
        labels=labels,
        flush_every=None,
        seed=settings.seed,
        audit_every=settings.audit_every,
        sketch=settings.sketch,
        black_box=settings.black_box,
        resume=step if there else False,
        on_update=on_row if main else None,
    )
    with probe:
        _write_settings(run, settings, labels, main)
        yield probe


def teller(
    learner: Learner, run: Path, progress: Callable[[Row], None] | None, log: str | None
) -> Callable[[Row], None]:
    """What passes rows on: to `progress`, and to a tracker that Accelerate knows by name.

    Raises:
        ValueError: no such tracker.
        ModuleNotFoundError: it is not installed.
    """
    accelerator = learner.accelerator
    if log is not None:
        if log not in TRACKERS:
            raise ValueError(f"--log: {log!r}; must be one of {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(TRACKERS[log]) is None:
            raise ModuleNotFoundError(f"--log: {log} is not installed. Run: pip install {log}")
    started = False

    def tell(row: Row) -> None:
        nonlocal started
        if log is not None and not started:  # the folder is there by now
            accelerator.log_with = [LoggerType(log)]
            accelerator.project_configuration.set_directories(str(run))
            accelerator.init_trackers(
                "lcogeom", config={key: str(value) for key, value in learner.settings.to_dict().items()}
            )
            started = True
        if log is not None:
            numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
            accelerator.log(numbers, step=int(str(row["step"])))
        if progress is not None:
            progress(row)

    return tell


def _write_settings(run: Path, settings: TrainSettings, labels: Labels, main: bool) -> None:
    if main:
        unfinished = run / f".{FILE}"
        unfinished.write_text(json.dumps({"settings": settings.to_dict(), "labels": dict(labels)}, indent=2) + "\n")
        os.replace(unfinished, run / FILE)
