"""Does the gradient point to where the run ends up?  ->  directionality.csv

    python analysis/directionality.py RUN [RUN ...] [--out analysis/directionality.csv]        (10 s a run)

RUN: folders written by `lcogeom replay`. cos(-g_t, theta_end - theta_t) from the recorded sketches, a row for each
objective and seed. An update counts as surely positive or negative beyond two standard errors of the sketch. theta_end
- theta_t holds the update's own step, which follows the gradient whatever the objective; `mean_later` is the mean of
cos(-g_t, theta_end - theta_t+1), without it. `five_apart` is the mean of cos(g_t, g_t+5): do gradients keep their
direction, or swing? The CSV's interval is the sketch's, two standard errors; in the table on
the screen it is that of the mean over seeds (Student, 95 %).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy import stats

import lcogeom as lg

MEANS = ("mean", "mean, own step left out", "cos(g_t, g_t+5)")


def one_seed(found: lg.Sketches) -> dict[str, float]:
    """The row of one objective and seed; updates without a direction (no gradient left) are left out of it."""
    towards = lg.directionality(found.gradients, found.steps)
    later = lg.directionality(found.gradients[:-1], found.steps[1:])
    five_apart = np.diag(lg.sketch_cosines(found.gradients).values, 5)
    known = np.isfinite(towards.values)
    if not known.any():
        return {"updates": 0}
    cosine, error = towards.values[known], towards.standard_error[known]
    return {
        "updates": int(known.sum()),
        "share_positive": float(np.mean(cosine > 0)),
        "share_surely_positive": float(np.mean(cosine > 2 * error)),
        "share_surely_negative": float(np.mean(cosine < -2 * error)),
        "first": cosine[0],
        "last": cosine[-1],
        "mean": cosine.mean(),
        "mean_low": cosine.mean() - 2 * error.mean(),  # errors of one run's updates go together at worst
        "mean_high": cosine.mean() + 2 * error.mean(),
        "mean_later": mean_of_known(later.values),
        "five_apart": mean_of_known(five_apart),
    }


def mean_of_known(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def over_seeds(values: pd.Series) -> str:
    """Mean and its 95 % interval; one seed has none."""
    mean = values.mean()
    if len(values) < 2:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("analysis/directionality.csv"))
    arguments = parser.parse_args()

    tables = []
    for run in map(lg.load_run, arguments.runs):
        members = run.updates[["model", "variant", "seed"]].drop_duplicates().to_dict("records")
        rows = pd.DataFrame([labels | one_seed(run.sketches(**labels)) for labels in members])
        tables.append(rows)
        table = Table(
            title=f"{rows['model'].iloc[0]}: cos(-g_t, theta_end - theta_t), {rows['seed'].nunique()} seed(s)"
        )
        table.add_column("objective", no_wrap=True)
        for heading in (*("> 0, %", "surely > 0, %", "surely < 0, %"), *("first", "last"), *MEANS):
            table.add_column(heading, justify="right")
        for variant in run.meta["replay"]["objectives"]:
            seeds = rows[rows["variant"] == variant]
            shares = [seeds[name] for name in ("share_positive", "share_surely_positive", "share_surely_negative")]
            ends = [f"{seeds[name].mean():.3f}" for name in ("first", "last")]
            means = [over_seeds(seeds[name]) for name in ("mean", "mean_later", "five_apart")]
            table.add_row(variant, *(f"{100 * share.mean():.1f}" for share in shares), *ends, *means)
        Console(width=160).print(table)
    pd.concat(tables, ignore_index=True).to_csv(arguments.out, index=False)
    print(arguments.out)
