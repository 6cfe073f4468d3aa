"""verl's policy loss from log-probabilities, against LCO-KLD on logits in float64."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import lcogeom as lg
from lcogeom.integrations.verl import lco_kld_loss, policy_loss, register

VOCABULARY, TOKENS = 23, 60


def old_policy(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, from flat to nearly saturated, actions likely and not, advantages of either sign and 0."""
    rng = torch.Generator().manual_seed(seed)
    sharpness = torch.logspace(-2, 1, TOKENS, dtype=torch.float64)[:, None]
    logits = torch.randn(TOKENS, VOCABULARY, generator=rng, dtype=torch.float64) * sharpness
    actions = torch.randint(VOCABULARY, (TOKENS,), generator=rng)
    actions[::3] = logits.argmax(1)[::3]
    advantages = torch.randn(TOKENS, generator=rng, dtype=torch.float64) * 3
    advantages[:4] = 0.0
    return logits, actions, advantages


def log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(1, actions[:, None]).squeeze(1)


def logit_gradient(logits: Tensor, old: Tensor, actions: Tensor, advantages: Tensor, **options: float) -> Tensor:
    leaf = logits.clone().requires_grad_()
    loss, _ = lco_kld_loss(log_prob(old, actions), log_prob(leaf, actions), advantages, **options)
    (found,) = torch.autograd.grad(loss.sum(), leaf)
    return found


OPTIONS = [{"beta": 2.0}, {"beta": 0.1}, {"beta": 1.0, "negative_beta_scale": 100.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exact_on_the_first_update(options: dict[str, float]) -> None:
    old, actions, advantages = old_policy()
    found = logit_gradient(old, old, actions, advantages, **options)
    batch = lg.TokenBatch(actions, advantages, old_logits=old)
    wanted = lg.objective("lco-kld", **options).gradient(old, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert wanted.norm(dim=1).max() > 0.1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exact_while_the_others_keep_their_proportions(options: dict[str, float]) -> None:
    """Only the actions' logits have moved: the loss and the gradient of LCO-KLD, not of an approximation."""
    old, actions, advantages = old_policy(1)
    steps = torch.linspace(-3, 3, TOKENS, dtype=torch.float64)[:, None]
    moved = old.scatter_add(1, actions[:, None], steps)
    batch = lg.TokenBatch(actions, advantages, old_logits=old)
    exact = lg.objective("lco-kld", **options)
    found = logit_gradient(moved, old, actions, advantages, **options)
    torch.testing.assert_close(found, exact.gradient(moved, batch), rtol=1e-8, atol=1e-11)
    value, _ = lco_kld_loss(log_prob(old, actions), log_prob(moved, actions), advantages, **options)
    torch.testing.assert_close(value, exact.loss(moved, batch), rtol=1e-8, atol=1e-11)


def test_a_lower_bound_whatever_moves() -> None:
    """It loses what the others' proportions cost, and differs from LCO-KLD there: the approximation is one."""
    old, actions, advantages = old_policy(2)
    moved = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = lg.objective("lco-kld", beta=1.0).loss(moved, lg.TokenBatch(actions, advantages, old_logits=old))
    value, _ = lco_kld_loss(log_prob(old, actions), log_prob(moved, actions), advantages, beta=1.0)
    assert (value >= -1e-12).all()
    assert (value <= exact + 1e-12).all()
    assert (exact - value).max() > 0.1


def test_its_target_is_that_of_lco() -> None:
    """Where p = y_a the gradient is 0; y_a is what LCO's target gives the action."""
    old, actions, advantages = old_policy(4)
    shifted = old.scatter_add(1, actions[:, None], advantages[:, None] / 0.5)
    wanted = log_prob(shifted, actions)
    leaf = wanted.clone().requires_grad_()
    loss, target = lco_kld_loss(log_prob(old, actions), leaf, advantages, beta=0.5)
    torch.testing.assert_close(target, wanted.exp(), rtol=1e-10, atol=1e-14)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    assert (slope * -torch.expm1(wanted)).abs().max() < 1e-9
    assert loss.detach().abs().max() < 1e-9


def test_convex_where_it_says() -> None:
    """In the logits, where p <= y_a and nowhere else."""
    old, actions, advantages = old_policy(5)
    moved = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    logp_old = log_prob(old, actions)
    _, target = lco_kld_loss(logp_old, log_prob(moved, actions), advantages)

    def two_outcomes(logp: Tensor, batch: lg.TokenBatch) -> Tensor:
        _, y = lco_kld_loss(batch.old_logprobs, logp, batch.advantages)
        return y * (y.log() - logp) + (1 - y) * ((1 - y).log() - torch.log1p(-logp.exp()))

    hessian = lg.action_objective(two_outcomes).hessian(moved, lg.TokenBatch(actions, advantages, logp_old))
    below = log_prob(moved, actions).exp() <= target
    assert torch.equal(hessian.is_convex(), below)
    assert 0 < below.sum() < TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_tokens_and_wide_advantages_stay_finite(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -1e-9, -1e-4, -0.5, -30.0, -200.0])
    old, now, advantages = (
        each.flatten()
        for each in torch.meshgrid(values, values, torch.tensor([-1e3, -1.0, 0.0, 1.0, 1e3]), indexing="ij")
    )
    leaf = now.to(dtype).requires_grad_()
    loss, target = lco_kld_loss(old.to(dtype), leaf, advantages, beta=0.5)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    for each in (loss, target, slope):
        assert torch.isfinite(each).all()
    assert (slope * -torch.expm1(now.to(dtype).float())).abs().max() < 1.01  # |p - y_a|, as LCO's gradient is bounded
    assert ((target >= 0) & (target <= 1 + 1e-6)).all()


def masked_mean(*, loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, **whole: Any) -> Tensor:
    assert loss_agg_mode == "token-mean"
    return (loss_mat * loss_mask).sum() / whole.get("batch_num_tokens", loss_mask.sum())


def batch_of_verl() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    old, actions, advantages = old_policy(7)
    shape = (6, 10)
    mask = torch.arange(10) < torch.tensor([10, 3, 7, 1, 10, 5])[:, None]
    logp = log_prob(old, actions).view(shape).masked_fill(~mask, math.nan)
    return old, actions, advantages.view(shape), mask.long(), logp


def test_with_the_arguments_of_verl() -> None:
    old, actions, advantages, mask, logp = batch_of_verl()
    leaf = old.clone().requires_grad_()
    current = log_prob(leaf, actions).view(6, 10)
    loss, metrics = policy_loss(masked_mean, beta=1.0)(logp, current, advantages, mask, "token-mean", None)
    (found,) = torch.autograd.grad(loss, leaf)
    kept = mask.bool().flatten()
    batch = lg.TokenBatch(actions, advantages.flatten(), old_logits=old, mask=kept)
    wanted = lg.objective("lco-kld", beta=1.0)
    torch.testing.assert_close(found, wanted.gradient(old, batch) / kept.sum(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.detach(), wanted.loss(old, batch).sum() / kept.sum())
    assert metrics["actor/ppo_kl"] == 0.0
    assert 0 < metrics["actor/lco_target_gap"] < 1


def test_importance_weights_and_the_whole_batch() -> None:
    _, _, advantages, mask, logp = batch_of_verl()
    weights = torch.rand(6, 10, dtype=torch.float64)
    made, config = policy_loss(masked_mean), types.SimpleNamespace(global_batch_info={"batch_num_tokens": 1000})
    old, now = logp.nan_to_num(-1.0), logp.nan_to_num(-1.0) - 0.1
    loss, _ = made(old, now, advantages, mask, "token-mean", config, weights)
    per_token, _ = lco_kld_loss(old, now, advantages)
    torch.testing.assert_close(loss, (per_token * weights)[mask.bool()].sum() / 1000)


def verl(returns: Any) -> types.ModuleType:
    """A stand-in with the few lines of verl's public source that register() meets; verl cannot be installed here."""
    module = types.ModuleType("verl.trainer.ppo.core_algos")
    registry: dict[str, Any] = {}

    def vanilla(old_log_prob: Any, log_prob: Any) -> Any: ...

    vanilla.__annotations__["return"] = returns
    module.__dict__.update(
        registry=registry,
        agg_loss=masked_mean,
        compute_policy_loss_vanilla=vanilla,
        register_policy_loss=lambda name: lambda function: registry.setdefault(name, function),
    )
    return module


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verl(tuple[Tensor, dict[str, Any]])
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, found.__name__, found)
    made = register(beta=1.0)
    assert found.registry == {"lco-kld": made}
    _, _, advantages, mask, logp = batch_of_verl()
    loss, _ = made(
        old_log_prob=logp, log_prob=logp, advantages=advantages, response_mask=mask, loss_agg_mode="token-mean",
        config=None, rollout_is_weights=None,
    )  # fmt: skip
    assert torch.isfinite(loss)
    monkeypatch.setitem(sys.modules, found.__name__, verl(tuple[Tensor, Tensor, Tensor, Tensor]))
    with pytest.raises(RuntimeError, match="do not return"):
        register()


@pytest.mark.skipif(importlib.util.find_spec("verl") is not None, reason="verl is there")
def test_without_verl() -> None:
    with pytest.raises(ImportError, match="verl could not be imported"):
        register()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "lco-mse"}, "pulls raw logits"),
        ({"objective": "lco-lch"}, "pulls raw logits"),
        ({"objective": "ppo"}, "must be 'lco-kld'"),
        ({"beta": 0.0}, "beta"),
        ({"negative_beta_scale": math.inf}, "negative_beta_scale"),
    ],
)
def test_what_cannot_be_had(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        policy_loss(masked_mean, **options)
