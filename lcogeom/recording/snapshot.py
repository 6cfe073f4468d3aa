"""Passes, weights and optimiser state as named tensors and plain values, for the black box's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcogeom.recording.batch import BatchRecord
from lcogeom.recording.passes import ForwardPass
from lcogeom.runs.black_box import RecordedBatch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def batch_files(
    updates: Sequence[tuple[int, Sequence[ForwardPass]]],
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """(the report's rows, file name -> tensors) of the passes of some updates (step, its passes)."""
    rows: list[dict[str, Any]] = []
    files: dict[str, dict[str, Tensor]] = {}
    for step, passes in updates:
        for part, one in enumerate(passes):
            name = f"batch-{step:06d}-{part}.safetensors"
            files[name] = {
                **{f"input.{key}": value for key, value in one.inputs.items()},
                **{f"rng.{key}": value for key, value in one.rng.items()},
                **({} if one.batch is None else {f"batch.{k}": v for k, v in _fields(one.batch).items()}),
            }
            rows.append(
                {
                    "file": name,
                    "step": step,
                    "part": part,
                    "loss": None if one.loss is None else float(one.loss),
                    "module": one.module,
                    "options": one.options,
                    "left_out": one.left_out,
                    "training": one.training,
                    "other_mode": one.other_mode,
                    "autocast": None if one.autocast is None else str(one.autocast).removeprefix("torch."),
                }
            )
    return rows, files


def recorded_pass(batch: RecordedBatch) -> ForwardPass:
    """The way back: a pass as it was in memory.

    Raises:
        ValueError: the recorded values are not what batch() accepts.
    """
    groups: dict[str, dict[str, Tensor]] = {"input": {}, "rng": {}, "batch": {}}
    for name, tensor in batch.tensors().items():
        group, key = name.split(".", 1)
        groups[group][key] = tensor
    said = groups["batch"]
    record = None
    if said:
        names = ("action_mask", "advantages", "old_logprobs", "ref_logprobs", "advantage_ids")
        given = {name: said.get(name) for name in (*names, *(set(said) - {*names, "input_ids", "old_logits"}))}
        record = BatchRecord(said["input_ids"], given, said.get("old_logits"))
    return ForwardPass(
        module=batch.module,
        inputs=groups["input"],
        options=dict(batch.options),
        left_out=dict(batch.left_out),
        training=batch.training,
        other_mode=batch.other_mode,
        autocast=None if batch.autocast is None else DTYPES[batch.autocast],
        rng=groups["rng"],
        batch=record,
    )


def weights_state(model: torch.nn.Module, before: Mapping[int, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(weights and buffers by name, tied name -> the name that it is kept under).

    before: id of a parameter -> the value to keep in place of its own.

    Raises:
        RuntimeError: parameters are spread over processes.
    """
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    places: dict[tuple[object, ...], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if hasattr(tensor, "full_tensor"):
            raise RuntimeError("parameters are spread over processes; black_box_weights=True cannot keep them")
        place = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()
        if tensor.numel() and place in places:
            tied[name] = places[place]
        else:
            places[place] = name
            kept[name] = before.get(id(tensor), tensor).detach().contiguous()
    return kept, tied


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(plain values of state and groups, tensors by `state.NUMBER.NAME` or `group.NUMBER.NAME`)."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {"state": {}, "param_groups": []}
    for number, values in state["state"].items():
        plain["state"][number] = _plain_values(f"state.{number}", values, tensors)
    for number, values in enumerate(state["param_groups"]):
        plain["param_groups"].append(_plain_values(f"group.{number}", values, tensors))
    return plain, tensors


def _plain_values(place: str, values: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What JSON can hold; tensors go to `tensors`."""
    plain = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensors[f"{place}.{name}"] = value.detach().clone(memory_format=torch.contiguous_format)
        else:
            plain[name] = value
    return plain


def _fields(batch: BatchRecord) -> dict[str, Tensor]:
    fields = {"input_ids": batch.input_ids, "action_mask": batch.mask, "old_logits": batch.old_logits, **batch.fields}
    return {name: value for name, value in fields.items() if value is not None}
