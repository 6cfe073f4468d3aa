"""Work on the CPU shared out among threads, for passes made of many calls that are each too short for torch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


def in_threads(work: Callable[[Part], Result], parts: Sequence[Part], device: torch.device) -> list[Result]:
    """[work(part) for part in parts], without gradients; on the CPU in as many threads as torch may use.

    `work` must call torch with fewer than 2^15 elements at a time, or torch will start threads of its own in each.
    """

    def without_gradients(part: Part) -> Result:
        with torch.no_grad():
            return work(part)

    workers = min(len(parts), torch.get_num_threads()) if device.type == "cpu" else 1
    if workers <= 1:
        return [without_gradients(part) for part in parts]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(without_gradients, parts))
