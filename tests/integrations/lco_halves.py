"""One process's half of LCO in two processes: python -m tests.integrations.lco_halves FOLDER"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch import Tensor

import lcogeom as lg
from lcogeom.integrations.trl_lco import add_blocks
from tests.small_models import make_task


def blocks_of(model: transformers.PreTrainedModel, rows: list[int]) -> tuple[Tensor, list[Tensor]]:
    """LCO-KLD of some of four sequences, in blocks of a few tokens inside forward; the gradient of the sum."""
    add_blocks(model)
    task = make_task(model)
    at = torch.isin(task.mask.nonzero()[:, 0], torch.tensor(rows))
    batch = task.tokens()[at]

    def of_logits(logits: Tensor, some: slice) -> Tensor:
        return lg.objective("lco-kld").loss(logits, batch[some])

    values, hidden = model(input_ids=task.input_ids[rows], lcogeom_blocks=(of_logits, task.mask[rows], 1.0))
    assert hidden.shape == (len(batch), 32)
    values.sum().backward()
    gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return values.detach(), gradients


def trained(folder: Path) -> list[Tensor]:
    from tests.integrations.test_trl_lco import Oracle, lco, run

    trainer = lco(folder / "out", 4, num_iterations=2, learning_rate=3e-3, ddp_backend="gloo")
    oracle = Oracle(trainer)
    losses = []

    def without_gradients(model: torch.nn.Module, inputs: dict) -> Tensor:
        with torch.no_grad():
            losses.append((oracle.computes(model, inputs), oracle.wanted(trainer.model, inputs)))
        return oracle.computes(model, inputs)

    trainer._compute_loss = without_gradients
    run(trainer)
    assert trainer.accelerator.num_processes == 2
    assert len(losses) == 4
    assert oracle.late > 0
    for found, wanted in losses:
        assert abs(found - wanted) <= 1e-5 * (1 + wanted.abs())
    return [p.detach() for p in trainer.model.parameters()]


if __name__ == "__main__":
    rank, target = int(os.environ["RANK"]), Path(sys.argv[1])
    save_file({str(n): p.clone() for n, p in enumerate(trained(target))}, target / f"ddp-{rank}.safetensors")
    from tests.recording.two_processes import shard
    from tests.small_models import build

    sharded = build("llama-gqa-tied", torch.device("cpu"))
    shard(sharded)
    values, gradients = blocks_of(sharded, [2 * rank, 2 * rank + 1])
    found = {str(n): gradient.contiguous() for n, gradient in enumerate(gradients)}
    save_file({"values": values, **found}, target / f"fsdp2-{rank}.safetensors")
    dist.destroy_process_group()
