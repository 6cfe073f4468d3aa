"""Independent passes over the parameters, side by side on the threads that torch may use.

Only for work that is a few long calls into torch: each of them lets the interpreter go, so that they run at once.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
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
    return ThreadPoolExecutor(threads, thread_name_prefix=f"lcogeom-{process}", initializer=_no_team)


def _no_team() -> None:
    """Calls into torch from this thread start no OpenMP threads of their own.

    With teams beside that of the training loop libgomp counts more threads than there are cores, and from then on lets
    the loop's sleep at every barrier instead of waiting awake: an update took 8 % longer, for good, when tried.
    """
    torch.get_num_threads()  # the first call in a thread sets its number, and would do so later
    for runtime in _openmp():
        runtime.omp_set_num_threads(1)  # of this thread alone; torch.set_num_threads means every thread, and MKL


@lru_cache(maxsize=1)
def _openmp() -> list[ctypes.CDLL]:
    """The OpenMP runtimes of this process; none where that cannot be told."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if re.search(r"/lib(g|i|)omp[^/]*\.so", line)}
    return [ctypes.CDLL(path) for path in sorted(paths)]
