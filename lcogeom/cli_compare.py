"""The command `lcogeom compare`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcogeom.diagnosis.comparison import plain
from lcogeom.diagnosis.markdown import figure, table

if TYPE_CHECKING:
    from lcogeom.objectives import Objective
    from lcogeom.recording import ObjectiveComparison


def compare_command(
    a: Annotated[Path, typer.Argument(help="A run folder.")],
    b: Annotated[Path | None, typer.Argument(help="Another; none with --objectives.")] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Two objectives, on the batch in A's black box instead: grpo,lco-kld:beta=2 "
            "(NAME:KEY=VALUE:KEY=VALUE, with a comma between)."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --objectives: tiny, smollm2, a folder or a hub id; of A's architecture.")
    ] = None,
    update: Annotated[
        int | None, typer.Option(help="With --objectives: of which update's dump. Default: the first.")
    ] = None,
    apart: Annotated[float, typer.Option(help="From which difference on two runs have parted.")] = 0.1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all of it to this file, too.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write what is printed to this file, too.")] = None,
) -> None:
    """Two runs side by side: norms, cosines, curvature, entropy, ratios, and the first update at which they part.

    Or two objectives on one recorded batch: gradients, cosines and curvature at the weights from before the update.
    """
    for option, file in (("--json", json_file), ("--markdown", markdown)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{option}: no folder {str(file.parent)!r}; make it first.")
    values: dict[str, Any]
    if objectives is not None:
        if b is not None or model is None:
            raise ValueError(
                "--objectives: compares on one run's batch, under a model: lcogeom compare RUN --model NAME."
            )
        text, values = _objectives(a, objectives, model, update)
    elif b is None:
        raise ValueError("B: no second run. Name it, or two objectives with --objectives.")
    else:
        from lcogeom.diagnosis.compare import compare

        found = compare(a, b, apart=apart)
        text, values = found.to_markdown(), found.to_dict()
    print(text, end="")
    if json_file is not None:
        json_file.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if markdown is not None:
        markdown.write_text(text, encoding="utf-8")


def _objectives(run: Path, objectives: str, model: str, update: int | None) -> tuple[str, dict[str, Any]]:
    from transformers.utils import logging

    from lcogeom.models import load_model
    from lcogeom.recording import compare_objectives
    from lcogeom.runs import load_run

    logging.disable_progress_bar()
    chosen = [_objective(text) for text in objectives.split(",")]
    if len(chosen) != 2:
        raise ValueError(f"--objectives: {len(chosen)} named; give two, with a comma between.")
    dumps = load_run(run).black_box()
    entry = next((one for one in dumps if update is None or one.step == update), None)
    if entry is None:
        known = ", ".join(str(one.step) for one in dumps)
        raise ValueError(
            f"A: the black box of {str(run)!r} holds {f'updates {known}' if dumps else 'nothing'}. A batch is written "
            "down when something goes wrong, and by probe.dump(...)."
        )
    loaded = load_model(model, device="cpu").model
    if entry.has_weights:
        entry.load_weights(loaded)
    batches = [batch for batch in entry.batches if batch.step == entry.step]
    found = compare_objectives(batches, loaded, chosen[0], chosen[1])
    weights = "the weights from before it" if entry.has_weights else f"the weights of {model!r}, none were kept"
    return _text(found, f"Update {entry.step} of {run}: {found.tokens} tokens, at {weights}."), plain(asdict(found))


def _objective(text: str) -> Objective:
    from lcogeom.cli_options import option_value
    from lcogeom.objectives import objective

    name, *options = text.strip().split(":")
    pairs = [option.partition("=") for option in options]
    for key, equals, _ in pairs:
        if not (key and equals):
            raise ValueError(f"--objectives: {key!r}; write an option as NAME:KEY=VALUE.")
    return objective(name, **{key: option_value(value) for key, _, value in pairs})


def _text(found: ObjectiveComparison, title: str) -> str:
    one, other = found.a, found.b
    rows = [
        ("loss, mean over tokens", figure(one.loss), figure(other.loss)),
        ("gradient norm in the logits", figure(one.logit_grad_norm), figure(other.logit_grad_norm)),
        ("gradient norm in the parameters", figure(one.grad_norm), figure(other.grad_norm)),
        ("share of convex tokens", figure(one.convex_share), figure(other.convex_share)),
        ("lowest eigenvalue in the logits", figure(one.lowest), figure(other.lowest)),
        ("highest eigenvalue in the logits", figure(one.highest), figure(other.highest)),
        ("Gauss-Newton curvature along its gradient", figure(one.gauss_newton), figure(other.gauss_newton)),
    ]
    cosines = [("in the logits", figure(found.logit_cosine)), ("in the parameters", figure(found.grad_cosine))]
    cosines += [(layer, figure(cosine)) for layer, cosine in found.layer_cosines.items()]
    return "\n".join(
        [
            title,
            f"A: {one.objective}",
            f"B: {other.objective}",
            "",
            *table(("mean over the completion tokens", "A", "B"), rows),
            "",
            *table(("of the two gradients", "cosine"), cosines),
            "",
            f"At {100 * found.opposed:.0f} % of the tokens one pushes the action up and the other down.",
            *(f"- {note}" for note in found.notes),
            "",
        ]
    )
