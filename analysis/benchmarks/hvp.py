"""What does a curvature product of a language model cost, with one gradient as the unit?

    python analysis/benchmarks/hvp.py              (8 minutes on 2 cores)
    python analysis/benchmarks/hvp.py --quick      (20 seconds: ours on the small Llama alone, nothing written)

Hessian-vector products by double backward, with the graph of the gradient kept, and by differences of gradients;
Gauss-Newton products; and hessian-eigenthings' product. The methods take turns in one process; memory is the peak of
the resident set in a fresh process each, beyond the model and its inputs. Writes hvp.json and analysis/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
from isolated import THREADS, Worker, interpreter
from report import HERE, cpu_model, update_readme

MODELS = ("gpt2", "llama", "smollm2")
PEER = "hessian-eigenthings"
OURS = ("gradient", "hvp", "hvp, graph kept", "ggn", "hvp, differences")
ROUNDS = {"gpt2": 9, "llama": 9, "smollm2": 5}
MARK = "hvp"


def start(model: str, methods: tuple[str, ...]) -> Worker:
    if PEER not in methods:
        return Worker(HERE / "hvp_worker.py", model, Path())
    return Worker(
        HERE / "hvp_worker.py", model, next(Path(interpreter(PEER)).parents[1].glob("lib/python*/site-packages"))
    )


def measure(model: str, methods: tuple[str, ...], rounds: int) -> dict:
    """Seconds of every method in every round, and peak bytes."""
    worker = start(model, methods)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for method in methods:
        worker(method=method)  # what happens only once; the kept graph is made here
    for _ in range(rounds):
        for method in methods:
            seconds[method].append(worker(method=method)["seconds"])
    worker.close()
    peaks = {}
    for method in methods:
        fresh = start(model, methods)
        peaks[method] = fresh(method=method, memory=True)["bytes"]
        fresh.close()
    return {"model": model, **worker.about, "seconds": seconds, "bytes": peaks}


def table(rows: list[dict]) -> list[str]:
    """Gradients per product, median [range] over rounds; peak memory in units of the gradient's."""
    others = [method for method in rows[0]["seconds"] if method != "gradient"]
    lines = ["| model | gradient | " + " | ".join(others) + " |", "| --- | ---: " + "| ---: " * len(others) + "|"]
    for row in rows:
        unit = np.array(row["seconds"]["gradient"])
        cells = [f"{row['model']}, {row['parameters'] / 1e6:.1f}M, {row['shape'][0]} x {row['shape'][1]} tokens"]
        cells.append(f"{np.median(unit):.2f} s, {row['bytes']['gradient'] / 2**20:.0f} MiB")
        for method in others:
            ratio = np.array(row["seconds"][method]) / unit
            memory = row["bytes"][method] / row["bytes"]["gradient"]
            cells.append(f"{np.median(ratio):.2f} [{ratio.min():.2f}, {ratio.max():.2f}]; {memory:.1f} x")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(results: dict) -> str:
    about = results["environment"]
    text = (
        f"{about['date']}, {about['cpu']}, {about['threads']} threads of {about['cores']} cores, torch "
        f"{about['versions']['torch']}. GPU: not measured. Gradients per product, median [range] over the rounds; peak "
        "memory beyond the model's, in units of the gradient's. Eager attention, PPO's mean loss, all parameters."
    )
    return "\n".join([text, "", *table(results["rows"])])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small Llama alone, nothing written")
    arguments = parser.parse_args()
    began = time.perf_counter()
    rows = []
    for model in ("llama",) if arguments.quick else MODELS:
        print(f"{time.perf_counter() - began:5.0f} s  {model}", flush=True)
        methods = OURS if arguments.quick else (*OURS, PEER)
        rows.append(measure(model, methods, 2 if arguments.quick else ROUNDS[model]))
    about = {
        "date": date.today().isoformat(), "cpu": cpu_model(), "cores": os.cpu_count(), "threads": THREADS,
        "python": platform.python_version(), "system": platform.system(), "versions": rows[0]["versions"],
    }  # fmt: skip
    results = {"environment": about, "rows": rows, "minutes": (time.perf_counter() - began) / 60}
    text = report(results)
    print(f"\n{text}\n")
    if not arguments.quick:
        (HERE / "hvp.json").write_text(json.dumps(results, indent=1) + "\n")
        update_readme(MARK, text)
