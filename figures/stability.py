"""Does the gradient explode, and for whom?  ->  stability.pdf

    python figures/stability.py RUN [RUN ...] [--out figures/stability.pdf]        (2 s)

RUN: folders written by `lcogeom replay`, one column of panels each. Nothing but recorded data is drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lcogeom as lg
from lcogeom.plots import stability_figure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("figures/stability.pdf"))
    arguments = parser.parse_args()
    stability_figure([lg.load_run(run) for run in arguments.runs]).savefig(arguments.out)
    print(arguments.out)
