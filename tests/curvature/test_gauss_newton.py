"""Gauss-Newton products against J^T H_z J with the dense J and an H_z by double backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lcogeom as lg
from tests.curvature.models import CONFIGS, MODELS, Case, case, differences, dot, flat, random_like, small_gpt2

OBJECTIVES = ["sft", "ppo", "reinforce", "lco-kld", "lco-mse", "entropy", "gspo"]


def dense_jacobian(some: Case) -> Tensor:
    """(N V, P), row by row by autograd."""
    logits = some.logits().reshape(-1)
    rows = [flat(list(torch.autograd.grad(z, some.params, retain_graph=True, materialize_grads=True))) for z in logits]
    return torch.stack(rows)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_the_dense_product(objective: str, device: torch.device) -> None:
    some = small_gpt2(device)
    chosen = lg.objective(objective)
    z = some.logits().detach()
    H = torch.autograd.functional.hessian(lambda x: chosen.loss(x.reshape(z.shape), some.batch).mean(), z.reshape(-1))
    J = dense_jacobian(some)
    for seed in range(2):
        v = random_like(some.params, seed)
        found = lg.ggn_vector_product(some.logits, chosen, some.batch, some.params, v)
        torch.testing.assert_close(flat(found), J.T @ (H @ (J @ flat(v))), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_equals_differences_of_pulled_back_logits(name: str, tied: bool, device: torch.device) -> None:
    """J v by differences of the logits, H_z by differences of the logit gradient, J^T by autograd."""
    some = case(CONFIGS[name](tied), device)
    objective = lg.objective("ppo", clip_low=None, clip_high=None)
    v = random_like(some.params, 4)
    jv = differences(lambda: [some.logits().detach()], some.params, v, 1e-4)
    z = some.logits()
    jv = jv.reshape(z.shape)
    shifted = [objective.gradient(z.detach() + sign * 1e-4 * jv, some.batch) for sign in (1, -1)]
    push = (shifted[0] - shifted[1]) / 2e-4 / len(some.batch)
    wanted = flat(list(torch.autograd.grad(z, some.params, push, materialize_grads=True)))
    found = flat(lg.ggn_vector_product(some.logits, objective, some.batch, some.params, v))
    # What the differences leave; the Llama family's norms stay in float32.
    assert (found - wanted).norm() <= (1e-4 if name == "gpt2" else 1e-3) * wanted.norm()


@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_symmetric_in_float32(name: str, tied: bool, device: torch.device) -> None:
    some = case(CONFIGS[name](tied), device, torch.float32)

    def product(v: list[Tensor]) -> list[Tensor]:
        return lg.ggn_vector_product(some.logits, lg.objective("ppo"), some.batch, some.params, v)

    u, v = random_like(some.params, 1), random_like(some.params, 2)
    gu = product(u)
    gv, ggu = product(v), product(gu)
    assert abs(dot(ggu, v) - dot(gu, gv)) <= 1e-4 * flat(gu).double().norm() * flat(gv).double().norm()


@pytest.mark.parametrize("objective", ["sft", "lco-kld", "lco-mse", "lco-lch"])
def test_semidefinite_for_convex_objectives(objective: str, device: torch.device) -> None:
    some = case(CONFIGS["llama"](True), device)
    for seed in range(4):
        v = random_like(some.params, seed)
        found = lg.ggn_vector_product(some.logits, lg.objective(objective), some.batch, some.params, v)
        assert dot(found, v) >= 0


def test_micro_batches_add_up(device: torch.device) -> None:
    some = small_gpt2(device)
    objective = lg.objective("lco-kld")
    v = random_like(some.params, 0)
    parts = [some.rows(slice(row, row + 1)) for row in range(3)]
    whole = lg.ggn_vector_product(some.logits, objective, some.batch, some.params, v)
    apart = lg.ggn_vector_product(
        [part.logits for part in parts], objective, [part.batch for part in parts], some.params, v
    )
    torch.testing.assert_close(flat(apart), flat(whole), rtol=1e-10, atol=1e-13)


class NoSecond(torch.autograd.Function):
    """The identity, from a kernel that knows no second derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer: Tensor) -> Tensor:
        return outer.clone()


def test_kernels_without_second_derivative(device: torch.device) -> None:
    some = small_gpt2(device)
    objective = lg.objective("lco-kld")
    v = random_like(some.params, 0)
    plain = flat(lg.ggn_vector_product(some.logits, objective, some.batch, some.params, v))
    some = small_gpt2(device)  # parameters whose route was not chosen yet
    found = flat(lg.ggn_vector_product(lambda: NoSecond.apply(some.logits()), objective, some.batch, some.params, v))
    assert (found - plain).norm() <= 1e-3 * plain.norm()


def test_parameters_used_outside_their_module(device: torch.device) -> None:
    """Forward mode does not see them; the check notices, and another route is taken."""
    some = small_gpt2(device)
    scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64, device=device))
    params = [*some.params, scale]
    objective = lg.objective("ppo")

    def logits() -> Tensor:
        return some.logits() * scale

    v = random_like(params, 3)
    z = logits()
    jacobian = torch.stack([flat(list(torch.autograd.grad(one, params, retain_graph=True))) for one in z.reshape(-1)])
    H = torch.autograd.functional.hessian(
        lambda x: objective.loss(x.reshape(z.shape), some.batch).mean(), z.detach().reshape(-1)
    )
    found = flat(lg.ggn_vector_product(logits, objective, some.batch, params, v))
    torch.testing.assert_close(found, jacobian.T @ (H @ (jacobian @ flat(v))), rtol=1e-9, atol=1e-12)
    assert all(isinstance(p, torch.nn.Parameter) for p in some.model.parameters())


def test_bad_input(device: torch.device) -> None:
    some = small_gpt2(device)
    v = random_like(some.params, 0)
    with pytest.raises(ValueError, match="logits_fn, batch: 1 functions for 2 batches"):
        lg.ggn_vector_product(some.logits, lg.objective("sft"), [some.batch] * 2, some.params, v)
    with pytest.raises(ValueError, match="logits: token 0 holds a NaN"):
        lg.ggn_vector_product(lambda: some.logits() * float("nan"), lg.objective("sft"), some.batch, some.params, v)
    with pytest.raises(ValueError, match="vector: 0 tensors"):
        lg.ggn_vector_product(some.logits, lg.objective("sft"), some.batch, some.params, [])
