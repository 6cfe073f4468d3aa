"""Several processes that train one model together: DistributedDataParallel, and FSDP2's sharded parameters.

Each process records its own tokens and, where parameters are sharded, its own shard. Sums over shards are exchanged at
the optimiser's step, tokens when rows are made (a flush); nothing is exchanged in between. Process 0 writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process's place among those that train the model."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    """Whether each holds a part of the parameters."""
    group: dist.ProcessGroup | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    """Where the group's messages lie."""

    def counts(self, tensor: Tensor) -> bool:
        """Whether this process adds a parameter, or its gradient, to a sum: a shard of it does, a copy only once."""
        return not self.sharded or isinstance(tensor, DTensor) or self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of what the processes counted of their shards; the values themselves where nothing is sharded."""
        if not self.sharded:
            return values
        there = values.to(self.device, copy=True)
        dist.all_reduce(there, group=self.group)
        return there.to(values.device)

    def gather(self, rows: Tensor) -> list[Tensor]:
        """The rows (M, C) of every process, in order; C is the same for all. Float64, on the CPU."""
        here = rows.to(self.device, torch.float64)
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(here)], device=self.device), group=self.group)
        lengths = [int(count) for count in counts]
        padded = here.new_zeros(max(lengths), here.shape[1])
        padded[: len(here)] = here
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return [part[:length].cpu() for part, length in zip(parts, lengths, strict=True)]

    def gather_columns(self, columns: Mapping[str, Tensor], names: Sequence[str]) -> list[dict[str, Tensor]]:
        """The same of columns (M,) each, float64; a process without rows may have no columns."""
        length = len(next(iter(columns.values()))) if columns else 0
        unknown = torch.full((length,), math.nan, dtype=torch.float64)
        table = [columns[name].double().cpu() if name in columns else unknown for name in names]
        return [dict(zip(names, part.unbind(1), strict=True)) for part in self.gather(torch.stack(table, 1))]

    def require_for(self, audit_every: int | None, copies: bool, black_box_weights: bool) -> None:
        """Raises ValueError for options of attach() that several processes, or shards, do not allow."""
        if self.size > 1 and audit_every is not None:
            raise ValueError("audit_every: an audit runs one process's batch, but several trained. Leave it out here.")
        if self.sharded and copies:
            raise ValueError("copies: not with sharded parameters (FSDP2). Leave it out: sketches tell to 0.6 %.")
        if self.sharded and black_box_weights:
            raise ValueError("black_box_weights: not with sharded parameters (FSDP2). Leave it out; keep checkpoints.")

    def told_by_first(self, next_update: int | None) -> int:
        """The number of the next update in process 0's run folder, to every process; None from it says that it failed.

        Raises:
            RuntimeError: process 0 has no folder, in the other processes.
        """
        if self.size == 1:
            return next_update or 0
        said = torch.tensor([-1 if next_update is None else next_update], device=self.device)
        dist.broadcast(said, group=self.group, group_src=0)
        if int(said) < 0 and self.rank:
            raise RuntimeError("run: process 0 could not make the run folder; its own error says why.")
        return int(said)


class NoWriter:
    """Stands for the run folder's writer in the processes that do not write."""

    def __init__(self, path: str | Path, next_update: int) -> None:
        self.path, self.next_update, self.seconds = Path(path), next_update, 0.0

    def add(self, table: str, rows: Mapping[str, Any]) -> None:
        """Process 0 has the same rows."""

    def flush(self) -> None:
        """And writes them."""

    def close(self) -> None:
        """Nothing is held."""

    def discard(self) -> None:
        """Nothing was made."""


def ranks_of(model: torch.nn.Module, parameters: Iterable[Tensor]) -> Ranks:
    """Who trains this model: the group of DistributedDataParallel or of the shards, else all processes there are.

    Args:
        model: as it was given to attach(), in its wrapper if it has one.

    Raises:
        TypeError: sharded in another way than FSDP2's over one dimension.
    """
    shards = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    wrapper = getattr(model, "_orig_mod", model)
    group = wrapper.process_group if isinstance(wrapper, DistributedDataParallel) else dist.group.WORLD
    if shards:
        mesh = shards[0].device_mesh
        if mesh.ndim != 1 or any(tuple(shard.placements) != (Shard(0),) for shard in shards):
            raise TypeError(
                f"model: its parameters are distributed as {tuple(shards[0].placements)} over {mesh.ndim} dimension(s) "
                "of processes. The recorder reads FSDP2's fully_shard over one dimension; neither HSDP nor tensor "
                "parallelism."
            )
        group = mesh.get_group()
    size = dist.get_world_size(group)
    if size == 1:
        return Ranks()
    own = next(iter(shards), None)
    device = next(model.parameters()).device if own is None else own.to_local().device
    messages = device if "nccl" in str(dist.get_backend(group)) else torch.device("cpu")
    return Ranks(dist.get_rank(group), size, bool(shards), group, messages)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor | None:
    """This process's part of the gradient."""
    return None if parameter.grad is None else local(parameter.grad)


def first_row(tensor: Tensor) -> int:
    """The row of a tensor sharded along its rows with which this process's part begins; 0 of any other."""
    if not isinstance(tensor, DTensor):
        return 0
    each = -(-tensor.shape[0] // tensor.device_mesh.size())  # as torch.chunk deals them out
    return min(each * tensor.device_mesh.get_local_rank(), tensor.shape[0])


def in_whole(tensor: Tensor) -> Tensor:
    """This process's part of a sharded matrix in its place, zeros elsewhere; any other tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    part, start = tensor.to_local(), first_row(tensor)
    whole = part.new_zeros(tensor.shape)
    whole[start : start + len(part)] = part
    return whole
