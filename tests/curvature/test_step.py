"""The audit of one update: its parts against brute force, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lcogeom as lg
from tests.curvature.models import CONFIGS, Case, case, dot, random_like, small_gpt2
from tests.curvature.test_gauss_newton import dense_jacobian

OBJECTIVES = ["sft", "ppo", "reinforce", "lco-kld", "lco-mse", "entropy", "gspo"]


def step_of(some: Case, length: float, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """(parameters before, step), after moving the model by the step."""
    before = [p.detach().clone() for p in some.params]
    step = [length * d for d in random_like(some.params, seed)]
    with torch.no_grad():
        for p, d in zip(some.params, step, strict=True):
            p.add_(d)
    return before, step


def put(params: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_part_equals_brute_force(objective: str, device: torch.device) -> None:
    some = small_gpt2(device)
    chosen = lg.objective(objective)
    before, step = step_of(some, 0.02)
    after = [p.detach().clone() for p in some.params]
    audit = lg.audit_step(some.logits, chosen, some.batch, some.params, before)
    later, z1 = some.loss(chosen)().item(), some.logits().detach()

    put(some.params, before)
    loss = some.loss(chosen)
    z0, J = some.logits().detach(), dense_jacobian(some)
    dz = (z1 - z0).reshape(-1)

    def of_logits(z: Tensor) -> Tensor:
        return chosen.loss(z.reshape(z0.shape), some.batch).mean()

    slope = torch.autograd.functional.jacobian(of_logits, z0.reshape(-1))
    H = torch.autograd.functional.hessian(of_logits, z0.reshape(-1))
    d = torch.cat([part.reshape(-1) for part in step])
    wanted = {"actual": later - loss().item(), "first_order": slope @ J @ d, "gauss_newton": (J @ d) @ H @ (J @ d) / 2}
    wanted |= {"logit_first_order": slope @ dz, "logit_curvature": dz @ H @ dz / 2}

    def along(t: float) -> float:
        put(some.params, [b + t * part for b, part in zip(before, step, strict=True)])
        return loss().item()

    h = 0.05
    wanted["whole"] = (-along(2 * h) + 16 * along(h) - 30 * along(0) + 16 * along(-h) - along(-2 * h)) / (24 * h**2)
    put(some.params, after)
    scale = abs(wanted["actual"]) + abs(float(wanted["gauss_newton"]))
    for name in ("actual", "first_order", "gauss_newton", "logit_first_order", "logit_curvature"):
        assert abs(getattr(audit, name) - float(wanted[name])) <= 1e-9 * scale, name
    assert abs(audit.gauss_newton + audit.residual - wanted["whole"]) <= 1e-5 * scale  # a difference's accuracy
    parts = audit.first_order + audit.gauss_newton + audit.residual + audit.remainder
    assert parts == pytest.approx(audit.actual, rel=1e-12)
    through = audit.logit_first_order + audit.logit_curvature + audit.logit_remainder
    assert through == pytest.approx(audit.actual, rel=1e-12)
    bend = 2 * (audit.gauss_newton + audit.residual)
    assert audit.overshoot == pytest.approx(bend / abs(audit.first_order), rel=1e-12)


@pytest.mark.parametrize("objective", ["sft", "ppo", "lco-kld"])
def test_the_remainder_is_of_third_order(objective: str, device: torch.device) -> None:
    some = small_gpt2(device)
    start = [p.detach().clone() for p in some.params]
    left = []
    for length in (0.01, 0.005):
        before, _ = step_of(some, length)
        left.append(
            lg.audit_step(
                some.logits,
                lg.objective(
                    objective,
                ),
                some.batch,
                some.params,
                before,
            ).remainder
        )
        put(some.params, start)
    assert 6 < abs(left[0] / left[1]) < 10  # 2^3


@pytest.mark.parametrize("objective", ["sft", "lco-kld", "lco-mse", "lco-lch"])
def test_curvature_through_the_logits_is_not_negative_for_convex_objectives(
    objective: str, device: torch.device
) -> None:
    some = case(CONFIGS["llama"](True), device, torch.float32)
    for seed in range(5):
        before, _ = step_of(some, 0.03, seed)
        audit = lg.audit_step(some.logits, lg.objective(objective), some.batch, some.params, before)
        assert audit.gauss_newton >= 0
        assert audit.logit_curvature >= 0


def test_nothing_is_moved(device: torch.device) -> None:
    some = case(CONFIGS["llama"](False), device, torch.float32)
    before, _ = step_of(some, 0.01)
    for p in some.params:
        p.grad = torch.ones_like(p)
    after = [p.detach().clone() for p in some.params]
    state = torch.get_rng_state()
    lg.audit_step(some.logits, lg.objective("ppo"), some.batch, some.params, before)
    assert all(torch.equal(p, a) for p, a in zip(some.params, after, strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in some.params if p.grad is not None)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"advantages: objective .ppo. needs it"):
        lg.audit_step(some.logits, lg.objective("ppo"), lg.TokenBatch(some.batch.actions), some.params, before)
    assert all(torch.equal(p, a) for p, a in zip(some.params, after, strict=True))


def test_micro_batches_and_differences_say_the_same(device: torch.device) -> None:
    some = small_gpt2(device)
    before, step = step_of(some, 0.02)
    objective = lg.objective("ppo")
    whole = lg.audit_step(some.logits, objective, some.batch, some.params, before)
    parts = [some.rows(slice(row, row + 1)) for row in range(3)]
    apart = lg.audit_step([p.logits for p in parts], objective, [p.batch for p in parts], some.params, before)
    near = lg.audit_step(some.logits, objective, some.batch, some.params, before, route="finite-differences")
    for name in ("actual", "first_order", "gauss_newton", "residual", "logit_curvature", "rounding"):
        assert getattr(apart, name) == pytest.approx(getattr(whole, name), rel=1e-8), name
    assert near.route == "finite-differences"
    bend = whole.gauss_newton + whole.residual
    assert near.gauss_newton + near.residual == pytest.approx(bend, rel=1e-3)
    assert dot(step, step) > 0


def test_rounding_bounds_what_float32_does(device: torch.device) -> None:
    """Of a step too small to change the loss by more than rounding, `actual` stays within a few times `rounding`."""
    some = case(CONFIGS["llama"](False), device, torch.float32)
    before, _ = step_of(some, 1e-9)
    audit = lg.audit_step(some.logits, lg.objective("sft"), some.batch, some.params, before)
    assert abs(audit.actual) <= 20 * audit.rounding
    assert 0 < audit.rounding < 1e-4


def test_before_must_fit(device: torch.device) -> None:
    some = small_gpt2(device)
    with pytest.raises(ValueError, match="before: 0 tensors"):
        lg.audit_step(some.logits, lg.objective("sft"), some.batch, some.params, [])
