"""Independent passes over the parameters, side by side on the threads that torch may use.

Only for work that is a few long calls into torch: each of them lets the interpreter go, so that they run at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

WORTH = 2**22  # elements; below it, handing over costs more than it saves


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], elements: int) -> list[Result]:
    """[work(item) for item in items], each under no_grad, in a thread of its own where `elements` are many enough.

    elements: on the CPU, that all of them together go through.
    """

    def unrecorded(item: Item) -> Result:
        with torch.no_grad():  # a setting of each thread
            return work(item)

    threads = min(torch.get_num_threads(), len(items))
    if elements < WORTH or threads < 2:
        return [unrecorded(item) for item in items]
    return list(_pool(threads, os.getpid()).map(unrecorded, items))


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Kept: fresh threads begin without memory of their own. One for each process: threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"lcogeom-{process}")
