"""Which objectives explode on a fixed batch, and how much of their loss is convex?  ->  stability.csv

    python analysis/stability.py RUN [RUN ...] [--out analysis/stability.csv]        (2 s)

RUN: folders written by `lcogeom replay`. Gradient norm: the paper's, the unweighted mean of the Frobenius norms of all
q, k and v projection gradients before clipping. With several seeds: the mean and, in brackets, the range.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

import lcogeom as lg

NORM = "qkv_mean_frobenius"


def one_seed(updates: pd.DataFrame) -> pd.Series:
    """The row of one objective and seed."""
    updates = updates.sort_values("step")
    tokens = updates["tokens"].astype(float)
    norms = updates[NORM].astype(float)
    return pd.Series(
        {
            "convex_share": (updates["convex_share"].astype(float) * tokens).sum() / tokens.sum(),
            "first_norm": norms.iloc[0],
            "largest_norm": norms.max(),
            "largest_at": float(updates["step"].loc[norms.idxmax()]),
            "last_norm": norms.iloc[-1],
            "final_action_prob": float(updates["action_prob"].iloc[-1]),
        }
    )


def spread(values: pd.Series, form: str) -> str:
    """Mean and range over seeds."""
    low, high = form.format(values.min()), form.format(values.max())
    return low if low == high else f"{form.format(values.mean())} [{low}, {high}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("analysis/stability.csv"))
    arguments = parser.parse_args()

    tables = []
    for run in map(lg.load_run, arguments.runs):
        keys = ["model", "variant", "seed"]
        data = run.updates[run.updates.columns.difference(keys)].columns
        rows = run.updates.groupby(keys, sort=False)[[*data]].apply(one_seed).reset_index()
        tables.append(rows)
        updates = int(run.updates["step"].max()) + 1
        table = Table(
            title=f"{rows['model'].iloc[0]}: {updates} updates on one batch, {rows['seed'].nunique()} seed(s)"
        )
        table.add_column("objective", no_wrap=True)
        for heading in ("convex tokens, %", "first grad norm", "largest grad norm", "at update", "final action prob"):
            table.add_column(heading, justify="right", no_wrap=True)
        for variant in run.meta["replay"]["objectives"]:
            seeds = rows[rows["variant"] == variant]
            table.add_row(
                variant,
                spread(100 * seeds["convex_share"], "{:.1f}"),
                spread(seeds["first_norm"], "{:.2g}"),
                spread(seeds["largest_norm"], "{:.2g}"),
                spread(seeds["largest_at"], "{:.0f}"),
                spread(seeds["final_action_prob"], "{:.2g}"),
            )
        Console(width=140).print(table)
    pd.concat(tables, ignore_index=True).to_csv(arguments.out, index=False)
    print(arguments.out)
