"""Does every method learn in the trainer, with the same rollouts?  ->  training.csv

    python analysis/training.py [--methods grpo lco-kld ...] [--tasks ...] [--seeds 5] [--runs runs/training]
    python analysis/training.py --tasks products --seeds 1 --out FILE       (15 minutes on busy cores)
    (8 minutes on 2 idle cores: two worker processes with one thread each)

`tiny` on one-digit and on two-digit addition: seven methods, as many completions for each (gold answers for SFT), the
learning rate of each method the same on a task, but for GENTLER's. SmolLM2 on one-digit products: LCO-KLD and GRPO, by
the presets' settings. Held-out reward: accuracy of sampled completions of problems that training never draws. Runs
that are there already are not made again. Printed: means over seeds with Student's 95 % interval, for the difference
of each seed as well. The table holds one row per run and evaluation, for figures/training.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats

import lcogeom as lg
from lcogeom.training import override, preset

METHODS = ("sft", "reinforce", "ppo", "grpo", "lco-kld", "lco-mse", "lco-lch")
TASKS = {
    "addition-1": ["updates=100", "learning_rate=1e-4", "held_out_samples=20"],
    # Two digits learn slowly: constant rates left GRPO at .58 to .61 of .55.
    "addition-2": [
        *("updates=120", "inner_epochs=1", "prompts=32", "held_out_samples=4"),
        *("learning_rate=6e-4", "warmup=0.2", "schedule=linear"),
    ],
}
# At 6e-4 both fell to a reward of 0 (seed 0); 2e-4 was chosen on a seed that the table does not hold (1e-4 was slower).
GENTLER = {("addition-2", method): "learning_rate=2e-4" for method in ("lco-mse", "lco-lch")}
PRODUCTS = "products"
SMOLLM2_METHODS = ("grpo", "lco-kld")
WORKERS = 2


def folder(runs: Path, task: str, method: str, seed: int) -> Path:
    return runs / task / method / f"seed-{seed}"


def make(runs: Path, task: str, method: str, seed: int) -> None:
    """One run, in a worker process."""
    from lcogeom.training.trainer import train

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    changes = ["sketch=0", "tokens_per_update=64", f"seed={seed}"]
    if task != PRODUCTS:
        changes += [f"task={task}", *TASKS[task], "evaluate_every=10"]
        changes += [GENTLER[task, method]] if (task, method) in GENTLER else []
    settings = override(preset(f"{'smollm2' if task == PRODUCTS else 'tiny'}-{method}"), changes)
    run = folder(runs, task, method, seed)
    train(settings, run, resume=run.exists(), labels={"variant": method})


def evaluations(runs: Path, task: str, method: str, seed: int) -> pd.DataFrame:
    """Held-out reward against completions trained on, and the run's seconds."""
    updates = lg.load_run(folder(runs, task, method, seed)).updates.sort_values("step")
    per_rollout = updates["rollouts"].astype(float).iloc[0]
    before = updates[updates["heldout_reward"].notna()]
    after = updates[updates["heldout_reward_after"].notna()]
    return pd.DataFrame(
        {
            "task": task,
            "method": method,
            "seed": seed,
            "rollouts": [*(before["rollouts"].astype(float) - per_rollout), *after["rollouts"].astype(float)],
            "heldout_reward": [*before["heldout_reward"].astype(float), *after["heldout_reward_after"].astype(float)],
            "seconds": float(updates["seconds"].max()),
        }
    )


def interval(values: np.ndarray, form: str) -> str:
    """Mean and Student's 95 % interval over seeds."""
    if len(values) < 2:
        return form.format(values.mean())
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{form} [{form}, {form}]".format(values.mean(), values.mean() - half, values.mean() + half)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, PRODUCTS], default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/training"))
    parser.add_argument("--out", type=Path, default=Path("analysis/training.csv"))
    arguments = parser.parse_args()

    wanted = [(task, seed, method) for task in arguments.tasks for seed in range(arguments.seeds) for method in METHODS]
    wanted = [
        (task, method, seed)
        for task, seed, method in wanted
        if method in arguments.methods and (task != PRODUCTS or method in SMOLLM2_METHODS)
    ]
    missing = [one for one in wanted if not list((folder(arguments.runs, *one) / "checkpoints").glob("step-*"))]
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(make, arguments.runs, *one) for one in missing]
        for job in track(jobs, "training", console=Console(stderr=True)):
            job.result()
    rows = pd.concat([evaluations(arguments.runs, *one) for one in wanted], ignore_index=True)
    rows.to_csv(arguments.out, index=False, float_format="%.6g")

    for task in arguments.tasks:
        completions = int(rows[rows["task"] == task]["rollouts"].max())
        table = Table(title=f"{task}: held-out reward, {completions:,} completions, {arguments.seeds} seeds")
        for heading in ("method", "before", "after", "gain", "best", "s"):
            table.add_column(heading, no_wrap=True)
        for method in [name for name in METHODS if (rows["task"].eq(task) & rows["method"].eq(name)).any()]:
            mine = rows[(rows["task"] == task) & (rows["method"] == method)].sort_values(["seed", "rollouts"])
            seeds = mine.groupby("seed")["heldout_reward"]
            first, last, best = seeds.first().to_numpy(), seeds.last().to_numpy(), seeds.max().to_numpy()
            seconds = mine.groupby("seed")["seconds"].first().to_numpy()
            table.add_row(
                method,
                interval(first, "{:.2f}"),
                interval(last, "{:.2f}"),
                interval(last - first, "{:.2f}"),
                interval(best, "{:.2f}"),
                f"{seconds.mean():.0f}",
            )
        Console(width=140).print(table)
    print(arguments.out)
