"""One process's half of keeping an old policy: python -m tests.training.old_policy_halves FOLDER"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from lcogeom.training.old_policy import HiddenStates, keep_old_policy
from lcogeom.training.rollout import Sequences
from tests.recording.two_processes import shard
from tests.small_models import build
from tests.training.test_old_policy import logits_now, rollout, some


def main(folder: Path, how: str, name: str) -> None:
    rank = dist.get_rank()
    model: torch.nn.Module = build(name, torch.device("cpu"))
    mine = some(rollout(model, 4), torch.tensor([2 * rank, 2 * rank + 1]))
    if how == "fsdp2":
        shard(model)
    else:
        model = DistributedDataParallel(model)
    old = keep_old_policy(model, mine, rows_per_pass=1)
    assert isinstance(old.kept, HiddenStates)
    before = logits_now(model, mine)
    train(model, mine)
    found = {
        "logits": old.logits(torch.arange(2), mine.action_mask),
        "moved": (logits_now(model, mine) - before).abs().max(),
        "head": torch.tensor(old.nbytes - int(mine.action_mask.sum()) * 32 * 4 - 2 * 12 * 5),
    }
    save_file(found, folder / f"{how}-{name}-{rank}.safetensors")


def train(model: torch.nn.Module, mine: Sequences) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(input_ids=mine.input_ids, attention_mask=mine.attention_mask).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), mine.input_ids[:, 1:].flatten()).backward()
        optimizer.step()


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2"}
    target = Path(sys.argv[1])
    dist.init_process_group(
        "gloo", init_method=f"file://{target / 'meeting'}", rank=int(os.environ["RANK"]), world_size=2
    )
    for case in (("fsdp2", "llama"), ("fsdp2", "llama-gqa-tied"), ("ddp", "gpt2")):
        main(target, *case)
    dist.destroy_process_group()
