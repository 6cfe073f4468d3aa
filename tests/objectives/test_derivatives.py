"""Loss, gradient and Hessian of every objective against float64 double backward of an independent definition.

Tolerance: double backward itself rounds at eps times the largest term it sums, which is |f'| + |f''| for an action
objective: 1e-12 of that scale leaves room for V = 400 terms. Where the closed form is MORE accurate than double
backward (saturated tokens), test_accuracy.py compares it with 60-digit arithmetic instead.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lcogeom as lg
from tests.cases import CASES, Case
from tests.oracles import PAIRS, built, derivatives, pairs_and_cases


@pytest.mark.parametrize(("name", "case"), pairs_and_cases(CASES), ids=str)
def test_equals_double_backward(name: str, case: Case, device: torch.device) -> None:
    objective, oracle = PAIRS[name]
    logits, batch = built(name, case, device)
    loss, gradient, hessian = derivatives(oracle, logits, batch)
    scale = 1 + gradient.abs().max().item() + hessian.abs().max().item()
    if isinstance(objective, lg.ActionObjective):
        logprobs = torch.log_softmax(logits.double(), 1).gather(1, batch.actions[:, None]).squeeze(1)
        _, d1, d2 = objective.derivatives(logprobs, batch)
        scale += (d1.abs() + d2.abs()).max().item()
    if name == "ppo-cvx":  # k* is rounded up by 16 eps |f'|, and multiplies a loss of that size
        scale += batch.advantages.square().max().item()
    close = {"rtol": 1e-9, "atol": 1e-12 * scale}

    single = 1e-5 if logits.dtype != torch.float64 else 1e-12  # loss() stays in float32 for float32 logits
    found = objective.loss(logits, batch)
    assert found.shape == (len(batch),)
    torch.testing.assert_close(found.double(), loss, rtol=single, atol=single * scale)

    H = objective.hessian(logits, batch)
    x = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    torch.testing.assert_close(objective.gradient(logits, batch), gradient, **close)
    torch.testing.assert_close(H.dense(), hessian, **close)
    wide = {"rtol": 1e-9, "atol": 1e-12 * scale * case.vocab}  # sums of V entries
    torch.testing.assert_close(H @ x, torch.einsum("nij,nj->ni", hessian, x), **wide)
    torch.testing.assert_close(H.quadratic(x), torch.einsum("ni,nij,nj->n", x, hessian, x), **wide)
    torch.testing.assert_close(H.diagonal(), hessian.diagonal(dim1=1, dim2=2), **close)
    torch.testing.assert_close(H.trace(), hessian.diagonal(dim1=1, dim2=2).sum(1), **wide)


@pytest.mark.parametrize("name", ["lco-kld", "lco-mse", "lco-lch"])
@pytest.mark.parametrize("vocab", [5, 40])
def test_top_k_advantages(name: str, vocab: int, device: torch.device) -> None:
    _, oracle = PAIRS[name]
    logits, sparse = Case(vocab, "random", 1.0, 0.0).build(device)
    ids = logits.topk(3, dim=1).indices
    advantages = torch.randn(ids.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
    batch = lg.TokenBatch(sparse.actions, advantages, old_logits=sparse.old_logits, advantage_ids=ids)
    loss, gradient, hessian = derivatives(oracle, logits, batch)
    objective = lg.objective(name)
    torch.testing.assert_close(objective.loss(logits, batch), loss)
    torch.testing.assert_close(objective.gradient(logits, batch), gradient)
    torch.testing.assert_close(objective.hessian(logits, batch).dense(), hessian)


def test_sparse_lco_kld_is_a_weighted_nll_plus_a_forward_kl(device: torch.device) -> None:
    """KL(t || p) = alpha * (-l) + (1 - alpha) * KL(pi_old || p) + const (method.md, 2.3): gradients agree."""
    for advantage in (-3.0, 0.5, 4.0):
        logits, batch = Case(17, "random", advantage, 0.0).build(device)
        old = torch.softmax(batch.old_logits, 1)
        rise = torch.expm1(batch.advantages / 2.0) * old.gather(1, batch.actions[:, None]).squeeze(1)
        alpha = (rise / (1 + rise))[:, None]
        p = torch.softmax(logits, 1)
        unit = torch.nn.functional.one_hot(batch.actions, 17)
        expected = alpha * (p - unit) + (1 - alpha) * (p - old)
        torch.testing.assert_close(lg.objective("lco-kld").gradient(logits, batch), expected)


@pytest.mark.parametrize("name", ["lco-kld", "lco-mse", "lco-lch"])
def test_moving_target(name: str, device: torch.device) -> None:
    """target="current" equals target="rollout" with the current logits put in for the rollout's, at any z."""
    logits, batch = Case(17, "random", 1.5, 0.0).build(device)
    still = lg.TokenBatch(batch.actions, batch.advantages, old_logits=logits)
    moving = lg.objective(name, target="current")
    torch.testing.assert_close(moving.gradient(logits, batch), lg.objective(name).gradient(logits, still))
    z = logits.clone().requires_grad_()
    (through,) = torch.autograd.grad(moving.loss(z, batch).sum(), z)
    torch.testing.assert_close(through, moving.gradient(logits, batch))
    if name == "lco-mse":  # the authors' form: constant gradient -A / beta on the action
        expected = -batch.advantages / 2.0
        torch.testing.assert_close(through.gather(1, batch.actions[:, None]).squeeze(1), expected)


def test_negative_beta_scale_acts_on_negative_advantages_only(device: torch.device) -> None:
    logits, batch = Case(17, "random", 1.0, 0.0).build(device)
    signed = lg.TokenBatch(batch.actions, torch.tensor([1.0, -1, 1, -1, 0], device=device), old_logits=logits)
    plain = lg.objective("lco-mse").gradient(logits, signed)
    scaled = lg.objective("lco-mse", negative_beta_scale=100.0).gradient(logits, signed)
    torch.testing.assert_close(scaled[[0, 2, 4]], plain[[0, 2, 4]])
    torch.testing.assert_close(scaled[[1, 3]] * 100, plain[[1, 3]])


def test_dense_settings_of_the_authors(device: torch.device) -> None:
    """Advantages over their standard deviation, no mass elsewhere: t lives on the top-k (systems.md, 1.2)."""
    logits, sparse = Case(17, "random", 1.0, 0.0).build(device)
    ids = logits.topk(5, dim=1).indices
    raw = torch.randn(ids.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
    batch = lg.TokenBatch(sparse.actions, raw, old_logits=sparse.old_logits, advantage_ids=ids)
    gradient = lg.objective("lco-kld", standardise=True, outside="drop").gradient(logits, batch)
    within = sparse.old_logits.gather(1, ids) + raw / raw.std(dim=1, keepdim=True) / 2.0
    target = torch.zeros_like(logits).scatter(1, ids, torch.softmax(within, 1))
    torch.testing.assert_close(gradient, torch.softmax(logits, 1) - target)


CASE = Case(17, "random", 1.0, 0.1)


def test_masked_tokens_count_for_nothing(device: torch.device) -> None:
    for name in lg.objective_names():
        for mask in ([True, False, True, False, True], [False] * 5):
            logits, full = CASE.dense(device) if name == "adpa" else CASE.build(device)
            keep = torch.tensor(mask, device=device)
            batch = replace(full, mask=keep)
            objective = lg.objective(name)
            H = objective.hessian(logits, batch)
            for per_token in (objective.loss(logits, batch), objective.gradient(logits, batch), H.dense()):
                assert torch.isfinite(per_token).all()
                assert (per_token[~keep] == 0).all()
            if any(mask):  # the same as if they had not been there
                alone = objective.gradient(logits[keep], full[keep])
                torch.testing.assert_close(objective.gradient(logits, batch)[keep], alone)
            assert H.is_convex()[~keep].all()
