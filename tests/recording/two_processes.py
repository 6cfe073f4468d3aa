"""One process's half of training loops that two share: python -m tests.recording.two_processes FOLDER CASE ..."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lcogeom as lg
from tests.small_models import Task, build, make_task

UPDATES = 3
CPU = torch.device("cpu")
Update = Callable[[torch.nn.Module, torch.optim.Optimizer, Task, lg.Probe | None], None]


def loss_of_rows(model: torch.nn.Module, task: Task) -> torch.Tensor:
    """A mean over sequences, so that the mean over processes with equally many is that of all."""
    logits = model(input_ids=task.input_ids).logits[:, :-1]
    logp = torch.log_softmax(logits, -1).gather(2, task.input_ids[:, 1:, None]).squeeze(2)
    ratio = (logp - task.old_logprobs[:, 1:]).exp()
    loss = -(ratio * task.advantages[:, 1:] * task.mask[:, 1:]).sum(1).mean()
    assert isinstance(loss, torch.Tensor)
    return loss


def updates(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tasks: list[Task],
    probe: lg.Probe | None,
    defer: Callable[[bool], Any] | None = None,
) -> None:
    """Every update: one backward pass for each task, a clip, a step."""
    for _ in range(UPDATES):
        optimizer.zero_grad()
        for number, task in enumerate(tasks):
            if defer is not None:
                defer(number == len(tasks) - 1)
            loss = loss_of_rows(model, task)
            if probe is not None:
                probe.batch(
                    input_ids=task.input_ids,
                    action_mask=task.mask,
                    advantages=task.advantages,
                    old_logprobs=task.old_logprobs,
                    loss=loss,
                )
            (loss / len(tasks)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()


def model_and_tasks(name: str) -> tuple[transformers.PreTrainedModel, list[Task]]:
    """Two micro-batches of four sequences each."""
    model = build(name, CPU)
    return model, [make_task(model, seed=seed) for seed in (0, 1)]


def options(tap: str) -> dict[str, Any]:
    unclipped = lg.objective("ppo", clip_low=None, clip_high=None)
    return {"objective": unclipped, "tokens_per_update": 1000, "tap": tap, "flush_every": 2, "sketch_layers": True}


def shard(model: transformers.PreTrainedModel) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main(folder: Path, how: str, name: str, tap: str, accumulate: bool) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    rank = dist.get_rank()
    ends = []
    for recorded in (False, True):
        model, tasks = model_and_tasks(name)
        half = slice(2 * rank, 2 * rank + 2)
        mine = [task.rows(half) for task in (tasks if accumulate else tasks[:1])]
        trained: torch.nn.Module = model
        if how == "ddp":
            trained = DistributedDataParallel(model)
        else:
            shard(model)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)

        def defer(last: bool, trained: torch.nn.Module = trained) -> None:
            if isinstance(trained, DistributedDataParallel):
                trained.require_backward_grad_sync = last
            else:
                trained.set_requires_gradient_sync(last)

        if recorded:
            with lg.attach(trained, optimizer, folder / "run", **options(tap)) as probe:
                updates(trained, optimizer, mine, probe, defer)
        else:
            updates(trained, optimizer, mine, None, defer)
        state = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
        tensors = [*model.parameters(), *state]
        ends.append([(t.to_local() if hasattr(t, "to_local") else t).detach().clone() for t in tensors])
    same = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    (folder / f"identical-{rank}").write_text(str(same))
    if accumulate:
        manners(folder, trained, optimizer, mine, defer)


def manners(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, tasks: list[Task], defer: Any
) -> None:
    """A run folder that is taken is an error in both; a loop that raises does not wait for the other process."""
    try:
        lg.attach(model, optimizer, folder / "run")
    except (FileExistsError, RuntimeError) as error:
        (folder / f"taken-{dist.get_rank()}").write_text(f"{type(error).__name__}: {error}")
    try:
        with lg.attach(model, optimizer, folder / "broken", **options("auto")) as probe:
            updates(model, optimizer, tasks, probe, defer)
            raise OverflowError("the user's own")
    except OverflowError:
        pass
    with (
        warnings.catch_warnings(record=True),
        lg.attach(model, optimizer, folder / "boxed", **options("auto")) as probe,
    ):
        warnings.simplefilter("always")
        updates(model, optimizer, tasks, probe, defer)
        probe.dump("asked")
        defer(True)
        loss = loss_of_rows(model, tasks[0]) * (math.inf if dist.get_rank() else 1.0)
        probe.batch(input_ids=tasks[0].input_ids, loss=loss)
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    meeting = f"file://{sys.argv[1]}/meet"
    dist.init_process_group("gloo", init_method=meeting, rank=int(os.environ["RANK"]), world_size=2)
    for case in sys.argv[2:]:
        how, name, tap, backwards = case.split("_")
        main(Path(sys.argv[1]) / case, how, name, tap, accumulate=backwards == "accumulate")
    dist.destroy_process_group()
