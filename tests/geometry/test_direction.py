"""Cosines and directionality against flat vectors in float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import lcogeom as lg


def flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors]).cpu().numpy()


def exact(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# lists of tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cosine_of_lists(dtype: torch.dtype, device: torch.device) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = [(700, 500), (3,), (), (0,), (20, 30, 4)]
    a, b = ([torch.randn(shape, generator=rng).to(device, dtype) for shape in shapes] for _ in range(2))
    b[0] = b[0] + a[0]
    b[4], a[4] = b[4].transpose(0, 1).contiguous().transpose(0, 1), a[4]
    assert lg.cosine(a, b) == pytest.approx(exact(flat(a), flat(b)), abs=1e-14)
    assert lg.cosine(a, [-x for x in a]) == pytest.approx(-1, abs=1e-14)


def test_cosine_is_summed_in_float64() -> None:
    """A large part that cancels and a small one that counts: float32 sums would lose it."""
    a = [torch.tensor([1e4, 1e4, 1e-3])]
    b = [torch.tensor([1e4, -1e4, 1e-3])]
    assert lg.cosine(a, b) == pytest.approx(exact(flat(a), flat(b)), rel=1e-10)


def test_cosine_of_nothing() -> None:
    assert math.isnan(lg.cosine([torch.zeros(3)], [torch.ones(3)]))
    with pytest.raises(ValueError, match="1 and 2 tensors"):
        lg.cosine([torch.ones(3)], [torch.ones(3), torch.ones(3)])
    with pytest.raises(ValueError, match=r"tensor 0 has shapes \(3,\) and \(1, 3\)"):
        lg.cosine([torch.ones(3)], [torch.ones(1, 3)])


# sketches ---------------------------------------------------------------------------------------


def path(updates: int = 7, length: int = 40_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gradients and steps of a walk whose steps follow the gradient more and more loosely."""
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((updates, length)) + rng.standard_normal(length)
    looseness = np.linspace(0.1, 3, updates)[:, None]
    return gradients, -0.1 * (gradients + looseness * rng.standard_normal((updates, length)))


def rows(vectors: np.ndarray, size: int = 16384) -> np.ndarray:
    return np.stack([lg.sketch(torch.from_numpy(vector), size).numpy() for vector in vectors])


def test_all_pairs() -> None:
    gradients, steps = path()
    found = lg.sketch_cosines(rows(gradients), rows(steps))
    assert found.values.shape == found.standard_error.shape == (7, 7)
    for i, g in enumerate(gradients):
        for j, d in enumerate(steps):
            assert found.standard_error[i, j] == pytest.approx((1 - found.values[i, j] ** 2) / 128)
            assert abs(found.values[i, j] - exact(g, d)) < 4.5 * found.standard_error[i, j]
    alone = lg.sketch_cosines(rows(gradients))
    assert np.diag(alone.values) == pytest.approx(np.ones(7))
    assert np.array_equal(alone.values, lg.sketch_cosines(rows(gradients), rows(gradients)).values)


@pytest.mark.parametrize("end", [None, 7, 4, 1])
def test_directionality(end: int | None) -> None:
    gradients, steps = path()
    weights = np.concatenate([np.zeros((1, steps.shape[1])), np.cumsum(steps, axis=0)])
    target = weights[7 if end is None else end]
    found = lg.directionality(rows(gradients), rows(steps), end)
    last = 7 if end is None else end
    for update in range(last):
        wanted = exact(-gradients[update], target - weights[update])
        assert abs(found.values[update] - wanted) < 4.5 * found.standard_error[update]
        assert 0 < found.standard_error[update] <= 1 / 128
    assert np.isnan(found.values[last:]).all()
    assert np.isnan(found.standard_error[last:]).all()


def test_directionality_is_exact_where_the_sketch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a block of the size of the sketch, vectors of one block lose nothing: rotation and signs keep products."""
    monkeypatch.setattr(importlib.import_module("lcogeom.geometry.sketch"), "BLOCK", 1)
    gradients, steps = path(length=900)
    weights = np.concatenate([np.zeros((1, 900)), np.cumsum(steps, axis=0)])
    found = lg.directionality(rows(gradients, 1024), rows(steps, 1024))
    wanted = [exact(-g, weights[-1] - w) for g, w in zip(gradients, weights, strict=False)]
    np.testing.assert_allclose(found.values, wanted, atol=1e-6)
    assert found.values[-1] == pytest.approx(exact(-gradients[-1], steps[-1]), abs=1e-6)
    steps[2:] = 0  # a run that stops moving has arrived
    assert np.isnan(lg.directionality(rows(gradients, 1024), rows(steps, 1024)).values[2:]).all()


def test_sketches_that_are_not_finite() -> None:
    a = np.ones((3, 8))
    a[1, 2] = np.inf
    found = lg.sketch_cosines(a)
    assert np.isnan(found.values[1]).all()
    assert found.values[0, 2] == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lg.sketch_cosines(np.ones(3)), "must be"),
        (lambda: lg.sketch_cosines(np.ones((3, 4)), np.ones((3, 5))), "shapes"),
        (lambda: lg.directionality(np.ones((3, 4)), np.ones((2, 4))), "gradients, steps"),
        (lambda: lg.directionality(np.ones((3, 4)), np.ones((3, 4)), 4), "end: 4; must be in 1..3"),
        (lambda: lg.directionality(np.ones((3, 4)), np.ones((3, 4)), 0), "end: 0"),
    ],
)
def test_bad_shapes(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# gradients of several losses --------------------------------------------------------------------


class Losses:
    """A small network on one batch: four losses, one of which sees no hidden layer."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(5, 300), torch.nn.Tanh(), torch.nn.Linear(300, 200)).to(device)
        x, self.y = torch.randn(8, 5, device=device), torch.randn(8, 200, device=device)
        alternate = torch.tensor([1.0, 0.0] * 4, device=device)
        half = (torch.arange(8, device=device) < 4).float()

        def weighted(weights: Tensor) -> Callable[[], Tensor]:
            return lambda: (weights[:, None] * (self.model(x) - self.y).square() / 1600).sum() + 0.0

        self.losses = {
            "first half": weighted(half),
            "second half": weighted(1 - half),
            "A > 0": weighted(alternate),
            "bias": lambda: self.model[2].bias.square().sum().reshape(1),
        }
        self.params = list(self.model.parameters())

    def wanted(self) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and norms by backward() into .grad."""
        gradients = []
        for loss in self.losses.values():
            self.model.zero_grad()
            loss().sum().backward()
            gradients.append(flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]))
        self.model.zero_grad()
        return np.array([[exact(a, b) for b in gradients] for a in gradients]), np.linalg.norm(gradients, axis=1)


def test_gradient_cosines(device: torch.device) -> None:
    task = Losses(device)
    wanted, norms = task.wanted()
    found = lg.gradient_cosines(task.losses, task.params)
    assert found.names == tuple(task.losses)
    np.testing.assert_allclose(found.values, wanted, atol=1e-6)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-6)
    assert (found.standard_error == 0).all()
    assert all(parameter.grad is None for parameter in task.params)
    one = lg.gradient_cosines({"only": task.losses["A > 0"]}, task.params)
    assert one.values == pytest.approx(np.ones((1, 1)))
    assert one.norms[0] == pytest.approx(norms[2], rel=1e-6)


def test_gradient_cosines_sketched_in_one_block_are_exact(device: torch.device) -> None:
    """62,000 parameters in 65,536 numbers: every parameter has its own, also of a loss that reaches few of them."""
    task = Losses(device)
    wanted, _ = task.wanted()
    assert np.abs(wanted[3, :3]).max() > 1e-3  # "bias" has something in common with the others
    found = lg.gradient_cosines(task.losses, task.params, sketch=2**16)
    np.testing.assert_allclose(found.values, wanted, atol=1e-5)


@pytest.mark.parametrize("size", [128, 16384])
def test_gradient_cosines_sketched(size: int, device: torch.device) -> None:
    task = Losses(device)
    wanted, norms = task.wanted()
    found = lg.gradient_cosines(task.losses, task.params, sketch=size)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-6)
    off = np.abs(found.values - wanted)[np.triu_indices(4, 1)]
    assert (off < 4.5 * found.standard_error[np.triu_indices(4, 1)] + 1e-6).all()
    assert off.max() > 1e-5  # it is a sketch


def test_the_losses_are_called_as_often_as_said(device: torch.device) -> None:
    task = Losses(device)
    calls = []
    counted = {name: (lambda n=name, f=loss: (calls.append(n), f())[1]) for name, loss in task.losses.items()}
    lg.gradient_cosines(counted, task.params)
    assert len(calls) == 4 * 5 // 2 - 1
    calls.clear()
    lg.gradient_cosines(counted, task.params, sketch=64)
    assert calls == list(task.losses)


def test_a_zero_gradient(device: torch.device) -> None:
    task = Losses(device)
    losses = {"zero": lambda: 0 * task.losses["A > 0"](), "not": task.losses["A > 0"]}
    for sketch in (None, 64):
        found = lg.gradient_cosines(losses, task.params, sketch=sketch)
        assert np.isnan(found.values[0]).all()
        assert found.values[1, 1] == pytest.approx(1)
        assert found.norms[0] == 0


def test_bad_losses(device: torch.device) -> None:
    task = Losses(device)
    dropout = torch.nn.Dropout(0.5)
    noisy = lambda: dropout(task.model(torch.ones(1, 5, device=device))).square().sum()  # noqa: E731
    fine = task.losses["A > 0"]
    for losses, params, words in (
        ({}, task.params, "0 losses"),
        ({"a": fine}, [], "0 parameters"),
        ({"a": lambda: task.y}, task.params, "'a' gave"),
        ({"a": lambda: fine().detach()}, task.params, "'a' gave"),
        ({"a": lambda: 3.0}, task.params, "'a' gave 3.0"),
        ({"a": lambda: torch.ones(1, requires_grad=True).sum()}, task.params, "'a' does not depend"),
        ({"a": fine, "b": fine, "noisy": noisy}, task.params, "'noisy' gave a gradient of norm"),
    ):
        with pytest.raises(ValueError, match=words):
            lg.gradient_cosines(losses, params)
