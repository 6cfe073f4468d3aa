"""One real update of a model with the recorder on, against the same update without it and against its own logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

import lcogeom as lg
from tests.architectures import UNPADDED

LENGTH, PROMPT = 12, 5
UNCLIPPED = lg.objective("ppo", clip_low=1.0, clip_high=float("inf"))


@dataclass(frozen=True)
class Recorded:
    """How far the records of one update are from a float64 computation, and what else must hold of them."""

    error: str | None
    """What attach() or the update raised; then the rest means nothing."""
    tokens: int = 0
    norms: int = 0
    """Rows with a gradient norm that is a number."""
    qkv: float = float("nan")
    prob: float = float("nan")
    logprob: float = float("nan")
    entropy: float = float("nan")
    """Largest absolute error over the tokens; logprob's and entropy's in nat."""
    d1: float = float("nan")
    """Largest relative error of f'."""
    misfit: float = float("nan")
    identical: bool = False
    """Parameters after the update, bit for bit as without the recorder."""

    @property
    def right(self) -> bool:
        """All is as it must be of a float32 model: prob to 1e-6, logprob and entropy to 1e-5 nat, f' to 1e-4."""
        return (
            self.error is None
            and self.tokens > 0
            and self.norms > 0
            and self.prob < 1e-6
            and self.logprob < 1e-5
            and self.entropy < 1e-5
            and self.d1 < 1e-4
            and self.misfit < 1e-4
            and self.identical
        )


def one_update(
    model: transformers.PreTrainedModel, taps: Sequence[str], folder: Path, rows: int = 2
) -> dict[str, Recorded]:
    """Forward, unclipped PPO loss over the completion tokens, backward, AdamW: once plain, once recorded by each tap.

    Args:
        model: not changed; the updates work on copies.
        taps: for attach().
        folder: where the run folders are made, called after their taps.
        rows: sequences in the batch.
    """
    plain, _, _ = _update(copy.deepcopy(model), rows)
    return {tap: _recorded(copy.deepcopy(model), tap, folder / tap, rows, plain) for tap in taps}


def _recorded(model: transformers.PreTrainedModel, tap: str, folder: Path, rows: int, plain: list[Tensor]) -> Recorded:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            after, expected, run = _update(model, rows, tap, folder)
    except (lg.TapError, TypeError, ValueError) as error:
        return Recorded(f"{type(error).__name__}: {error}")
    assert run is not None
    tokens = run.tokens

    def column(name: str) -> np.ndarray:
        return tokens[name].to_numpy(dtype=np.float64, na_value=np.nan)

    def gap(name: str, relative: bool = False) -> float:
        wanted = expected[name].cpu().numpy()
        if len(tokens) != len(wanted):
            return float("inf")
        off = np.abs(column(name) - wanted) / (np.abs(wanted) if relative else 1.0)
        return float(off.max()) if np.isfinite(off).all() else float("inf")

    return Recorded(
        error=None,
        tokens=len(tokens),
        norms=int((run.norms["grad_norm"] > 0).sum()),
        qkv=float(run.updates["qkv_mean_frobenius"].astype(float).iloc[0]),
        prob=gap("prob"),
        logprob=gap("logprob"),
        entropy=gap("entropy"),
        d1=gap("d1", relative=True),
        misfit=float(column("misfit").max()),
        identical=all(torch.equal(a, b) for a, b in zip(plain, after, strict=True)),
    )


def _update(
    model: transformers.PreTrainedModel, rows: int, tap: str | None = None, folder: Path | None = None
) -> tuple[list[Tensor], dict[str, Tensor], lg.Run | None]:
    """(parameters after the update, what the records should say, the run if recorded)."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, UNPADDED, (rows, LENGTH), generator=rng).to(model.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, PROMPT:] = True
    count = int(mask.sum())
    advantages = torch.where(torch.rand(ids.shape, generator=rng) < 0.5, -0.5, 1.0).to(model.device)
    old = (-3.7 + 0.3 * torch.randn(ids.shape, generator=rng)).to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probe = None
    if tap is not None and folder is not None:
        probe = lg.attach(model, optimizer, run=folder, objective=UNCLIPPED, tap=tap, sketch=None)
    try:
        torch.manual_seed(1)  # dropout
        logits = model(input_ids=ids, use_cache=False).logits
        logp = torch.log_softmax(logits[:, PROMPT - 1 : -1].float(), -1)
        logp = logp.gather(2, ids[:, PROMPT:, None]).squeeze(2)
        loss = -(advantages[:, PROMPT:] * (logp - old[:, PROMPT:]).exp()).sum() / count
        if probe is not None:
            probe.batch(input_ids=ids, action_mask=mask, advantages=advantages, old_logprobs=old, loss=loss)
        loss.backward()
        optimizer.step()
    finally:
        if probe is not None:
            probe.close()
    with torch.no_grad():
        every = torch.log_softmax(logits[:, PROMPT - 1 : -1].double(), -1).flatten(0, 1)
        logprob = every.gather(1, ids[:, PROMPT:].reshape(-1, 1)).squeeze(1)
        expected = {
            "logprob": logprob,
            "prob": logprob.exp(),
            "entropy": -(every.exp() * every).sum(1),
            "d1": -advantages[mask].double() * (logprob - old[mask].double()).exp() / count,
        }
    run = None if folder is None else lg.load_run(folder)
    return [parameter.detach() for parameter in model.parameters()], expected, run
