"""A long run is diagnosed in seconds, within the memory of a laptop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.test_large import TOKENS, UPDATES, WRITE

READ = """
import resource, sys, time
import lcogeom as lg
busy = time.process_time()
report = lg.diagnose(sys.argv[1])
print(report.updates, time.process_time() - busy, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_long_run(tmp_path: Path) -> None:
    """2.5 million tokens of 10,000 updates, every column a random number: below 20 s of work and 2 GiB."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / "run")], check=True, env=environment)
    read = [sys.executable, "-c", READ, str(tmp_path / "run")]
    said = subprocess.run(read, check=True, env=environment, capture_output=True, text=True).stdout
    updates, busy, kilobytes = map(float, said.split())
    print(f"{busy:.1f} s, {kilobytes / 2**20:.2f} GiB for {UPDATES * TOKENS:,} tokens")
    assert updates == UPDATES
    assert busy < 20
    assert kilobytes < 2 * 2**20
