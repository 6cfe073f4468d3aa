"""The command `lcogeom`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lcogeom.cli_compare import compare_command
from lcogeom.cli_diagnose import diagnose_command
from lcogeom.cli_options import option_value
from lcogeom.cli_train import EPILOG, train_command

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
    audit_every: Annotated[
        int | None, typer.Option(help="Take every k-th update apart: first order, curvature, remainder.")
    ] = None,
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
        audit_every=audit_every,
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


def _print_recipe(trainer: str | None) -> None:
    if trainer is None:
        return
    from lcogeom.audit.trainers import RECIPES

    if trainer not in RECIPES:
        raise ValueError(f"--how-to-log: {trainer!r}; must be one of {', '.join(RECIPES)}.")
    print(RECIPES[trainer], end="")
    raise typer.Exit()


app.command("train", epilog=EPILOG)(train_command)
app.command("diagnose")(diagnose_command)
app.command("compare")(compare_command)


@app.command("audit")
def audit_command(
    file: Annotated[
        Path,
        typer.Argument(
            help="Parquet, CSV or JSON lines: one row per token, or one per sequence with lists in its cells."
        ),
    ],
    objective: Annotated[str, typer.Option(help="A loss of log pi(a): ppo, grpo, dapo, cispo, reinforce, ...")] = "ppo",
    clip_low: Annotated[str | None, typer.Option(help="The objective's lower clip bound; none for no bound.")] = None,
    clip_high: Annotated[str | None, typer.Option(help="The objective's upper clip bound; none for no bound.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE: any other option of the objective; may be repeated.")
    ] = None,
    logprobs: Annotated[str | None, typer.Option(help="Column of log pi(a), the policy under audit.")] = None,
    old_logprobs: Annotated[
        str | None, typer.Option(help="Column of the behaviour policy's log-probabilities.")
    ] = None,
    ref_logprobs: Annotated[
        str | None, typer.Option(help="Column of the reference policy's log-probabilities.")
    ] = None,
    advantages: Annotated[str | None, typer.Option(help="Column of advantages.")] = None,
    mask: Annotated[str | None, typer.Option(help="Column that is 0 at tokens that do not count.")] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken rows out and list them.")] = False,
    worst: Annotated[int, typer.Option(help="How many of the worst tokens to list.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file, too.")] = None,
    how_to_log: Annotated[
        str | None,
        typer.Option(callback=_print_recipe, is_eager=True, help="trl or verl: print the lines that log such a file."),
    ] = None,
) -> None:
    """How convex an objective was at every logged token, from log-probabilities and advantages, without the model.

    Reports the share of convex tokens, the negative-curvature mass and k*, the forward KL that each token lacks, and
    names the worst tokens. Columns are found by their usual names, TRL's and verl's among them.
    """
    from lcogeom.audit import audit_file
    from lcogeom.audit.show import print_report, reading_progress

    pairs = [entry.partition("=") for entry in option or []]
    for key, equals, _ in pairs:
        if not (key and equals):
            raise ValueError(f"--option: {key!r}; write it as KEY=VALUE.")
    values = {key: option_value(value) for key, _, value in pairs}
    for key, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if bound is not None:
            values[key] = option_value(bound)
            if isinstance(values[key], str):
                raise ValueError(f"--{key.replace('_', '-')}: {bound!r}; must be a number or none.")
    named = {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "advantages": advantages,
        "mask": mask,
    }
    if worst < 0:
        raise ValueError(f"--worst: {worst}; must be at least 0.")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"--json: no folder {str(json_file.parent)!r}; make it first.")
    with reading_progress(f"reading {file.name}") as progress:
        report = audit_file(
            file,
            objective,
            options=values,
            columns={role: column for role, column in named.items() if column is not None},
            skip_broken=skip_broken,
            worst=worst,
            progress=progress,
        )
    terminal = sys.stdout.isatty()
    print_report(report, Console(width=None if terminal else 140))
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


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


if __name__ == "__main__":  # accelerate launch -m lcogeom.cli train ...
    main()
