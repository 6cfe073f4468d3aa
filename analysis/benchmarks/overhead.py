"""What does the recorder cost: time and memory of an update with it, over the same update without it?

    python analysis/benchmarks/overhead.py                  (30 minutes on 2 idle cores)
    python analysis/benchmarks/overhead.py --models tiny --out FILE         (1 minute)

One update is forward, backward and AdamW of a GRPO-like loss on 8 x 128 tokens of a batch with advantages; the
recorder is `lcogeom.attach` as it comes (256 tokens an update, sketches of 64 KiB). 20 interleaved pairs of turns, in
one process on one model, the recorder on and off; a turn is two updates of SmolLM2 or ten of `tiny`, with their share
of a flush (by itself the recorder makes one every ten updates). Before them a few turns of a process that has never had
a recorder: it must not slow down a loop that it has left, either. Peak memory: resident set of one process with and one
without it.
Writes overhead.json beside this file and the numbers into analysis/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from logit_hessian import cpu_model

import lcogeom as lg
from lcogeom.models import LoadedModel, load_model

HERE = Path(__file__).parent
MARKS = ("<!-- overhead: written by the script -->", "<!-- overhead: end -->")
PAIRS, NEVER = 20, 4
UPDATES = {"smollm2": 2, "tiny": 10}
"""Updates of one turn."""
LENGTH = {"smollm2": 128, "tiny": 128}


class Loop:
    """A training loop of one's own: one update a call, with or without a recorder beside it."""

    def __init__(self, loaded: LoadedModel, length: int) -> None:
        rng = torch.Generator().manual_seed(0)
        self.model = loaded.model
        device = next(self.model.parameters()).device
        width = min(self.model.config.vocab_size, 40_000)
        self.ids = torch.randint(0, width, (8, length), generator=rng).to(device)
        self.mask = torch.ones_like(self.ids, dtype=torch.bool)
        self.mask[:, : length // 4] = False
        self.advantages = torch.randn(8, 1, generator=rng).expand(8, length).to(device).contiguous()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)

    def update(self, probe: lg.Probe | None) -> None:
        logits = self.model(input_ids=self.ids, use_cache=False).logits[:, :-1]
        logprobs = torch.log_softmax(logits.float(), -1).gather(2, self.ids[:, 1:, None]).squeeze(2)
        ratio = (logprobs - logprobs.detach()).exp()
        mask, advantages = self.mask[:, 1:], self.advantages[:, 1:]
        loss = -(ratio * advantages)[mask].mean()
        if probe is not None:
            old = torch.nn.functional.pad(logprobs.detach(), (1, 0))
            probe.batch(
                input_ids=self.ids, action_mask=self.mask, advantages=self.advantages, old_logprobs=old, loss=loss
            )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure_time(name: str, threads: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of an update in each turn, without and with the recorder, its share of a flush included."""
    torch.set_num_threads(threads)
    loop, updates = Loop(load_model(name), LENGTH[name]), UPDATES[name]
    seconds: dict[str, list[float]] = {"never": [], "without": [], "with": []}
    for turn in range(NEVER + 1):
        began = time.perf_counter()
        for _ in range(updates):
            loop.update(None)
        if turn:  # the first warms up
            seconds["never"].append((time.perf_counter() - began) / updates)
    for turn in range(PAIRS + 1):
        for kind in ("without", "with") if turn % 2 else ("with", "without"):
            probe = None
            if kind == "with":
                probe = lg.attach(loop.model, loop.optimizer, folder / f"{threads}-{turn}", objective="ppo")
                loop.update(probe)  # the first looks at the weights once more than the others
            else:
                loop.update(None)
            began = time.perf_counter()
            for _ in range(updates):
                loop.update(probe)
            took = time.perf_counter() - began
            if probe is not None:
                began = time.perf_counter()
                probe.flush()  # of updates + 1 updates
                took += (time.perf_counter() - began) * updates / (updates + 1)
                probe.close()
            if turn:  # the first warms up
                seconds[kind].append(took / updates)
    return seconds


def measure_memory(name: str, recorded: bool) -> float:
    """Peak resident set of this process, MiB, over six updates."""
    loop = Loop(load_model(name), LENGTH[name])
    with tempfile.TemporaryDirectory() as folder:
        probe = lg.attach(loop.model, loop.optimizer, Path(folder) / "run", objective="ppo") if recorded else None
        for _ in range(6):
            loop.update(probe)
        if probe is not None:
            probe.close()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def in_a_process(name: str, recorded: bool, threads: int) -> float:
    command = [sys.executable, __file__, "--memory", name, "with" if recorded else "without"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """(median, 2.5 %, 97.5 %) of the median, by bootstrap."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def report(results: dict) -> str:
    about = results["environment"]
    lines = [
        f"{about['date']}, {about['cpu']}, torch {about['torch']}, float32, 8 x 128 tokens. GPU: not measured.",
        "",
        "| model | threads | update, s: before any recorder | between | with it | ratio of the last two, median [95 %] "
        "of the pairs | peak MiB | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        plain, recorded = np.array(row["without"]), np.array(row["with"])
        middle, low, high = interval(recorded / plain)
        memory: list[float] = row["memory"]
        lines.append(
            f"| {row['model']} | {row['threads']} | {np.median(row['never']):.3f} | {np.median(plain):.3f} | "
            f"{np.median(recorded):.3f} | "
            f"{middle:.3f} [{low:.3f}, {high:.3f}] | {memory[0]:.0f} | {memory[1] / memory[0]:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "tiny"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--out", type=Path, default=HERE / "overhead.json")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(measure_memory(arguments.memory[0], arguments.memory[1] == "with"))
        sys.exit()
    PAIRS = arguments.pairs
    rows = []
    for model in arguments.models:
        for threads in arguments.threads:
            with tempfile.TemporaryDirectory() as folder:
                seconds = measure_time(model, threads, Path(folder))
            print(model, threads, json.dumps(seconds), flush=True)
            memory = [in_a_process(model, recorded, threads) for recorded in (False, True)]
            rows.append({"model": model, "threads": threads, **seconds, "memory": memory})
            print(
                model,
                threads,
                f"{interval(np.array(seconds['with']) / np.array(seconds['without']))}",
                memory,
                flush=True,
            )
    about = {"date": date.today().isoformat(), "cpu": cpu_model(), "torch": torch.__version__}
    results = {"environment": about, "rows": rows}
    text = report(results)
    print(f"\n{text}\n")
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.out == HERE / "overhead.json":
        file = HERE.parent / "README.md"
        before, rest = file.read_text().split(MARKS[0])
        file.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
