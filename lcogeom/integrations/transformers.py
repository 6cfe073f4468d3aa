"""Recording a Trainer of transformers, or of TRL: `Trainer(..., callbacks=[RecorderCallback("runs/mine")])`."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from lcogeom.integrations import trl
from lcogeom.integrations.methods import ReplacedMethods
from lcogeom.objectives import Objective, objective
from lcogeom.recording import Probe, attach

LOGGED = (
    "grad_norm",
    "grad_norm_clipped",
    "update_norm",
    "qkv_mean_frobenius",
    "grad_cos_prev",
    "step_grad_cos",
    "logprob",
    "entropy",
    "logit_grad_norm",
    "ratio_max",
    "convex_share",
)
"""Columns of `updates` that go to where the trainer logs, as lcogeom/NAME."""


class RecorderCallback(transformers.TrainerCallback):
    """Records every update of a Trainer into a run folder: transformers' own, and TRL's (SFT, DPO, RLOO, GRPO).

    It attaches when training begins and takes everything off when it ends, or raises. Completion tokens come from the
    trainer's own labels or masks; with GRPO and RLOO so do advantages and old log-probabilities. Each time the trainer
    logs, the last update's main numbers go along, as `lcogeom/grad_norm` and so on, to TensorBoard, W&B or whatever it
    reports to.

    Args:
        run: folder to create.
        objective: what is minimised; "trainer" works it out from the trainer and its settings, where the registry has
            such an objective, and warns where not.
        **options: of `lcogeom.attach`. The tokenizer, and the temperature of GRPO and RLOO, are the trainer's.

    Raises (when training begins):
        FileExistsError, TypeError, ValueError, TapError: as `lcogeom.attach`; TapError also for a version of TRL whose
            internals are not known.
    """

    def __init__(
        self, run: str | Path, *, objective: str | Objective | Literal["trainer"] | None = "trainer", **options: Any
    ) -> None:
        self.run = run
        self.objective = objective
        self.options = options
        self.probe: Probe | None = None
        self._methods: ReplacedMethods | None = None
        self._row: Mapping[str, object] = {}
        self._warned = False

    def on_train_begin(self, *_: Any, **given: Any) -> None:
        """Attach: the optimiser exists now."""
        self._close()
        trainer = _calling_trainer()
        reading = trl.reading_of(trainer)
        options: dict[str, Any] = {"objective": self._objective(trainer, reading), "on_update": self._updated}
        if reading is not None and getattr(trainer, "temperature", 1.0) != 1.0:
            options["temperature"] = trainer.temperature
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None:
            options["scaler"] = scaler
        words = given.get("processing_class")
        words = getattr(words, "tokenizer", words)  # a processor has one inside
        if isinstance(words, transformers.PreTrainedTokenizerBase):
            options["tokenizer"] = words
        options["labels"] = {"trainer": type(trainer).__name__, **self.options.get("labels", {})}
        options |= {name: value for name, value in self.options.items() if name != "labels"}
        # torch_compile=True has wrapped the model by now, but compiles it at its first forward pass, hooks included.
        model = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
        self.probe = attach(model, trainer.optimizer, self.run, **options)
        self._methods = ReplacedMethods(trainer)
        listen = trl.labelled if reading is None else reading.listen(trainer, self._methods)
        self._methods.replace("compute_loss", lambda original: self._telling(trainer, reading, original, listen))
        self._methods.replace("log", self._logging)
        self._methods.replace("_run_epoch" if hasattr(trainer, "_run_epoch") else "training_step", self._closing)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take everything off."""
        self._close()

    def _close(self, failed: bool = False) -> None:
        methods, self._methods = self._methods, None
        probe, self.probe = self.probe, None
        if methods is not None:
            methods.restore()
        if probe is not None:
            probe.close(failed=failed)

    def _objective(self, trainer: Any, reading: trl.Reading | None) -> str | Objective | None:
        if self.objective != "trainer":
            return self.objective
        found = _plain_objective(trainer) if reading is None else reading.objective(trainer)
        if isinstance(found, str):
            warnings.warn(
                f"RecorderCallback: `convex` and `d2` stay empty, because no objective here is what "
                f"{type(trainer).__name__} minimises: {found}. f' is recorded all the same. "
                "Pass objective=... if one fits, or objective=None to be silent.",
                stacklevel=2,
            )
            return None
        return found

    def _telling(
        self,
        trainer: Any,
        reading: trl.Reading | None,
        original: Callable[..., Any],
        listen: Callable[[Mapping[str, Any]], trl.Said | None],
    ) -> Callable[..., Any]:
        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            before = dict(inputs)  # compute_loss may take the labels out
            result = original(model, inputs, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            if torch.is_grad_enabled() and loss.requires_grad:
                divided_by = 1.0 if reading is None else reading.divided_by(trainer)
                whole = divided_by == 1.0 and _normalised_over_update(trainer, kwargs.get("num_items_in_batch"))
                self._tell(listen(before), loss=loss, divided_by=divided_by, summed=whole)
            return result

        return compute_loss

    def _tell(self, said: trl.Said | None, **of_the_loss: Any) -> None:
        if said is None or self.probe is None:
            return
        try:
            self.probe.batch(**said, **of_the_loss)
        except ValueError as error:  # the trainer goes on with such a batch, so must the recorder
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"RecorderCallback: a batch is recorded without its advantages and masks, because {error}",
                    stacklevel=2,
                )

    def _updated(self, row: Mapping[str, object]) -> None:
        self._row = row

    def _logging(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            if "loss" in logs and self.probe is not None:  # of training, not of an evaluation
                self.probe.collect()
                for name in LOGGED:
                    value = self._row.get(name)
                    if isinstance(value, float) and not math.isnan(value):
                        logs[f"lcogeom/{name}"] = value
            return original(logs, *args, **kwargs)

        return log

    def _closing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A Trainer calls no callback when training raises."""

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except BaseException:
                self._close(failed=True)
                raise

        return run


def _plain_objective(trainer: Any) -> Objective | str:
    """Of transformers' own Trainer: the model's own loss on labels."""
    if type(trainer).compute_loss is not transformers.Trainer.compute_loss:
        return "its compute_loss is its own"
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        return "label smoothing or a loss function of your own"
    return objective("sft")


def _normalised_over_update(trainer: Any, num_items: object) -> bool:
    """Whether compute_loss divides by what the whole update holds, as Trainer.training_step decides it."""
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    if said is not None:
        return bool(said)
    return (trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None


def _calling_trainer() -> Any:
    """The Trainer whose training begins: callbacks are given its parts, but not the trainer itself.

    Raises:
        RuntimeError: no Trainer called.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, transformers.Trainer):
            return owner
        frame = frame.f_back
    raise RuntimeError(
        "RecorderCallback: called by no transformers.Trainer. In a loop of your own, use lcogeom.attach."
    )
