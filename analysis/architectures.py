"""Which architectures can the recorder be attached to, and are its numbers right?  ->  architectures.csv

    python analysis/architectures.py                                        (75 s on one idle core)
    python analysis/architectures.py --types llama bert --out FILE          (some types only)

Every model type in transformers' causal-LM mapping that can be built from a small config makes one real update
(forward, unclipped PPO loss over the completion tokens, backward, AdamW): once plain, once recorded by each tap. A tap
works when the records agree with a float64 computation from the model's own logits (probability to 1e-6,
log-probability and entropy to 1e-5 nat, f' to 1e-4) and the parameters end bit for bit as without it. A type counts as
attached when tap "auto", the default, works. Writes the count and the exceptions into analysis/README.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
import transformers
from rich.progress import track

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tests.architectures import MAPPING, ROWS, build  # noqa: E402
from tests.attached import Recorded, one_update  # noqa: E402

MARKS = ("<!-- architectures: written by the script -->", "<!-- architectures: end -->")
TAPS = ("auto", "hidden", "logits")


def examine(model_type: str, folder: Path) -> dict[str, object]:
    """The row of one type."""
    row: dict[str, object] = {"type": model_type, "class": MAPPING[model_type]}
    try:
        model = build(model_type)
    except (ImportError, ValueError) as error:
        return row | {"status": "not built", "error": _one_line(error)}
    found = one_update(model, TAPS, folder / model_type, ROWS.get(model_type, 2))
    working = [tap for tap in TAPS if found[tap].right]
    seen = [recorded for recorded in found.values() if recorded.error is None]
    return row | {
        "status": "attached" if "auto" in working else "not attached",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "taps": " ".join(working),
        "prob_error": _worst(seen, "prob"),
        "entropy_error": _worst(seen, "entropy"),
        "d1_error": _worst(seen, "d1"),
        "misfit": _worst(seen, "misfit"),
        "bit_identical": all(recorded.identical for recorded in seen),
        "qkv_recognised": bool(seen) and seen[0].qkv > 0,
        "error": next((recorded.error for recorded in found.values() if recorded.error is not None), None),
    }


def _worst(seen: list[Recorded], name: str) -> float:
    return max((getattr(recorded, name) for recorded in seen), default=float("nan"))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def report(table: pd.DataFrame) -> str:
    built = table[table["status"] != "not built"]
    attached = built[built["status"] == "attached"]
    hidden, logits = (int(built["taps"].str.contains(tap).sum()) for tap in ("hidden", "logits"))
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, CPU, float32, {len(table)} types:", "",
        f"- **{len(attached)} of {len(built)} types that were built are attached** with the default tap; {hidden} with "
        f"tap='hidden', which a fused loss needs, {logits} with tap='logits'.",
        f"- Largest errors over all of them: probability {built['prob_error'].max():.0e}, entropy "
        f"{built['entropy_error'].max():.0e} nat, f' {built['d1_error'].max():.0e} relative; largest misfit "
        f"{built['misfit'].max():.0e}. Parameters after the update are bit-identical for "
        f"{int(built['bit_identical'].sum())}.",
        f"- Query, key and value projections are recognised in {int(built['qkv_recognised'].sum())}; without: "
        f"{', '.join(built['type'][~built['qkv_recognised'].astype(bool)]) or 'none'}.",
        "", "| type | class | status | taps that work | what the user sees |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in table[table["error"].notna()].itertuples():
        lines.append(f"| {row.type} | {row[2]} | {row.status} | {row.taps} | {row.error} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=sorted(MAPPING), metavar="TYPE")
    parser.add_argument("--out", type=Path, default=HERE / "architectures.csv")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.types) - set(MAPPING))
    if unknown:
        parser.error(f"--types: {', '.join(unknown)}: not in transformers' causal-LM mapping.")
    logging.disable(logging.WARNING)  # transformers has something to say of most default configs
    with tempfile.TemporaryDirectory() as folder:
        rows = [examine(name, Path(folder)) for name in track(arguments.types, "attaching", transient=True)]
    columns = ["type", "class", "status", "parameters", "taps", "prob_error", "entropy_error", "d1_error", "misfit"]
    table = pd.DataFrame(rows, columns=[*columns, "bit_identical", "qkv_recognised", "error"])
    table["taps"] = table["taps"].fillna("")
    table["parameters"] = table["parameters"].astype("Int64")
    table.to_csv(arguments.out, index=False, float_format="%.2g")
    text = report(table)
    print(text)
    if arguments.out == HERE / "architectures.csv":
        file = HERE / "README.md"
        before, rest = file.read_text().split(MARKS[0])
        file.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
