"""One of two processes that run a trainer together: python -m tests.integrations.two_trainers FOLDER KIND."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lcogeom.integrations.transformers import RecorderCallback
from tests.integrations.trainers import MAKERS, run


def main(folder: Path, kind: str) -> None:
    rank = os.environ["RANK"]
    ends = []
    for recorded in (False, True):
        options = {"report_to": ["tensorboard"]} if recorded else {}
        trainer = MAKERS[kind](folder / f"out{recorded}", 3, per_device_train_batch_size=2, logging_steps=1, **options)
        if recorded:
            trainer.add_callback(RecorderCallback(folder / "run", tokens_per_update=1000, flush_every=2))
        run(trainer)
        ends.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    logged = [row["lcogeom/grad_norm"] for row in trainer.state.log_history if "loss" in row]
    same = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    (folder / f"said-{rank}").write_text(f"{same} {dist.get_world_size()} {len(logged)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    dist.destroy_process_group()
