"""A long run in many small parts is read in seconds, within the memory of a laptop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

UPDATES, TOKENS = 10_000, 250
WRITE = f"""
import sys
import numpy as np
from lcogeom.runs import RunWriter
from lcogeom.runs.columns import schema
writer, rng = RunWriter(sys.argv[1], {{}}), np.random.default_rng(0)
numbers = {{t: [f.name for f in schema(t) if str(f.type) == "double"] for t in ("updates", "tokens", "norms")}}
words = [f" word{{i}}" for i in range(2000)]
for step in range({UPDATES}):
    ids = rng.integers(0, 2000, {TOKENS})
    tokens = {{name: rng.normal(size={TOKENS}) for name in numbers["tokens"]}}
    tokens |= {{"step": [step] * {TOKENS}, "sequence": ids % 8, "position": ids % 32, "token_id": ids}}
    writer.add("tokens", tokens | {{"text": [words[i] for i in ids], "convex": (ids % 2).astype(float)}})
    norms = {{name: rng.normal(size=32) for name in numbers["norms"]}}
    writer.add("norms", norms | {{"step": [step] * 32, "name": [f"layers.{{i}}" for i in range(32)]}})
    writer.add("updates", {{name: [rng.normal()] for name in numbers["updates"]}} | {{"step": [step]}})
    if step % 10 == 9:
        writer.flush()
writer.close()
"""
READ = """
import resource, sys, time
import lcogeom as lg
start, busy = time.perf_counter(), time.process_time()
run = lg.load_run(sys.argv[1])
seconds, busy = time.perf_counter() - start, time.process_time() - busy
print(len(run.updates), len(run.tokens), seconds, busy, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_long_run(tmp_path: Path) -> None:
    """2.5 million tokens of 10,000 updates in 3,000 parts: below 20 s of work and 2 GiB, torch and all."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / "run")], check=True, env=environment)
    read = [sys.executable, "-c", READ, str(tmp_path / "run")]
    said = subprocess.run(read, check=True, env=environment, capture_output=True, text=True).stdout
    updates, tokens, seconds, busy, kilobytes = map(float, said.split())
    print(f"{seconds:.1f} s, {busy:.1f} s of them on a processor, {kilobytes / 2**20:.2f} GiB")
    assert (updates, tokens) == (UPDATES, UPDATES * TOKENS)
    assert busy < 20
    assert kilobytes < 2 * 2**20
