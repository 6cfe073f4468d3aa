"""Make the bench's run folders, each once, and again where the catalogue has changed.

python analysis/faults/make_runs.py OUT [--half tuning] [--only TEXT] [--workers 1]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import library_loops
import plain_loop
import torch
import transformers
from catalogue import Case, faulty_cases, healthy_cases
from plain_loop import Setup
from rich.console import Console
from rich.progress import track

import lcogeom as lg

RUN = {"plain": plain_loop.run, "ours": library_loops.run_ours, "trl": library_loops.run_trl}
FOLDERS = {"tuning": "tune", "held-out": "held_out"}


def folder_of(out: Path, case: Case) -> Path:
    return out / FOLDERS[case.half] / case.name


def make(out: Path, name: str, half: str) -> None:
    """One run, with fault.json beside it; a run that ended with an error says so there."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    case = next(one for one in cases() if (one.name, one.half) == (name, half))
    folder = folder_of(out, case)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began, error = time.monotonic(), None
    at = {} if case.way is None else case.way.make(case.size)
    if case.way is not None and case.first + case.way.seen[0] >= case.setup.updates:
        raise ValueError(f"{case.name}: the run ends before its fault can be seen; give it more updates.")
    try:
        RUN[case.loop](case.setup, folder / "run", seed=case.seed, cache=out / "models", at=at, first=case.first)
    except Exception as raised:
        if case.way is None or case.way.cause != "non-finite":  # whose faults may well stop a loop
            raise
        error = f"{type(raised).__name__}: {raised}"
        (folder / "error.txt").write_text(traceback.format_exc())
    record = case.record()
    if case.way is not None and case.way.until is not None:
        record["seen"] = [record["seen"][0], past(folder / "run", case.first, *case.way.until)]
    record |= {"error": error, "seconds": time.monotonic() - began}
    unfinished = folder / ".fault.json"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(unfinished, folder / "fault.json")


def made(folder: Path, case: Case) -> bool:
    """Whether the run is there, of the case as the catalogue has it now."""
    file = folder / "fault.json"
    if not file.exists():
        return False
    there, wanted = json.loads(file.read_text()), json.loads(json.dumps(case.record()))
    there["setup"] = json.loads(json.dumps(asdict(Setup(**there["setup"]))))  # settings newer than the run: defaults
    gradual = case.way is not None and case.way.until is not None  # its window was read off the run
    return all(there.get(key) == value for key, value in wanted.items() if not (gradual and key == "seen"))


def past(run: Path, first: int, column: str, bound: float) -> int:
    """The first update at which a column is past a bound: above it, or, the entropy, that share of its first mean."""
    values = lg.load_run(run).updates.set_index("step")[column].astype(float)
    if column == "entropy":
        there = values.rolling(3, min_periods=1).mean() < bound * values.iloc[:5].mean()
    else:
        there = values > bound
    if there.loc[: first - 1].any():
        raise ValueError(f"{run}: {column} is past {bound} before the fault; the loop is not healthy without it.")
    if not there.any():
        raise ValueError(f"{run}: the fault left no trace, {column} is never past {bound}; make it stronger.")
    return int(values.index[there][0])


def cases() -> list[Case]:
    return [*faulty_cases(), *healthy_cases()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--half", choices=FOLDERS)
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    wanted = [case for case in cases() if arguments.half in (None, case.half) and arguments.only in case.name]
    missing = [case for case in wanted if not made(folder_of(arguments.out, case), case)]
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(make, arguments.out, case.name, case.half) for case in missing]
        for job in track(jobs, "runs", console=Console(stderr=True)):
            job.result()
