"""Cosines: between lists of tensors, gradients of several losses, and the recorded updates of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lcogeom.geometry.sketch import LinearSketch, standard_error

PIECE = 2**18  # elements looked at together: in float64 a pair of pieces stays in the cache
REPEATABLE = 1e-3  # two gradients of one loss differ by less, relative to their norm


@dataclass(frozen=True, eq=False)
class Cosines:
    """Cosines, NaN where a vector is zero or not finite."""

    values: np.ndarray
    """float64."""
    standard_error: np.ndarray
    """Of each value, float64: 0 where it was computed from the vectors themselves, the sketch's error else."""


@dataclass(frozen=True, eq=False)
class GradientCosines:
    """How the gradients of several losses lie to each other at the same parameters."""

    names: tuple[str, ...]
    """Of the n losses, in the order given."""
    values: np.ndarray
    """(n, n) cosines, float64; NaN with a gradient that is zero."""
    norms: np.ndarray
    """(n,) Euclidean norms of the gradients, float64, exact."""
    standard_error: np.ndarray
    """(n, n): 0 where exact."""


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Cosine of two vectors that are lists of tensors, summed in float64 without a flat copy. Waits for the device.

    Args:
        a, b: the same number of floating-point tensors of the same shapes, such as the gradients of a model.

    Returns:
        In [-1, 1] up to rounding; NaN if either is zero.

    Raises:
        ValueError: different numbers of tensors, different shapes, or none.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"a, b: {len(a)} and {len(b)} tensors; both need the same number, at least one.")
    for place, (one, other) in enumerate(zip(a, b, strict=True)):
        if one.shape != other.shape:
            raise ValueError(f"a, b: tensor {place} has shapes {tuple(one.shape)} and {tuple(other.shape)}.")
    along, square_a, square_b = (_inner(*pair) for pair in ((a, b), (a, a), (b, b)))
    return along / math.sqrt(square_a * square_b) if square_a > 0 and square_b > 0 else math.nan


def sketch_cosines(a: np.ndarray, b: np.ndarray | None = None) -> Cosines:
    """All-pairs cosines from sketches (method.md, 3), with the standard error that the sketch adds.

    Args:
        a: (N, size), one sketch a row (`lcogeom.sketch`, or `Run.sketches`).
        b: (M, size), of the same size and seed; None: the pairs within `a`.

    Returns:
        (N, M) cosines of the rows of a and b, and their standard errors, (1 - cos^2) / sqrt(size).

    Raises:
        ValueError: not matrices of one width.
    """
    a = np.asarray(a, dtype=np.float64)
    other = a if b is None else np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or other.ndim != 2 or a.shape[1] != other.shape[1]:
        raise ValueError(f"a, b: shapes {a.shape} and {other.shape}; must be (N, size) and (M, size).")
    return _with_error(_unit(a) @ _unit(other).T, a.shape[1])


def directionality(gradients: np.ndarray, steps: np.ndarray, end: int | None = None) -> Cosines:
    """Does the gradient point to where the run ends up?  cos(-g_t, theta* - theta_t) (method.md, 3).

    theta* - theta_t is the sum of the steps in between, and so is its sketch: exactly, since a sketch is linear.

    Args:
        gradients: (T, size), sketches of g_t.
        steps: (T, size), sketches of d_t = theta_t+1 - theta_t.
        end: theta* is where the parameters stood before update `end`, in 1..T; None: after the last, T.

    Returns:
        (T,) cosines and their standard errors; NaN from update `end` on.

    Raises:
        ValueError: shapes that differ, or `end` out of range.
    """
    gradients, steps = np.asarray(gradients, dtype=np.float64), np.asarray(steps, dtype=np.float64)
    if gradients.ndim != 2 or gradients.shape != steps.shape:
        raise ValueError(f"gradients, steps: shapes {gradients.shape} and {steps.shape}; must be (T, size), the same.")
    end = len(steps) if end is None else end
    if not 1 <= end <= len(steps):
        raise ValueError(f"end: {end}; must be in 1..{len(steps)}.")
    way = np.full_like(steps, np.nan)
    way[:end] = np.cumsum(steps[:end][::-1], axis=0)[::-1]
    return _with_error((_unit(-gradients) * _unit(way)).sum(axis=1), steps.shape[1])


def gradient_cosines(
    losses: Mapping[str, Callable[[], Tensor]], params: Sequence[Tensor], *, sketch: int | None = None, seed: int = 0
) -> GradientCosines:
    """Cosines of the gradients of several losses: micro-batches, objectives, tokens with A > 0 and with A < 0.

        lg.gradient_cosines({
            "A > 0": lambda: (objective.loss(logits(), batch) * (batch.advantages > 0)).mean(),
            "A < 0": lambda: (objective.loss(logits(), batch) * (batch.advantages < 0)).mean(),
        }, list(model.parameters()))

    Exact by default, with two gradients in memory at once: every pair calls its later loss again, n (n + 1) / 2 - 1
    backward passes for n > 1 losses. `.grad` of the parameters is left alone.

    Args:
        losses: name -> a function without arguments that computes the scalar loss with its graph.
        params: what to differentiate by; one that a loss does not reach counts as 0.
        sketch: keep sketches of this size instead: one gradient in memory, n backward passes, a stated error.
        seed: of the sketch.

    Raises:
        ValueError: no loss, no parameters, a loss that is no scalar or reaches none of them, or one that gave another
            gradient when it was called again (dropout, say).
    """
    params = list(params)
    if not losses or not params:
        raise ValueError(f"losses, params: {len(losses)} losses and {len(params)} parameters; give at least one each.")
    names = tuple(losses)
    norms = np.full(len(names), np.nan)
    if sketch is not None:
        sketches = []
        for place, name in enumerate(names):
            gradient = _gradient(name, losses[name], params)
            norms[place] = math.sqrt(_inner(gradient, gradient))
            sketches.append(_sketched(gradient, params, sketch, seed))
        found = sketch_cosines(np.stack(sketches))
        return GradientCosines(names, found.values, norms, found.standard_error)
    products = np.zeros((len(names), len(names)))
    for place, name in enumerate(names[:-1] or names):
        gradient = _gradient(name, losses[name], params)
        norms[place] = _norm_again(name, norms[place], gradient)
        for later in range(place + 1, len(names)):
            other = _gradient(names[later], losses[names[later]], params)
            norms[later] = _norm_again(names[later], norms[later], other)
            products[place, later] = products[later, place] = _inner(gradient, other)
    np.fill_diagonal(products, norms**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = products / np.outer(norms, norms)
    return GradientCosines(names, values, norms, np.zeros_like(values))


def _gradient(name: str, loss: Callable[[], Tensor], params: Sequence[Tensor]) -> list[Tensor | None]:
    value = loss()
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ValueError(f"losses: {name!r} gave {value!r}; must be a scalar tensor with a graph to the parameters.")
    found: list[Tensor | None] = list(torch.autograd.grad(value.reshape(()), params, allow_unused=True))
    if all(part is None for part in found):
        raise ValueError(f"losses: {name!r} does not depend on any of the parameters.")
    return found


def _norm_again(name: str, before: float, gradient: Sequence[Tensor | None]) -> float:
    """The gradient's norm; the same loss called before must have given it too."""
    norm = math.sqrt(_inner(gradient, gradient))
    if not math.isnan(before) and not math.isclose(norm, before, rel_tol=REPEATABLE):
        raise ValueError(
            f"losses: {name!r} gave a gradient of norm {before:.6g} and then {norm:.6g}. Switch dropout off "
            "(model.eval()), or pass sketch=16384, which calls each loss once."
        )
    return norm


def _sketched(gradient: Sequence[Tensor | None], params: Sequence[Tensor], size: int, seed: int) -> np.ndarray:
    total, start = LinearSketch(size, seed, params[0].device), 0
    for parameter, part in zip(params, gradient, strict=True):
        if part is not None:
            total.add(part, start)
        start += parameter.numel()
    return total.result().cpu().numpy()


def _inner(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """Inner product of two lists of tensors, None counting as 0."""
    terms: list[Tensor] = []
    with torch.no_grad():
        for one, other in zip(a, b, strict=True):
            if one is not None and other is not None:
                for x, y in _pieces(one, other):
                    terms.append(torch.dot(x.double(), y.to(x.device).double()))
    return math.fsum(float(term) for term in terms)


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(a.detach().reshape(-1).split(PIECE), b.detach().reshape(-1).split(PIECE), strict=True)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their norms; NaN where one is 0 or not finite."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _with_error(values: np.ndarray, size: int) -> Cosines:
    values = np.where(np.isfinite(values), np.clip(values, -1.0, 1.0), np.nan)
    return Cosines(values, standard_error(values, size))
