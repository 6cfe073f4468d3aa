"""Reading a folder while another process writes to it: whole updates only, none that was there goes away."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import lcogeom as lg

UPDATES = 60
RESUME = [True, True, 60, 40]
WRITE = f"""
import sys
from lcogeom.runs import RunWriter
from tests.runs.folders import add
for session, resume in enumerate({RESUME}):
    writer = RunWriter(sys.argv[1], {{}}, resume=resume)
    first = writer.next_update
    add(writer, range(first, first + {UPDATES}), per_part=2, loss=1000.0 * session)
    writer.close()
"""


def test_readers_see_whole_updates(tmp_path: Path) -> None:
    """Four sessions: the second goes on after the last update, the others from older ones."""
    path = tmp_path / "run"
    writer = subprocess.Popen([sys.executable, "-c", WRITE, str(path)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not path.exists():
        assert writer.poll() is None
        time.sleep(0.001)
    lengths = [0]
    while writer.poll() is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run = lg.load_run(path)
        steps = run.updates["step"].tolist()
        assert steps == list(range(len(steps)))
        assert run.tokens["step"].tolist() == [step for step in steps for _ in range(3)]
        assert run.norms["step"].tolist() == [step for step in steps for _ in range(2)]
        sessions = [int(loss) // 1000 for loss in run.updates["loss"]]
        assert sessions == sorted(sessions)  # superseded rows are not mixed with those that came after
        assert len(steps) >= lengths[-1] or lengths[-1] > len(steps) >= min(RESUME[2:])
        lengths.append(len(steps))
    assert writer.returncode == 0
    assert len(set(lengths)) > 5  # it was written while it was read
    assert lg.load_run(path).updates["loss"].tolist() == [*range(40), *range(3040, 3040 + UPDATES)]
