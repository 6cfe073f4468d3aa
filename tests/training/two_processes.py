"""One process's half of training runs that two share: python -m tests.training.two_processes FOLDER"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from lcogeom.training.trainer import train
from tests.training.runs import small

# The halves of a rollout are sampled with seeds of their own, so that one process samples what two do.
SHARED = {"generation_batch": 8, "updates": 4, "evaluate_every": 2, "checkpoint_every": 2, "tokens_per_update": 1000}
METHODS = {
    "grpo": small("tiny-grpo", **SHARED, micro_batches=2),
    "lco-kld": small("tiny-lco-kld", **SHARED, micro_batches=2, whiten=True),
    "ppo": small("tiny-ppo", **SHARED),
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder, how, *names = sys.argv[1:]
    for name in names:
        settings = METHODS[name]
        if how == "fsdp":
            settings = type(settings).from_dict({**settings.to_dict(), "fsdp": True})
        train(settings, Path(folder) / f"{name}-{how}")
