"""Methods in processes and environments of their own: no package meets another's dependencies, nor its threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

CACHE = Path(os.environ.get("LCOGEOM_CACHE", Path.home() / ".cache" / "lcogeom"))
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Without their dependencies, which would bring another torch, and torchvision, which none of this needs.
PINS = {
    "hessian-eigenthings": ["hessian-eigenthings==1.0.0a5"],
    "curvlinops": [
        "curvlinops-for-pytorch==3.0.1", "backpack-for-pytorch==1.7.1", "einconv==0.1.0", "einops==0.8.2",
        "linear_operator==0.6.1", "opt_einsum==3.4.0", "unfoldNd==0.2.3",
    ],
}  # fmt: skip


def interpreter(peer: str) -> str:
    """A Python with the peer and the torch, numpy and scipy that run here; made once, in the cache."""
    folder = CACHE / "benchmarks" / peer
    python, done = folder / "bin" / "python", folder / "installed"
    pins = [f"{name}=={version(name)}" for name in ("numpy", "scipy", "safetensors", "tqdm")] + PINS[peer]
    torch_pin = f"torch=={torch.__version__.split('+')[0]}"
    wanted = "\n".join([torch_pin, *pins])
    if not done.exists() or done.read_text() != wanted:
        print(f"installing {peer} in its own environment", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        plan = [*pip, "--dry-run", "--report", "-", torch_pin]
        found = subprocess.run(plan, check=True, capture_output=True, text=True).stdout
        cuda = torch.version.cuda is None and '"name": "nvidia-' in found
        index = ["--index-url", "https://download.pytorch.org/whl/cpu"] if cuda else []
        subprocess.run([*pip, *index, torch_pin], check=True)
        subprocess.run([*pip, "--no-deps", *pins], check=True)
        done.write_text(wanted)
    return str(python)


class Worker:
    """A method in its own process; answers one request at a time."""

    def __init__(self, script: Path, method: str, folder: Path) -> None:
        python = interpreter(method) if method in PINS else sys.executable
        pinned = {"OMP_WAIT_POLICY": "PASSIVE"} | dict.fromkeys(POOLS, str(THREADS))
        self.process = subprocess.Popen(
            [python, script, method, folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | pinned,
        )  # fmt: skip
        self.about = self._read()

    def __call__(self, **request: object) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args[2]} ended with exit code {self.process.wait()}; see above.")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
