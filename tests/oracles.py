"""Losses written a second time, naively, straight from their definitions: the oracle that float64 double backward
differentiates. Nothing here calls the package's formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import lcogeom as lg

Loss = Callable[[Tensor, lg.TokenBatch, int], Tensor]


def _logp(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    return z[b.actions[n]] - torch.logsumexp(z, 0)


def sft(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    return -_logp(z, b, n)


def reinforce(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    return -b.advantages[n] * _logp(z, b, n)


def ppo(z: Tensor, b: lg.TokenBatch, n: int, low: float = 0.2, high: float = 0.2) -> Tensor:
    ratio = torch.exp(_logp(z, b, n) - b.old_logprobs[n])
    return -torch.minimum(ratio * b.advantages[n], ratio.clamp(1 - low, 1 + high) * b.advantages[n])


def ppo_unclipped(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    return -b.advantages[n] * torch.exp(_logp(z, b, n) - b.old_logprobs[n])


def ppo_dual(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    plain = -ppo(z, b, n)
    return -(torch.maximum(plain, 1.5 * b.advantages[n]) if b.advantages[n] < 0 else plain)


def k3(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    u = torch.exp(b.ref_logprobs[n]) / torch.softmax(z, 0)[b.actions[n]]
    return u - torch.log(u) - 1


def cispo(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    ratio = torch.exp(_logp(z, b, n) - b.old_logprobs[n]).item()
    return -min(ratio, 1.28) * b.advantages[n] * _logp(z, b, n)


def _full_advantage(b: lg.TokenBatch, n: int, vocab: int, beta: float) -> tuple[Tensor, Tensor]:
    """(A / beta over the vocabulary, which entries are known)."""
    ids = b.actions[n : n + 1] if b.advantage_ids is None else b.advantage_ids[n]
    advantage = torch.zeros(vocab, dtype=torch.float64, device=ids.device)
    known = torch.zeros(vocab, dtype=torch.bool, device=ids.device)
    advantage[ids] = b.advantages[n].double() / beta
    known[ids] = True
    return advantage, known


def lco_kld(z: Tensor, b: lg.TokenBatch, n: int, beta: float = 2.0) -> Tensor:
    shift, _ = _full_advantage(b, n, len(z), beta)
    old = torch.softmax(b.old_logits[n].double(), 0)
    target = torch.softmax(torch.log(old) + shift, 0)
    return (torch.special.xlogy(target, target) - target * torch.log_softmax(z, 0)).sum()


def lco_mse(z: Tensor, b: lg.TokenBatch, n: int, beta: float = 2.0) -> Tensor:
    shift, known = _full_advantage(b, n, len(z), beta)
    return 0.5 * ((z - b.old_logits[n] - shift)[known] ** 2).sum()


def lco_lch(z: Tensor, b: lg.TokenBatch, n: int, beta: float = 2.0) -> Tensor:
    shift, known = _full_advantage(b, n, len(z), beta)
    gap = (z - b.old_logits[n] - shift)[known]
    return (gap.abs() + torch.log1p(torch.exp(-2 * gap.abs())) - torch.log(torch.tensor(2.0, dtype=z.dtype))).sum()


def derivatives(loss: Loss, logits: Tensor, batch: lg.TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (N,), gradient (N, V), Hessian (N, V, V)) by float64 double backward, one token at a time."""
    values, gradients, hessians = [], [], []
    for n in range(len(batch)):
        z = logits[n].detach().double().requires_grad_()
        value = loss(z, batch, n)
        (gradient,) = torch.autograd.grad(value, z, create_graph=True)
        rows = torch.eye(len(z), dtype=torch.float64, device=z.device)
        (hessian,) = (
            torch.autograd.grad(gradient, z, rows, is_grads_batched=True, materialize_grads=True, allow_unused=True)
            if gradient.requires_grad
            else (torch.zeros_like(rows),)
        )
        values.append(value.detach())
        gradients.append(gradient.detach())
        hessians.append(hessian.detach())
    return torch.stack(values), torch.stack(gradients), torch.stack(hessians)


# name -> (the package's objective, the oracle). The user's own objective stands for every one-line definition.
PAIRS: dict[str, tuple[lg.Objective, Loss]] = {
    "sft": (lg.objective("sft"), sft),
    "reinforce": (lg.objective("reinforce"), reinforce),
    "ppo": (lg.objective("ppo"), ppo),
    "ppo-unclipped": (lg.objective("ppo", clip_low=None, clip_high=None), ppo_unclipped),
    "lco-kld": (lg.objective("lco-kld"), lco_kld),
    "lco-mse": (lg.objective("lco-mse"), lco_mse),
    "lco-lch": (lg.objective("lco-lch"), lco_lch),
    "ppo-dual": (lg.objective("ppo", dual_clip=1.5), ppo_dual),
    "rloo": (lg.objective("rloo"), reinforce),
    "grpo": (lg.objective("grpo", beta=0.3), lambda z, b, n: ppo(z, b, n) + 0.3 * k3(z, b, n)),
    "dr-grpo": (lg.objective("dr-grpo"), ppo),
    "dapo": (lg.objective("dapo"), lambda z, b, n: ppo(z, b, n, 0.2, 0.28)),
    "cispo": (lg.objective("cispo"), cispo),
    "k3": (lg.objective("k3"), k3),
    "own-hinge": (
        lg.action_objective(lambda logp, b: b.advantages * (logp - b.ref_logprobs).square() + (-logp).sqrt()),
        lambda z, b, n: b.advantages[n] * (_logp(z, b, n) - b.ref_logprobs[n]) ** 2 + (-_logp(z, b, n)).sqrt(),
    ),
}
