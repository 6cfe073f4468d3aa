"""Do gradients keep their direction, and do they point to where the run ends up?  ->  directionality.pdf

    python figures/directionality.py RUN [--out figures/directionality.pdf]        (10 s)

RUN: a folder written by `lcogeom replay`. Above: cosines between all gradients of a run, seed 0, for four objectives;
below: cos(-g_t, theta_end - theta_t) for every objective. Nothing but recorded data is drawn, from the sketches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

import lcogeom as lg
from lcogeom.plots import directions_figure, title_of

MAPS = ("sft", "ppo-unclipped:positive", "ppo", "lco-kld")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("figures/directionality.pdf"))
    arguments = parser.parse_args()
    run = lg.load_run(arguments.run)

    cosines, tables = {}, []
    for labels in run.updates[["variant", "seed"]].drop_duplicates().to_dict("records"):
        found = run.sketches(**labels)
        towards = lg.directionality(found.gradients, found.steps)
        columns = {"step": found.updates, "cosine": towards.values, "standard_error": towards.standard_error}
        tables.append(pd.DataFrame({**labels, **columns}))
        if labels["seed"] == 0:
            cosines[labels["variant"]] = lg.sketch_cosines(found.gradients).values
    shown = [name for name in MAPS if name in cosines] or list(cosines)[: len(MAPS)]
    figure = directions_figure(
        {name: cosines[name] for name in shown}, pd.concat(tables), f"{title_of(run)}; above: seed 0"
    )
    figure.savefig(arguments.out)
    print(arguments.out)
