"""Checkpoints: what a run needs to go on bit for bit, as safetensors and JSON, complete or not there at all.

    RUN/checkpoints/step-000040/
        policy.safetensors       trained parameters and buffers by name (all of them, or the adapters)
        optimizer.safetensors    AdamW's moments, PARAMETER::KIND; optimizer.json holds its plain values
        critic.safetensors, critic_optimizer.safetensors, critic_optimizer.json        where there is a critic
        random.safetensors       torch's generators of process 0
        state.json               the next update, versions

Shards (FSDP2) are gathered; a run may go on with another number of processes, though not bit for bit then.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lcogeom.training.learner import Learner

FOLDER = "checkpoints"
BETWEEN = "::"


def save(learner: Learner, run: Path, step: int) -> Path:
    """Write the checkpoint before update `step`, and remove the oldest beyond `keep_checkpoints`.

    Every process calls it; process 0 writes.
    """
    pairs = [("policy", "optimizer", learner.policy, learner.optimizer)]
    if learner.critic is not None and learner.critic_optimizer is not None:
        pairs.append(("critic", "critic_optimizer", learner.critic, learner.critic_optimizer))
    full = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    tensors: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Any] = {}
    for model_name, optimizer_name, model, optimizer in pairs:
        tensors[model_name] = _own(get_model_state_dict(model, options=full))
        tensors[optimizer_name], plain[optimizer_name] = _flat(get_optimizer_state_dict(model, optimizer, options=full))
    folder = run / FOLDER / f"step-{step:06d}"
    if learner.accelerator.is_main_process:
        tensors["random"] = {"cpu": torch.get_rng_state()}
        if learner.device.type == "cuda":
            tensors["random"]["cuda"] = torch.cuda.get_rng_state(learner.device)
        plain["state"] = {"step": step, "processes": learner.accelerator.num_processes, "torch": torch.__version__}
        _write(folder, tensors, plain)
        for old in complete(run)[: -learner.settings.keep_checkpoints]:
            shutil.rmtree(old)
    learner.accelerator.wait_for_everyone()
    return folder


def load(learner: Learner, run: Path) -> int:
    """Put the run's last checkpoint into the learner; returns the next update, 0 where there is no checkpoint.

    Raises:
        ValueError: a checkpoint of another model.
    """
    found = complete(run)
    if not found:
        return 0
    folder = found[-1]
    _fill(folder, "policy", "optimizer", learner.policy, learner.optimizer)
    if learner.critic is not None and learner.critic_optimizer is not None:
        _fill(folder, "critic", "critic_optimizer", learner.critic, learner.critic_optimizer)
    random = load_file(folder / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and learner.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], learner.device)
    return int(json.loads((folder / "state.json").read_text())["step"])


def complete(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def _fill(
    folder: Path, model_name: str, optimizer_name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    weights = load_file(folder / f"{model_name}.safetensors")
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    here = get_model_state_dict(model, options=options)
    wrong = sorted(name for name in {*here, *weights} if name in here and _shape(here, name) != _shape(weights, name))
    if wrong:
        raise ValueError(
            f"resume: {folder.name} is of another model: {wrong[0]!r} has shape {_shape(weights, wrong[0])} there and "
            f"{_shape(here, wrong[0])} here."
        )
    set_model_state_dict(model, weights, options=options)
    values = load_file(folder / f"{optimizer_name}.safetensors")
    plain = json.loads((folder / f"{optimizer_name}.json").read_text())
    state: dict[str, dict[str, Any]] = {}
    for key, tensor in values.items():
        name, _, kind = key.rpartition(BETWEEN)
        state.setdefault(name, {})[kind] = tensor
    for group in plain["param_groups"]:
        group["betas"] = tuple(group["betas"])
    both: dict[str, Any] = {"state": state, **plain}
    set_optimizer_state_dict(model, optimizer, both, options=options)


def _own(state: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors wants them (tied weights are kept twice)."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def _flat(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by PARAMETER::KIND, plain values)."""
    tensors = {
        f"{name}{BETWEEN}{kind}": torch.as_tensor(value).detach().clone().contiguous()
        for name, values in state.get("state", {}).items()
        for kind, value in values.items()
    }
    return tensors, {"param_groups": state.get("param_groups", [])}


def _write(folder: Path, tensors: dict[str, dict[str, Tensor]], plain: dict[str, Any]) -> None:
    """Beside its place first, then renamed: a kill leaves a checkpoint complete or not there."""
    folder.parent.mkdir(exist_ok=True)
    for left in folder.parent.glob(".step-*"):  # of a writer that was killed
        shutil.rmtree(left)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    for name, values in tensors.items():
        save_file(values, unfinished / f"{name}.safetensors")
    for name, record in plain.items():
        (unfinished / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for file in unfinished.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    unfinished.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def _shape(state: dict[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None
