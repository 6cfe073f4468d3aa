"""The last layer z = W h as CAPO models it: only W moves, by one step of its optimiser (systems.md, 2.1, 2.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lcogeom.geometry.softmax import blocks


@dataclass(frozen=True, eq=False)
class AdamState:
    """Adam's moments of the head, by the names torch uses: `AdamState(**optimizer.state[head.weight])`.

    They are read, never written. Weight decay and amsgrad are not modelled.

    Raises:
        ValueError: shapes that do not fit each other, a value that is not finite, a setting out of range.
    """

    exp_avg: Tensor
    """First moment of the LOSS's gradient, (V, d); (R, d) where `rows` names the ids."""
    exp_avg_sq: Tensor
    """Second moment, like `exp_avg`."""
    step: float | Tensor
    """Steps taken so far, t; biases are corrected with t + 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    rows: Tensor | None = None
    """Token ids that the moments belong to, (R,), each once; those of all others are 0. None: all V, in order."""

    def __post_init__(self) -> None:
        if self.exp_avg.ndim != 2 or self.exp_avg.shape != self.exp_avg_sq.shape:
            raise ValueError(
                f"exp_avg, exp_avg_sq: shapes {tuple(self.exp_avg.shape)} and {tuple(self.exp_avg_sq.shape)}; "
                "both must be (V, d), the head's, or (R, d) with `rows`."
            )
        if self.rows is not None and (
            self.rows.shape != self.exp_avg.shape[:1] or len(self.rows.unique()) < len(self.rows)
        ):
            raise ValueError(f"rows: must be ({len(self.exp_avg)},), one token id for each row of exp_avg, each once.")
        for name in ("exp_avg", "exp_avg_sq"):
            _require_finite(name, getattr(self, name))
        if bool((self.exp_avg_sq < 0).any()):
            raise ValueError("exp_avg_sq: negative; a mean of squares cannot be. Are the moments swapped?")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas}; each must be in [0, 1).")
        if not (self.eps > 0 and float(self.step) >= 0):
            raise ValueError(f"eps, step: {self.eps} and {float(self.step)}; eps must be > 0 and step >= 0.")

    def direction(self, gradient: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
        """m_hat / (sqrt(v_hat) + eps) of the step that `gradient` would make, its shape (..., R, d).

        moments: `prior` of those R rows of the head; they broadcast against `gradient`.
        """
        (beta1, beta2), after = self.betas, float(self.step) + 1
        mean = torch.add(moments[0], gradient, alpha=(1 - beta1) / (1 - beta1**after))
        square = torch.addcmul(moments[1], gradient, gradient, value=(1 - beta2) / (1 - beta2**after))
        return mean.div_(square.sqrt_().add_(self.eps))

    def prior(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the moments of some rows, ids of any shape, put into m_hat and v_hat, (*ids.shape, d) float64 each."""
        (beta1, beta2), after = self.betas, float(self.step) + 1
        mean, square = self._moments(ids)
        return mean * (beta1 / (1 - beta1**after)), square * (beta2 / (1 - beta2**after))

    def _moments(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments of some rows, (*ids.shape, d) float64."""
        if self.rows is None:
            return self.exp_avg[ids].double(), self.exp_avg_sq[ids].double()
        ordered, order = self.rows.sort()
        place = torch.searchsorted(ordered, ids).clamp(max=len(ordered) - 1)
        known = (ordered[place] == ids)[..., None]
        mean, square = self.exp_avg[order[place]].double(), self.exp_avg_sq[order[place]].double()
        return torch.where(known, mean, 0.0), torch.where(known, square, 0.0)


@dataclass(frozen=True, eq=False)
class LastLayer:
    """What the model z = W h of the last layer needs to know of N tokens.

    Raises:
        ValueError: hidden states of a wrong shape or not finite, a learning rate that is not > 0.
    """

    hidden: Tensor
    """The head's input h, (N, d): after the final norm. With a logit scale c, z = c W h, pass c h."""
    learning_rate: float
    """Of this step."""
    adam: AdamState | None = None
    """Moments of the head. None: SGD, which is also what the published code falls back to on Adam's first step."""

    def __post_init__(self) -> None:
        if self.hidden.ndim != 2:
            raise ValueError(
                f"hidden: shape {tuple(self.hidden.shape)}; must be (N, d), one row per token of the batch. "
                "Flatten it with your mask."
            )
        _require_finite("hidden", self.hidden)
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate: {self.learning_rate}; must be a finite number > 0, that of this step.")
        if self.adam is not None and self.adam.exp_avg.shape[1] != self.hidden.shape[1]:
            raise ValueError(
                f"exp_avg: rows of width {self.adam.exp_avg.shape[1]}, but hidden has d = {self.hidden.shape[1]}. "
                "Pass the moments of the output embedding."
            )

    def require(self, tokens: int, vocab: int) -> None:
        """Raise ValueError unless it belongs to N tokens and V logits."""
        if len(self.hidden) != tokens:
            raise ValueError(f"hidden: {len(self.hidden)} rows, but the batch has {tokens} tokens; one row for each.")
        if self.adam is not None and self.adam.rows is None and len(self.adam.exp_avg) != vocab:
            raise ValueError(
                f"exp_avg: {len(self.adam.exp_avg)} rows, but V = {vocab}; pass the ids of those as `rows`."
            )


def move_alone(layer: LastLayer, gradient: Tensor, ids: Tensor | None) -> Tensor:
    """Overwrite each token's dL/dz by u = D h, its displacement under its OWN step D = U(dL/dz h^T), for all N tokens.

    Args:
        gradient: (N, K) float64, overwritten.
        ids: the head's rows that the K columns stand for, (N, K); None: all V.

    Returns:
        dL/dz . u, (N,).
    """
    tokens, width = gradient.shape
    hidden = layer.hidden.double()
    change = gradient.new_zeros(tokens)
    if layer.adam is None:  # D h = -lr dL/dz ||h||^2
        scale = -layer.learning_rate * hidden.square().sum(1, keepdim=True)
        for rows in blocks((tokens, width), hidden.device):
            change[rows] = scale[rows, 0] * gradient[rows].square().sum(1)
            gradient[rows] *= scale[rows]
        return change
    adam, every = layer.adam, torch.arange(width, device=gradient.device)
    for columns in blocks((width, hidden.shape[1]), hidden.device):
        names = every[columns] if ids is None else ids[:, columns]
        shared = adam.prior(names) if ids is None else None  # one read of the moments for all tokens
        part = gradient[:, columns]
        for rows in blocks((tokens, part.shape[1] * hidden.shape[1]), hidden.device):
            slope, h = part[rows], hidden[rows]
            moments = shared or adam.prior(names[rows])
            step = adam.direction(slope[:, :, None] * h[:, None, :], moments)  # (n, k, d), a block of it at a time
            moved = (step @ h[:, :, None]).squeeze(2) * -layer.learning_rate
            change[rows] += (slope * moved).sum(1)
            part[rows] = moved  # a view of `gradient`
    return change


def move_together(
    layer: LastLayer, gradient: Tensor, ids: Tensor | None, group: slice | Tensor, live: Tensor
) -> Tensor:
    """Overwrite the dL/dz of a group's tokens by u = D h, their displacement under the step of their MEAN gradient.

    Each row of the head is averaged over the live tokens that have it among their ids.

    Args:
        gradient: (N, K) float64; its rows of the group are overwritten.
        ids: as in `move_alone`.
        group: which tokens.
        live: which tokens count, (N,) float64 of ones and zeros.

    Returns:
        dL/dz . u of the group's tokens, (n,).
    """
    hidden, live = layer.hidden[group].double(), live[group]
    where = None
    if ids is None:
        names = torch.arange(gradient.shape[1], device=gradient.device)
        dense = gradient[group]  # a view where the group is a slice
        share = 1 / live.sum().clamp(min=1).expand(len(names))
    else:
        names, where = ids[group].unique(return_inverse=True)
        dense = gradient.new_zeros(len(hidden), len(names)).scatter_(1, where, gradient[group])
        share = 1 / torch.zeros_like(dense).scatter_(1, where, live[:, None].expand(where.shape)).sum(0).clamp(min=1)
    adam, gram = layer.adam, hidden @ hidden.T
    change = gradient.new_zeros(len(hidden))
    for columns in blocks((len(names), max(hidden.shape)), hidden.device):
        slope = dense[:, columns]
        if adam is None:
            moved = gram @ (slope * (share[columns] * -layer.learning_rate))
        else:
            mean = (slope * share[columns]).T @ hidden
            step = adam.direction(mean, adam.prior(names[columns]))
            moved = hidden @ step.T * -layer.learning_rate
        change += (slope * moved).sum(1)
        dense[:, columns] = moved
    if where is not None:
        dense = dense.gather(1, where)
    gradient[group] = dense
    return change


def _require_finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        row = int((~torch.isfinite(value)).any(1).nonzero()[0])
        raise ValueError(f"{name}: NaN or infinite in row {row}. Check where it was taken.")
