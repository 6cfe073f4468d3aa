"""attach(): checks what it is given, makes the run folder, and puts a recorder on a model and its optimiser."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers

from lcogeom.geometry.sketch import SIZE as SKETCH_SIZE
from lcogeom.objectives import ActionObjective, Objective
from lcogeom.objectives import objective as objective_by_name
from lcogeom.recording.head import vocabulary_size
from lcogeom.recording.probe import Probe
from lcogeom.recording.ranks import NoWriter, Ranks, ranks_of
from lcogeom.recording.taps import KINDS
from lcogeom.recording.unwrap import require_plain_head, unwrap_model, unwrap_optimizer
from lcogeom.runs.store import RunWriter


def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    run: str | Path,
    *,
    objective: str | Objective | None = None,
    tokens_per_update: int = 256,
    tap: str = "auto",
    temperature: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    labels: Mapping[str, str | int | float] | None = None,
    flush_every: int | None = 10,
    seed: int = 0,
    audit_every: int | None = None,
    sketch: int | None = SKETCH_SIZE,
    sketch_layers: bool = False,
    copies: bool = False,
    resume: bool | int = False,
    black_box: int = 4,
    spike: float = 10.0,
    black_box_weights: bool = False,
    on_update: Callable[[Mapping[str, object]], None] | None = None,
) -> Probe:
    """Record every update of a training loop into a run folder, without changing a bit of it.

    Use it as a context manager around the loop, or call `close()` at the end. Where several processes train
    (DistributedDataParallel, FSDP2), each of them attaches to the same run folder, and flushes and closes with the
    others; process 0 writes what all of them saw, the loss is the mean of theirs, and the black box is process 0's.

    Args:
        model: a transformers causal LM, before torch.compile; DistributedDataParallel or PEFT may be around it.
        optimizer: the one whose `step()` makes the updates.
        run: folder to create (or to go on in, with `resume`). One process writes it; any number may read it meanwhile.
        objective: what the loop minimises: a registry name (with its defaults) or an Objective. Gives `convex`,
            `negative_count` and `d2`; without it those stay empty.
        tokens_per_update: at most so many tokens are looked at, half of them those with the largest gradient.
        tap: "auto" reads the logits where the loss is computed from them (the whole logit gradient, whatever the
            loss), else the last hidden state, which every training path has. "hidden", "logits" and "log_probs" (what
            TRL's fused head returns: cheapest, but blind to anything that is no loss of them) insist on one.
        temperature: the policy trained is softmax(logits / temperature).
        scaler: the loop's fp16 GradScaler: norms are then recorded in true units.
        tokenizer: fills the `text` column.
        labels: kept with the run; columns of their own when several runs are read together.
        flush_every: updates between two writes (one is also made every minute); None: written at flush() and close().
        seed: of the sample of tokens.
        audit_every: take apart what updates 0, k, 2k, ... did to the mean of `objective` over their completion tokens
            (the columns `audit_...`, see `audit_step`): the update's forward passes run again, without dropout, for
            about the time of six updates. Needs `objective`, and batch() before every backward pass.
        sketch: numbers kept of each gradient and each step (`lcogeom.sketch`), for cosines between any two updates
            afterwards: 16384 take 128 KiB an update on disk; 0 or None keeps none.
        sketch_layers: keep the part of each layer as well, at that size for each.
        copies: keep one copy of the parameters and one of their gradient on the model's device: `update_norm`,
            `grad_cos_prev` and `step_grad_cos` are then exact. Without it they are taken from the sketches (to 0.6 %
            and to 0.008, at 16384 numbers); with neither they stay empty.
        black_box: of so many of the last updates the batches are kept, and written to the run folder when a loss, a
            gradient or a weight is not finite, or when the norm of the gradient or of the step spikes; read by
            `run.black_box()`, replayed by `replay_batch`. 0 keeps none.
        spike: from so many times the running median (of 100 updates) on, a norm is a spike.
        black_box_weights: the weights from before the step are written as well, and the optimiser's state unless the
            step itself was the spike. The recorder then waits for the device at every step.
        resume: go on in the folder that `run` names, after a restart; False makes a new one. True: after its last
            update (the first time, when there is no folder, one is made). A number, such as the step of the checkpoint
            that training goes on from: the next update has this number, and what was recorded of it and of later ones
            before the restart is superseded: no longer read, but not deleted.
        on_update: called with each row of `updates` (column -> value) when it is known, which is at a flush.

    A disk that is full or gone does not stop training: one warning, and what could not be written waits in memory
    (up to 64 MiB, the oldest updates are dropped first) until it can be; `close()` says how many updates were lost.

    Raises:
        FileExistsError: `run` exists, without `resume`.
        BlockingIOError: another process, or a recorder that was not closed, is writing `run`.
        TypeError: not a causal LM of transformers with an LM head, or wrapped in what hides its gradients (DeepSpeed,
            FSDP1, DataParallel).
        ValueError: an argument out of range, or an optimizer that does not update this model.
        TapError: the model was compiled already. Later, from the loop: an update in which no tap fired.
    """
    minimised = objective_by_name(objective) if isinstance(objective, str) else objective
    if tap not in KINDS:
        raise ValueError(f"tap: {tap!r}; must be one of {', '.join(map(repr, KINDS))}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: {temperature}; must be a positive number.")
    if tap == "log_probs" and minimised is not None and not isinstance(minimised, ActionObjective):
        raise ValueError(f"tap: 'log_probs' sees no more of {minimised.name!r} than the actions. Use tap='auto'.")
    counts = (("tokens_per_update", tokens_per_update), ("flush_every", flush_every), ("audit_every", audit_every))
    for name, value in counts:
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value}; must be at least 1.")
    if black_box < 0:
        raise ValueError(f"black_box: {black_box}; must be a number of updates, or 0 for none.")
    if not spike > 1:
        raise ValueError(f"spike: {spike}; must be above 1, times the running median of the gradient norm.")
    if black_box_weights and not black_box:
        raise ValueError("black_box_weights: there is no black box to keep them in; black_box must be at least 1.")
    if audit_every is not None and minimised is None:
        raise ValueError("audit_every: an audit needs to know what is minimised; pass objective=... as well.")
    wrapped, model, optimizer = model, unwrap_model(model), unwrap_optimizer(optimizer)
    ranks = ranks_of(wrapped, model.parameters())
    ranks.require_for(audit_every, copies, black_box_weights)
    vocabulary = vocabulary_size(model)  # before the folder is made
    if tap != "logits":
        require_plain_head(model)
    meta = {
        "objective": None if minimised is None else {"name": minimised.name, "options": _plain(minimised.options)},
        "model": type(model).__name__,
        "vocabulary": vocabulary,
        "optimizer": type(optimizer).__name__,
        "optimizer_options": _plain(optimizer.defaults),
        "weights": _weights(optimizer),
        "tap": tap,
        "temperature": temperature,
        "tokens_per_update": tokens_per_update,
        "sketch": sketch or 0,
        "sketch_layers": sketch_layers,
        "labels": dict(labels or {}),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    same = ["objective", "vocabulary", "tap", "temperature", "sketch", "sketch_layers"] + ["labels"] * (
        labels is not None
    )
    writer = _writer(ranks, run, meta, resume, same)
    try:
        return Probe(
            model=model,
            optimizer=optimizer,
            writer=writer,
            minimised=minimised,
            tap=tap,
            temperature=temperature,
            scaler=scaler,
            tokens_per_update=tokens_per_update,
            flush_every=flush_every,
            seed=seed,
            tokenizer=tokenizer,
            audit_every=audit_every,
            sketch=sketch or 0,
            sketch_layers=sketch_layers,
            copies=copies,
            black_box=black_box,
            spike=spike,
            black_box_weights=black_box_weights,
            on_update=on_update,
            ranks=ranks,
        )
    except BaseException:
        writer.discard()
        raise


def _writer(
    ranks: Ranks, run: str | Path, meta: Mapping[str, object], resume: bool | int, same: Sequence[str]
) -> RunWriter | NoWriter:
    """Process 0 writes; where it cannot make the folder, the others are told, and raise too."""
    if ranks.rank:
        return NoWriter(run, ranks.told_by_first(None))
    writer = None
    try:
        writer = RunWriter(run, meta, resume=resume, same=same)
    finally:
        ranks.told_by_first(None if writer is None else writer.next_update)
    return writer


def _weights(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """dtype -> how many numbers of it are trained."""
    found: dict[str, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                name = str(parameter.dtype).removeprefix("torch.")
                found[name] = found.get(name, 0) + parameter.numel()
    return found


def _plain(options: Mapping[str, object]) -> dict[str, object]:
    def plain(value: object) -> object:
        if isinstance(value, (str, int, float, bool, type(None))):
            return value
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # the same after a restart

    return {key: plain(value) for key, value in options.items()}
