"""The command `lcogeom train`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lcogeom.training.presets import PRESETS
from lcogeom.training.presets import preset as preset_by_name

SHOWN = {"reward": "reward", "heldout_reward": "held-out", "grad_norm": "grad norm", "convex_share": "convex"}


EPILOG = "Presets\n\n" + "\n\n".join(f"{name}: {one.description}" for name, one in PRESETS.items())


def train_command(
    preset: Annotated[
        str | None, typer.Argument(help="See below; with --resume the run's own settings are known.")
    ] = None,
    run: Annotated[Path, typer.Option(help="Folder to create: recording, checkpoints, settings.")] = Path("runs/train"),
    seed: Annotated[int | None, typer.Option(help="Of problems and samples. Default: 0.")] = None,
    updates: Annotated[int | None, typer.Option(help="Optimiser steps. Default: the preset's.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="field=value for any setting, objective_options.beta=1 for an option; repeat it."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Two updates of a tiny model of the preset's kind, nothing kept.")
    ] = False,
    log: Annotated[
        str | None, typer.Option(help="Send the rows elsewhere, too: tensorboard, wandb or trackio.")
    ] = None,
) -> None:
    """Train a model on problems with checkable answers, everything recorded.

    Read the result with lcogeom.load_run(RUN). Several GPUs: accelerate launch -m lcogeom.cli train PRESET ...
    """
    from transformers.utils import logging

    from lcogeom.training.dry_run import dry_run
    from lcogeom.training.run_folder import stored
    from lcogeom.training.settings import override
    from lcogeom.training.trainer import train  # torch only when it is needed

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if preset is None and not resume:
        raise ValueError("preset: none named; `lcogeom train --help` lists them.")
    settings = stored(run) if resume and run.exists() and preset is None else preset_by_name(preset or "")
    changes = [*(assignments or [])]
    changes += [f"{name}={value}" for name, value in (("seed", seed), ("updates", updates)) if value is not None]
    labels = {"variant": preset or "unnamed"}
    if dry:
        with tempfile.TemporaryDirectory() as folder:
            small = dry_run(
                override(settings, [one for one in changes if not one.startswith("updates=")]), Path(folder)
            )
            with _Bar(small.updates) as bar:
                train(small, Path(folder) / "run", progress=bar.show, labels=labels, log=log)
        print(f"{preset}: {small.updates} updates of a tiny model went through")
        return
    settings = override(settings, changes)
    with _Bar(settings.updates) as bar:
        print(train(settings, run, resume=resume, progress=bar.show, labels=labels, log=log))


class _Bar(Progress):
    """A bar with the last known values behind it."""

    def __init__(self, updates: int) -> None:
        columns = (TextColumn("update"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        super().__init__(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self._known: dict[str, str] = {}
        self._bar = self.add_task("loading", total=updates)

    def show(self, row: Mapping[str, object]) -> None:
        """An update's row."""
        for column, word in SHOWN.items():
            if isinstance(value := row.get(column), float):
                self._known[word] = f"{value:.3g}"
        text = "  ".join(f"{word} {value}" for word, value in self._known.items())
        self.update(self._bar, completed=int(str(row["step"])) + 1, description=re.sub(r"\n", " ", text))
