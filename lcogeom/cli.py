"""The command `lcogeom`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Before torch is imported: spinning threads make a command 6 times slower where the cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Gradient geometry for the policy optimisation of language models.",
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    pass  # with a callback, a single command keeps its name on the command line


@app.command("replay")
def replay_command(
    model: Annotated[str, typer.Argument(help="tiny, smollm2, a local folder of a causal LM, or a hub id.")] = "tiny",
    run: Annotated[Path, typer.Option(help="Folder to create for the recording.")] = Path("runs/replay"),
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated objectives: registry names and ppo-unclipped, each with :positive or :negative "
            "behind it to give every token the advantage +1 or -1 instead of the reward's sign."
        ),
    ] = None,
    problems: Annotated[
        str,
        typer.Option(help='arithmetic, arithmetic-characters, or a JSONL file of {"prompt": ..., "answer": ...}.'),
    ] = "arithmetic",
    select: Annotated[str, typer.Option(help="Which completions are kept: positive, negative or mixed.")] = "mixed",
    sequences: Annotated[int, typer.Option(help="How many completions are kept.")] = 6,
    updates: Annotated[int, typer.Option(help="Updates under each objective.")] = 30,
    seeds: Annotated[int, typer.Option(help="Repetitions with other problems and samples.")] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW. Default: 3e-4 for tiny, else 1e-5.")] = None,
    beta: Annotated[float | None, typer.Option(help="Of the LCO objectives. Default: 2.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 24,
    stop: Annotated[
        str | None, typer.Option(help="End a completion at this text, beside the model's own end of sequence.")
    ] = None,
    tap: Annotated[str, typer.Option(help="Where the recorder reads: logits or hidden.")] = "logits",
) -> None:
    """Many updates on one fixed batch under each objective, from the same weights, everything recorded.

    Samples completions of the model, scores them, keeps a few, and updates on them again and again.

    Read the result with lcogeom.load_run(RUN); draw it with figures/stability.py and figures/convexity.py.
    """
    from transformers.utils import logging

    from lcogeom.training.replay import DEFAULT_OBJECTIVES, ReplaySettings, replay  # torch only when it is needed

    logging.disable_progress_bar()  # ours says what is going on

    settings = ReplaySettings(
        model=model,
        objectives=tuple(objectives.split(",")) if objectives is not None else DEFAULT_OBJECTIVES,
        problems=problems,
        select=select,
        sequences=sequences,
        updates=updates,
        seeds=seeds,
        learning_rate=learning_rate,
        beta=beta,
        max_new_tokens=max_new_tokens,
        stop=stop,
        tap=tap,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(f"loading {model}", total=None)

        def show(what: str, done: int, total: int) -> None:
            if done == 0:
                bars.reset(bar, total=total, description=what)
            bars.update(bar, description=what, completed=done, total=total)

        folder = replay(settings, run, show)
    print(folder)


def main() -> None:
    """Run the command; bad input ends in one line on standard error and exit code 2.

    Set LCOGEOM_TRACEBACK=1 to see where an error was raised.
    """
    try:
        app()
    except (OSError, ValueError, TypeError, ModuleNotFoundError, RuntimeError) as error:
        if os.environ.get("LCOGEOM_TRACEBACK"):
            raise
        print(f"lcogeom: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
