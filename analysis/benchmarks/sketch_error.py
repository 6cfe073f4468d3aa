"""How far off are cosines of real gradients from their sketches, and what does a sketch cost?

    python analysis/benchmarks/sketch_error.py              (6 minutes on 2 idle cores, 14 GB of temporary files)
    python analysis/benchmarks/sketch_error.py --model tiny --out FILE      (10 seconds)

51 gradients of one replay batch: 7 objectives, the tokens with A > 0 and with A < 0, and each completion as a
micro-batch, at the weights after 1, 6 and 12 updates of LCO-KLD. All pairs of their sketches (64 KiB) against the exact
cosines, from copies on disk in bfloat16, whose rounding moves a cosine by less than 1e-5. Then the time of a sketch
beside that of the update whose gradient it sketches, in turns, at 1 and 2 threads.
Writes sketch_error.json beside this file and the numbers into analysis/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import torch
from logit_hessian import cpu_model
from torch import Tensor

import lcogeom as lg
from lcogeom.models import LoadedModel, load_model
from lcogeom.training.replay import (
    DEFAULT_OBJECTIVES,
    ReplayBatch,
    ReplaySettings,
    completion_logits,
    make_batch,
    one_update,
    variant_objective,
)

HERE = Path(__file__).parent
MARKS = ("<!-- sketch_error: written by the script -->", "<!-- sketch_error: end -->")
STATES = (1, 6, 12)  # not 0: with every ratio 1, several objectives have one gradient
OBJECTIVES = [name for name in DEFAULT_OBJECTIVES if name != "reinforce:negative"]  # exactly -1 times SFT's gradient
COLUMNS = 2**16  # parameters looked at together
ROUNDS = {"replay batch": 5, "8 x 128 tokens": 3}

Gradients = dict[str, Callable[[], Tensor]]


def losses(loaded: LoadedModel, batch: ReplayBatch) -> Gradients:
    """Name -> loss of the batch: per objective, per sign of the advantage (PPO, LCO-KLD), per completion (PPO)."""
    mask = batch.sequences.action_mask
    advantages = (2 * batch.rewards - 1)[:, None].expand(mask.shape)[mask]
    rows = mask.nonzero()[:, 0]

    def loss(name: str, chosen: Tensor | None = None) -> Callable[[], Tensor]:
        minimised, fixed = variant_objective(name)
        tokens = lg.TokenBatch(
            actions=batch.sequences.input_ids[mask],
            advantages=advantages if fixed is None else torch.full_like(advantages, fixed),
            old_logprobs=batch.old_logprobs[mask],
            old_logits=batch.old_logits,
        )
        weights = torch.ones_like(advantages) if chosen is None else chosen.to(advantages)
        return lambda: (
            (minimised.loss(completion_logits(loaded.model, batch.sequences), tokens) * weights).sum() / weights.sum()
        )

    found = {name: loss(name) for name in OBJECTIVES}
    for name in ("ppo", "lco-kld"):
        found |= {f"{name}, A > 0": loss(name, advantages > 0), f"{name}, A < 0": loss(name, advantages < 0)}
    return found | {f"ppo, completion {row}": loss("ppo-unclipped:positive", rows == row) for row in range(len(mask))}


def gradients(loaded: LoadedModel, batch: ReplayBatch) -> Iterator[tuple[int, str]]:
    """(state, name) of each gradient, which then lies in `.grad`; LCO-KLD moves the weights in between."""
    mover = torch.optim.AdamW(loaded.model.parameters(), lr=1e-5, weight_decay=0.0)
    minimised, _ = variant_objective("lco-kld")
    made = 0
    for state in STATES:
        for _ in range(made, state):
            one_update(loaded.model, mover, minimised, batch)
        made = state
        for name, loss in losses(loaded, batch).items():
            loaded.model.zero_grad()
            loss().backward()
            if any(parameter.grad is not None and parameter.grad.any() for parameter in loaded.model.parameters()):
                yield state, name


def measure_error(loaded: LoadedModel, batch: ReplayBatch, folder: Path) -> dict:
    """Sketch and keep every gradient; then the exact cosines, a stretch of parameters at a time."""
    parameters = list(loaded.model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    names, sketches, kept = [], [], []
    for state, name in gradients(loaded, batch):
        found = [parameter.grad for parameter in parameters]
        sketches.append(lg.sketch(found).numpy())
        file = torch.from_file(str(folder / f"{len(kept)}.bf16"), shared=True, size=total, dtype=torch.bfloat16)
        torch.cat([gradient.reshape(-1).bfloat16() for gradient in found], out=file)
        kept.append(file)
        names.append((state, name))
    products = torch.zeros(len(kept), len(kept), dtype=torch.float64)
    for start in range(0, total, COLUMNS):
        stretch = torch.stack([file[start : start + COLUMNS] for file in kept]).float()
        products += (stretch @ stretch.T).double()
    norms = products.diagonal().sqrt()
    exact = (products / norms[:, None] / norms).numpy()
    estimate = lg.sketch_cosines(np.stack(sketches))
    pairs = np.triu_indices(len(names), 1)
    off = (estimate.values - exact)[pairs]
    return {
        "parameters": total,
        "gradients": len(names),
        "pairs": len(off),
        "rms_error": float(np.sqrt(np.mean(off**2))),
        "largest_error": float(np.abs(off).max()),
        "rms_standard_error": float(np.sqrt(np.mean(estimate.standard_error[pairs] ** 2))),
        "cosines_quantiles": np.quantile(exact[pairs], [0, 0.05, 0.5, 0.95, 1]).tolist(),
        "directions": directions(names, exact),
    }


def directions(names: list[tuple[int, str]], exact: np.ndarray) -> dict[str, list[float]]:
    """What the exact cosines say, state by state."""
    at = {key: place for place, key in enumerate(names)}

    def of(state: int, one: str, other: str) -> float:
        found = [at.get((state, name)) for name in (one, other)]
        return float("nan") if None in found else float(exact[found[0], found[1]])

    questions = {
        "PPO: tokens with A > 0, with A < 0": ("ppo, A > 0", "ppo, A < 0"),
        "LCO-KLD: tokens with A > 0, with A < 0": ("lco-kld, A > 0", "lco-kld, A < 0"),
        "SFT, PPO unclipped with A > 0": ("sft", "ppo-unclipped:positive"),
        "PPO, LCO-KLD": ("ppo", "lco-kld"),
        "LCO-KLD, LCO-MSE": ("lco-kld", "lco-mse"),
        "LCO-MSE, LCO-LCH": ("lco-mse", "lco-lch"),
    }
    table = {question: [of(state, *pair) for state in STATES] for question, pair in questions.items()}
    parts = []
    for state in STATES:
        rows = [place for (s, name), place in at.items() if s == state and "completion" in name]
        parts.append(float(exact[np.ix_(rows, rows)][np.triu_indices(len(rows), 1)].mean()))
    return table | {"completions as micro-batches, mean over pairs": parts}


def measure_cost(loaded: LoadedModel, batch: ReplayBatch) -> list[dict]:
    """Seconds of an update (forward, backward, AdamW) and of a sketch of its gradient, in turns."""
    model, rows = loaded.model, []
    minimised, _ = variant_objective("ppo")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = batch.sequences.input_ids.flatten().repeat(64)[: 8 * 128].view(8, 128)

    def plain() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    jobs = {"replay batch": lambda: one_update(model, optimizer, minimised, batch), "8 x 128 tokens": plain}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, update in jobs.items():
            seconds: dict[str, list[float]] = {"update": [], "sketch": []}
            for turn in range(ROUNDS[name] + 1):
                began = time.perf_counter()
                update()
                between = time.perf_counter()
                lg.sketch([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
                if turn:  # the first warms up
                    seconds["update"].append(between - began)
                    seconds["sketch"].append(time.perf_counter() - between)
            rows.append({"threads": threads, "batch": name, **seconds})
    return rows


def measure_memory(loaded: LoadedModel) -> float | None:
    """MiB beside the gradient while it is sketched: the resident set's peak, which Linux lets a process set back."""
    found = [parameter.grad for parameter in loaded.model.parameters()]
    lg.sketch(found)
    try:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        lg.sketch(found)
        return resident("VmHWM") - before
    except OSError:
        return None


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def report(results: dict) -> str:
    about, error = results["environment"], results["error"]
    low, q05, middle, q95, high = error["cosines_quantiles"]
    lines = [
        f"{about['date']}, {about['cpu']}, torch {about['torch']}, model {about['model']}, {error['parameters']:,} "
        "parameters in float32. GPU: not measured.", "",
        f"- **Error.** {error['pairs']:,} pairs of {error['gradients']} gradients, sketched to 64 KiB: rms error "
        f"{error['rms_error']:.4f}, largest {error['largest_error']:.4f}; rms of the standard errors "
        f"stated {error['rms_standard_error']:.4f}. The exact cosines: median {middle:.2f}, 5 to 95 % {q05:.2f} to "
        f"{q95:.2f}, all {low:.2f} to {high:.2f}.",
        f"- **Memory** beside the gradient: {results['memory']:.1f} MiB; the gradient has "
        f"{error['parameters'] * 4 / 2**20:.0f}."
        if results["memory"] is not None else "- **Memory**: not measured.",
        "- **Time** of one sketch and of the update whose gradient it sketches (forward, backward, AdamW): medians; "
        "share: median [range] of the turns. The recorder makes two an update: of the gradient, and of the weights, in "
        "float64 (with copies=True: of the step instead); they take both threads.",
        "", "| threads | batch | update, s | sketch, s | sketch / update |", "| ---: | --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in results["cost"]:
        share = np.array(row["sketch"]) / np.array(row["update"])
        lines.append(
            f"| {row['threads']} | {row['batch']} | {np.median(row['update']):.2f} | {np.median(row['sketch']):.3f} | "
            f"{100 * np.median(share):.1f} % [{100 * share.min():.1f}, {100 * share.max():.1f}] |"
        )
    lines += ["", "Exact cosines of gradients on the same batch:", ""]
    lines += ["| pair | " + " | ".join(f"after {state}" for state in STATES) + " |", "| --- " + "| ---: " * 3 + "|"]
    for question, values in error["directions"].items():
        lines.append(f"| {question} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=HERE / "sketch_error.json")
    arguments = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(os.cpu_count() or 1)
    loaded = load_model(arguments.model)
    batch = make_batch(loaded, ReplaySettings(model=arguments.model), 0, lambda *_: None)
    about = {"date": date.today().isoformat(), "cpu": cpu_model(), "torch": torch.__version__, "model": arguments.model}
    with tempfile.TemporaryDirectory() as folder:
        results = {"environment": about, "error": measure_error(loaded, batch, Path(folder))}
    print(f"{time.perf_counter() - began:5.0f} s  errors", flush=True)
    results["memory"] = measure_memory(loaded)
    results["cost"] = measure_cost(loaded, batch)
    results["minutes"] = (time.perf_counter() - began) / 60
    text = report(results)
    print(f"\n{text}\n")
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.out == HERE / "sketch_error.json":
        file = HERE.parent / "README.md"
        before, rest = file.read_text().split(MARKS[0])
        file.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
