"""A process that imports everything once, and forks a real recording loop for every line it reads: to be killed.

Line: json of loop's arguments but the model; `resume` is true, or the number of the next update.
The loop appends the number of each update to `log` when its step has returned: by then its flush was made, if one was
due. The loss told to the recorder is `loss` + the update's number, so that its rows tell who wrote them.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import transformers

import lcogeom as lg
from tests.small_models import build, make_task, tell


def loop(
    model: transformers.PreTrainedModel, folder: str, log: str, *, resume: bool | int, loss: float, flush_every: int
) -> None:
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    lines = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with lg.attach(
        model, optimizer, folder, objective="sft", sketch=64, flush_every=flush_every, resume=resume
    ) as probe:
        first = probe._update.step
        os.write(lines, f"from {first}\n".encode())
        for step in range(first, first + 100_000):
            tell(probe, task, torch.tensor(loss + step))
            logits = model(input_ids=task.input_ids).logits[:, :-1][task.mask[:, 1:]]
            torch.nn.functional.cross_entropy(logits, task.input_ids[task.mask]).backward()
            optimizer.step()
            optimizer.zero_grad()
            os.write(lines, f"{step}\n".encode())


def main() -> None:
    model = build("llama", torch.device("cpu"))  # its imports take seconds; no backward pass before a fork
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                loop(model, **json.loads(line))
            finally:
                os._exit(1)  # not reached: it is killed
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
