"""Does every method learn, with the same rollouts?  ->  training.pdf

    python figures/training.py [analysis/training.csv] [--out figures/training.pdf]        (2 s)

The table: written by analysis/training.py. Several tables are drawn side by side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from lcogeom.plots import training_figure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", type=Path, default=[Path("analysis/training.csv")])
    parser.add_argument("--out", type=Path, default=Path("figures/training.pdf"))
    arguments = parser.parse_args()
    training_figure(pd.concat(map(pd.read_csv, arguments.tables))).savefig(arguments.out)
    print(arguments.out)
