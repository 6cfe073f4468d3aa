"""Does the curvature that an update meets come through the logits, and has it the sign of the objective?

    python analysis/audit.py RUN [--out analysis/audit.csv]        (1 s)

RUN: a folder written by `lcogeom replay --audit-every k`. One row per objective. Through the logits:
|1/2 d^T G d| as a share of |1/2 d^T G d| + |1/2 d^T (H - G) d|. Unexplained: |remainder| / |actual change|.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

import lcogeom as lg


def measures(updates: pd.DataFrame) -> pd.Series:
    """What is said of some audited updates."""
    logits, network = updates["audit_gauss_newton"], updates["audit_residual"]
    rest = (updates["audit_remainder"] / updates["audit_actual"]).abs()
    return pd.Series(
        {
            "updates": len(updates),
            "through the logits, %": 100 * (logits.abs() / (logits.abs() + network.abs())).median(),
            "through the logits >= 0, %": 100 * (logits >= 0).mean(),
            "overshoot": updates["audit_overshoot"].median(),
            "loss fell, %": 100 * (updates["audit_actual"] < 0).mean(),
            "unexplained, %": 100 * rest.median(),
        }
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("analysis/audit.csv"))
    arguments = parser.parse_args()
    updates = lg.load_run(arguments.run).updates
    audited = updates[updates["audit_actual"].notna()]
    by_seed = audited.groupby(["variant", "seed"], sort=False).apply(measures, include_groups=False).reset_index()
    by_seed.to_csv(arguments.out, index=False)

    shown = Table(title="audited updates: medians, and their range over the seeds")
    shown.add_column("objective", no_wrap=True)
    for name in by_seed.columns.drop(["variant", "seed"]):
        shown.add_column(name, justify="right")
    for variant, some in by_seed.groupby("variant", sort=False):
        whole = measures(audited[audited["variant"] == variant])
        cells = [f"{whole['updates']:.0f}"]
        for name in whole.index[1:]:
            cells.append(f"{whole[name]:.3g} [{some[name].min():.3g}, {some[name].max():.3g}]")
        shown.add_row(str(variant), *cells)
    Console(width=150).print(shown)
    print(arguments.out)
