"""512 tokens at V = 49,152: what a Hessian takes beside the logits, as the resident set of a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMIT = 256  # MiB; a result of N x V in float64 is 192 of it

SCRIPT = """
import torch
import lcogeom as lg

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":")) / 1024

torch.set_num_threads(1)
N, V = 512, 49152
logits = torch.randn(N, V, generator=torch.Generator().manual_seed(0))
old = torch.full((N,), -10.0)
batch = lg.TokenBatch(torch.arange(N), torch.ones(N), old, sequences=torch.arange(N) // 64)
objective = {objective}
small = lg.TokenBatch(torch.arange(2), torch.ones(2), old[:2], sequences=torch.zeros(2, dtype=torch.long))
H = objective.hessian(logits[:2], small)  # libraries are loaded and threads started before the count begins
H.eigenvalue_range(), H.negative_count(), H.quadratic(logits[:2]), H @ logits[:2], objective.gradient(logits[:2], small)
before = resident("VmRSS")
H = objective.hessian(logits, batch)
{work}
print(resident("VmHWM") - before)
"""

PPO = 'lg.objective("ppo", clip_low=None, clip_high=None)'
SUM = f'({PPO} - 0.01 * lg.objective("entropy"))'


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("objective", "work"),
    [
        (PPO, "H.eigenvalue_range(), H.negative_count(), H.quadratic(logits), H.trace()"),
        (PPO, "H @ logits"),
        (PPO, "objective.gradient(logits, batch)"),
        (PPO, "lg.token_kl(logits, logits)"),
        (SUM, "H.negative_count(), H.quadratic(logits), H.trace()"),
        ('lg.objective("gspo")', "H.eigenvalue_range(), H.negative_count()"),
        pytest.param(SUM, "H.eigenvalue_range()", marks=pytest.mark.slow),
    ],
)
def test_peak(objective: str, work: str) -> None:
    script = SCRIPT.format(objective=objective, work=work)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < LIMIT
