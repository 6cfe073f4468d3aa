"""How much of what an update did is curvature, and whose?  ->  audit.pdf

    python figures/audit.py RUN [--out figures/audit.pdf]        (2 s)

RUN: a folder written by `lcogeom replay --audit-every k`. Nothing but recorded data is drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lcogeom as lg
from lcogeom.plots import audit_figure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("figures/audit.pdf"))
    arguments = parser.parse_args()
    audit_figure(lg.load_run(arguments.run)).savefig(arguments.out)
    print(arguments.out)
