"""What does training do to the loss's curvature in the parameters?  ->  spectrum.pdf

    python figures/spectrum.py [TABLE] [--out figures/spectrum.pdf]        (2 s)

TABLE: analysis/spectrum.parquet, written by analysis/spectrum.py. Nothing but recorded data is drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from lcogeom.plots import density_figure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", type=Path, default=Path("analysis/spectrum.parquet"))
    parser.add_argument("--out", type=Path, default=Path("figures/spectrum.pdf"))
    arguments = parser.parse_args()
    density_figure(pd.read_parquet(arguments.table)).savefig(arguments.out)
    print(arguments.out)
