"""Does CAPO's m_F know the KL of an update, token by token?  ->  capo.pdf

    python figures/capo.py [analysis/capo.parquet] [--model tiny] [--optimizer adamw] [--out figures/capo.pdf]     (3 s)

The table is written by `analysis/capo.py`. Nothing but its rows is drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from lcogeom.plots import capo_figure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", type=Path, default=Path("analysis/capo.parquet"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd"])
    parser.add_argument("--out", type=Path, default=Path("figures/capo.pdf"))
    arguments = parser.parse_args()
    capo_figure(pd.read_parquet(arguments.table), arguments.model, arguments.optimizer).savefig(arguments.out)
    print(arguments.out)
