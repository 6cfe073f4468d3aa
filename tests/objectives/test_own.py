"""`lg.action_objective`: ten functions, their f' and f'' by hand (method.md, 2.1), and the built-in ones they equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lcogeom as lg
from lcogeom.geometry.hessian import action_hessian
from tests.cases import Case

Function = Callable[[Tensor, lg.TokenBatch], Tensor]


def ratio(logp: Tensor, b: lg.TokenBatch) -> Tensor:
    return torch.exp(logp - b.old_logprobs)


def k3(logp: Tensor, b: lg.TokenBatch) -> Tensor:
    return torch.exp(b.ref_logprobs - logp) - (b.ref_logprobs - logp) - 1


# name -> (f, f', f'', the built-in objective or None)
TEN: dict[str, tuple[Function, Function, Function, lg.Objective | None]] = {
    "sft": (lambda x, b: -x, lambda x, b: -torch.ones_like(x), lambda x, b: 0 * x, lg.objective("sft")),
    "reinforce": (
        lambda x, b: -b.advantages * x,
        lambda x, b: -b.advantages,
        lambda x, b: 0 * x,
        lg.objective("reinforce"),
    ),
    "ppo": (
        lambda x, b: -b.advantages * ratio(x, b),
        lambda x, b: -b.advantages * ratio(x, b),
        lambda x, b: -b.advantages * ratio(x, b),
        lg.objective("ppo", clip_low=None, clip_high=None),
    ),
    "ppo clipped": (
        lambda x, b: -torch.minimum(ratio(x, b) * b.advantages, ratio(x, b).clamp(0.8, 1.2) * b.advantages),
        lambda x, b: -b.advantages * ratio(x, b) * live(x, b),
        lambda x, b: -b.advantages * ratio(x, b) * live(x, b),
        lg.objective("ppo"),
    ),
    "cispo": (
        lambda x, b: -ratio(x, b).detach().clamp(max=1.28) * b.advantages * x,
        lambda x, b: -ratio(x, b).clamp(max=1.28) * b.advantages,
        lambda x, b: 0 * x,
        lg.objective("cispo"),
    ),
    "k3": (
        k3,
        lambda x, b: 1 - torch.exp(b.ref_logprobs - x),
        lambda x, b: torch.exp(b.ref_logprobs - x),
        lg.objective("k3"),
    ),
    "grpo": (
        lambda x, b: -b.advantages * ratio(x, b) + 0.04 * k3(x, b),
        lambda x, b: -b.advantages * ratio(x, b) + 0.04 * (1 - torch.exp(b.ref_logprobs - x)),
        lambda x, b: -b.advantages * ratio(x, b) + 0.04 * torch.exp(b.ref_logprobs - x),
        lg.objective("grpo", clip_low=None, clip_high=None),
    ),
    "k2": (
        lambda x, b: 0.5 * (x - b.ref_logprobs).square(),
        lambda x, b: x - b.ref_logprobs,
        lambda x, b: torch.ones_like(x),
        None,
    ),
    "focal": (
        lambda x, b: -torch.expm1(x).square() * x,
        lambda x, b: -torch.expm1(x).square() - 2 * x * torch.expm1(x) * torch.exp(x),
        lambda x, b: -4 * torch.expm1(x) * torch.exp(x) - 2 * x * torch.exp(x) * (2 * torch.exp(x) - 1),
        None,
    ),
    "log cosh": (
        lambda x, b: torch.log(torch.cosh(x + 2)),
        lambda x, b: torch.tanh(x + 2),
        lambda x, b: 1 - torch.tanh(x + 2).square(),
        None,
    ),
}


def live(logp: Tensor, b: lg.TokenBatch) -> Tensor:
    """1 where PPO's clip does not act."""
    r = ratio(logp, b)
    clipped = ((b.advantages > 0) & (r > 1.2)) | ((b.advantages < 0) & (r < 0.8))
    return (~clipped).to(logp)


@pytest.mark.parametrize("advantage", [1.0, -2.0])
@pytest.mark.parametrize("log_ratio", [0.1, 0.5, -0.4])
@pytest.mark.parametrize("name", TEN)
def test_one_function_gives_everything(name: str, log_ratio: float, advantage: float, device: torch.device) -> None:
    function, slope, bend, builtin = TEN[name]
    mine = lg.action_objective(function)
    for kind in ("random", "peaked", "tied"):
        z, batch = Case(17, kind, advantage, log_ratio).build(device)
        logp = torch.log_softmax(z, 1).gather(1, batch.actions[:, None]).squeeze(1)
        d1, d2 = slope(logp, batch), bend(logp, batch)
        u = torch.nn.functional.one_hot(batch.actions, 17) - torch.softmax(z, 1)
        torch.testing.assert_close(mine.gradient(z, batch), d1[:, None] * u)
        H, by_hand = mine.hessian(z, batch), action_hessian(z, batch.actions, d1, d2)
        torch.testing.assert_close(H.dense(), by_hand.dense())
        if builtin is not None:
            torch.testing.assert_close(mine.loss(z, batch), builtin.loss(z, batch))
            torch.testing.assert_close(mine.gradient(z, batch), builtin.gradient(z, batch))
            other = builtin.hessian(z, batch)
            torch.testing.assert_close(H.dense(), other.dense())
            assert torch.equal(H.negative_count(), other.negative_count())
            for one, two in zip(H.eigenvalue_range(), other.eigenvalue_range(), strict=True):
                torch.testing.assert_close(one, two)
