"""Does `diagnose` find the cause, and the update?  ->  results.json, and the table in analysis/README.md

    python analysis/faults/score.py OUT              after make_runs.py OUT; 3 minutes on one core
    python analysis/faults/score.py OUT --half tuning --misses FILE      what went wrong on the tuning half, run by run

A run counts as right where the first finding has the cause that was put in, or one that the catalogue calls right as
well; in the top two where one of the first two has. Its update is right where the finding with the right cause names
one that the catalogue allows, give or take one. A run without any finding is said to be healthy. Intervals: 95 %; of
faulty runs by a bootstrap over ways, because runs of one way fail together; of healthy runs Wilson's.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_runs import FOLDERS
from rich.console import Console
from rich.progress import track

import lcogeom as lg

MARKS = ("<!-- faults: written by the script -->", "<!-- faults: end -->")
HALVES = {"held-out": "held-out half", "tuning": "tuning half"}
README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results.json"
Row = dict[str, Any]


def judged(folder: Path, name: str) -> Row:
    """One run, diagnosed, beside what was put into it."""
    fault = json.loads((folder / "fault.json").read_text())
    began, findings, error = time.monotonic(), [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = lg.diagnose(folder / "run")
            findings = [
                {"cause": one.cause, "update": one.update, "confidence": round(one.confidence, 3)}
                for one in report.findings
            ]
        except Exception as raised:  # counts as a wrong answer
            error = f"{type(raised).__name__}: {raised}"
    right = {fault["cause"], *fault["also"]}
    named = next((one["update"] for one in findings if one["cause"] in right), None)
    return {
        "name": name,
        **{key: fault[key] for key in ("half", "cause", "way", "loop", "severe", "seed", "update", "seen", "also")},
        "objective": fault["setup"]["objective"],
        "model": fault["setup"]["model"],
        "said": (error and "error") or (findings[0]["cause"] if findings else "healthy"),
        "first": bool(findings) and findings[0]["cause"] in right,
        "top_two": any(one["cause"] in right for one in findings[:2]),
        "right_update": named is not None and fault["seen"][0] - 1 <= named <= fault["seen"][1] + 1,
        "findings": findings,
        "error": error,
        "stopped": fault["error"],
        "seconds": time.monotonic() - began,
        "run_seconds": fault["seconds"],
    }


def share(rows: Sequence[Row], key: str, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """(share of rows with `key`, lower and upper end of a bootstrap over ways)."""
    ways = sorted({(row["cause"], row["way"]) for row in rows})
    counts = np.array(
        [
            [sum(row[key] for row in rows if (row["cause"], row["way"]) == one),
             sum((row["cause"], row["way"]) == one for row in rows)]
            for one in ways
        ]
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    picked = counts[rng.integers(len(ways), size=(draws, len(ways)))].sum(1)
    low, high = np.quantile(picked[:, 0] / picked[:, 1], [0.025, 0.975])
    return counts[:, 0].sum() / counts[:, 1].sum(), float(low), float(high)


def wilson(hits: int, of: int, z: float = 1.96) -> tuple[float, float, float]:
    """(share, lower and upper end of Wilson's score interval)."""
    rate = hits / of
    middle = (rate + z * z / (2 * of)) / (1 + z * z / of)
    half = z * np.sqrt(rate * (1 - rate) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return rate, max(0.0, middle - half), min(1.0, middle + half)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers of one half."""
    faulty = [row for row in rows if row["cause"] != "healthy"]
    healthy = [row for row in rows if row["cause"] == "healthy"]
    alarms = sum(row["said"] != "healthy" for row in healthy)
    return {
        "faulty": len(faulty),
        "healthy": len(healthy),
        "first": share(faulty, "first"),
        "top_two": share(faulty, "top_two"),
        "right_update": share(faulty, "right_update"),
        "false_alarms": (alarms, *wilson(alarms, len(healthy))) if healthy else None,
    }


def confusion(rows: Sequence[Row]) -> str:
    """Markdown: one line a cause, what was said first of its runs, most often first."""
    lines = [
        "| cause put in | runs | right first | in the top two | update right | said instead |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for cause in [*sorted({row["cause"] for row in rows} - {"healthy"}), "healthy"]:
        mine = [row for row in rows if row["cause"] == cause]
        if cause == "healthy":
            right = sum(row["said"] == "healthy" for row in mine)
            wrong = Counter(row["said"] for row in mine if row["said"] != "healthy")
            cells = [str(right), "", ""]
        else:
            cells = [str(sum(row[key] for row in mine)) for key in ("first", "top_two", "right_update")]
            wrong = Counter(row["said"] for row in mine if not row["first"])
        said = ", ".join(f"{name} {count}" for name, count in wrong.most_common())
        lines.append(f"| {cause} | {len(mine)} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


def by(rows: Sequence[Row], label: str, of: Callable[[Row], str]) -> str:
    """Markdown: right first by one property of the faulty runs."""
    lines = [f"| {label} | runs | right first | in the top two | update right |", "| --- | ---: | ---: | ---: | ---: |"]
    faulty = [row for row in rows if row["cause"] != "healthy"]
    for value in sorted({of(row) for row in faulty}):
        mine = [row for row in faulty if of(row) == value]
        cells = [f"{100 * np.mean([row[key] for row in mine]):.0f} %" for key in ("first", "top_two", "right_update")]
        lines.append(f"| {value} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(found: Mapping[str, Any]) -> str:
    """What stands in analysis/README.md."""

    def percent(three: Sequence[float]) -> str:
        return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * value for value in three))

    held, tuned = found["held-out"], found["tuning"]
    lines = [
        "| | held-out half | tuning half | must be |",
        "| --- | ---: | ---: | ---: |",
        f"| faulty runs | {held['faulty']} | {tuned['faulty']} | |",
        *(
            f"| {says} | {percent(held[key])} | {percent(tuned[key])} | {bound} |"
            for key, says, bound in (
                ("first", "right cause first", ">= 90 %"),
                ("top_two", "right cause in the top two", ">= 97 %"),
                ("right_update", "right update, give or take one", ">= 90 %"),
            )
        ),
        f"| healthy runs | {held['healthy']} | {tuned['healthy']} | |",
        f"| healthy runs with any finding | {held['false_alarms'][0]}: {percent(held['false_alarms'][1:])} | "
        f"{tuned['false_alarms'][0]}: {percent(tuned['false_alarms'][1:])} | <= 2 % |",
    ]
    return "\n".join(lines)


def misses(rows: Sequence[Row], out: Path) -> str:
    """Every run that went wrong, with what was said."""
    lines = []
    for row in sorted(rows, key=lambda row: row["name"]):
        healthy = row["cause"] == "healthy"
        if (healthy and row["said"] != "healthy") or (not healthy and not (row["first"] and row["right_update"])):
            said = ", ".join(f"{one['cause']}@{one['update']} ({one['confidence']})" for one in row["findings"][:4])
            kind = "wrong cause" if healthy or not row["first"] else "wrong update"
            lines.append(
                f"- {kind}: {out / FOLDERS[row['half']] / row['name']} [{row['objective']}, {row['model']}, "
                f"{'severe' if row['severe'] else 'mild'}] from {row['update']}, may be named {row['seen']}; "
                f"said: {row['error'] or said or 'healthy'}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--half", choices=FOLDERS)
    parser.add_argument("--misses", type=Path, help="write a list of the runs that went wrong here, and no table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    halves = [arguments.half] if arguments.half else list(HALVES)
    folders = [
        (file.parent, str(file.parent.relative_to(arguments.out / FOLDERS[half])))
        for half in halves
        for file in sorted((arguments.out / FOLDERS[half]).rglob("fault.json"))
    ]
    rows = [judged(*one) for one in track(folders, "diagnosing", console=Console(stderr=True))]
    found = {half: summary([row for row in rows if row["half"] == half]) for half in halves}
    print(json.dumps(found, indent=1))
    if arguments.misses:
        parts = [f"# {half}\n\n```\n{json.dumps(found[half])}\n```\n" for half in halves]
        parts += [
            confusion(rows),
            by(rows, "way", lambda row: f"{row['cause']}/{row['way']}"),
            misses(rows, arguments.out),
        ]
        arguments.misses.write_text("\n\n".join(parts) + "\n")
    elif not arguments.half:
        held = [row for row in rows if row["half"] == "held-out"]
        text = "\n\n".join([table(found), confusion(held), by(held, "loop", lambda row: row["loop"])])
        before, _, rest = README.read_text().partition(MARKS[0])
        README.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
        about = {
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lcogeom": lg.__version__,
        }
        RESULTS.write_text(json.dumps({"about": about, "summary": found, "rows": rows}, indent=1) + "\n")
