"""Losses written a second time, naively, straight from their definitions: the oracle that float64 double backward
differentiates. Nothing here calls the package's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import lcogeom as lg
from tests.cases import Case

Loss = Callable[[Tensor, lg.TokenBatch, int], Tensor]
"""(logits of token n, batch, n) -> its loss."""


@dataclass(frozen=True)
class Together:
    """A loss that needs the logits of all tokens."""

    per_token: Callable[[Tensor, lg.TokenBatch], Tensor]
    """(logits (N, V), batch) -> (N,)."""


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


def _distribution(logits: Tensor) -> Tensor:
    return torch.softmax(logits.double(), 0)


def entropy(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    p = torch.softmax(z, 0)
    return -(p * torch.log_softmax(z, 0)).sum()


def reverse_kl(z: Tensor, b: lg.TokenBatch, n: int, to: str = "ref_logits") -> Tensor:
    return -entropy(z, b, n) - (torch.softmax(z, 0) * torch.log_softmax(getattr(b, to)[n], 0)).sum()


def forward_kl(z: Tensor, b: lg.TokenBatch, n: int, to: str = "ref_logits") -> Tensor:
    q = _distribution(getattr(b, to)[n])
    return (torch.special.xlogy(q, q) - q * torch.log_softmax(z, 0)).sum()


def expected_advantage(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    advantage, _ = _full_advantage(b, n, len(z), 1.0)
    return -(torch.softmax(z, 0) * advantage).sum()


def reppo(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    kl = forward_kl(z, b, n, "old_logits")
    return expected_advantage(z, b, n) - 0.01 * entropy(z, b, n) if kl < 0.1 else 0.01 * kl


def dckd(z: Tensor, b: lg.TokenBatch, n: int, weight: float = 0.1, top_k: int = 3) -> Tensor:
    best = b.ref_logits[n].argsort(descending=True)[:top_k]
    teacher = _distribution(b.ref_logits[n][best])
    kl = (teacher * (torch.log(teacher) - torch.log_softmax(z, 0)[best])).sum()
    return (sft(z, b, n) if b.chosen[n] else 0) + weight * kl


def adpa(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    if b.chosen[n]:
        return sft(z, b, n)
    advantage, known = _full_advantage(b, n, len(z), 1.0)
    advantage[~known] = advantage[known].min()
    return -1.6 * (torch.softmax(z, 0) * advantage).sum()


def lco_v0(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    a, now = b.actions[n], _distribution(z.detach())
    wanted = now[a]
    if b.advantages[n] > 0:
        wanted = torch.clamp(1.2 * now[a], max=0.99)
    elif 0.8 * now[a] >= 0.8:
        wanted = 0.8 * now[a]
    others = now.clone()
    others[a] = 0
    target = others / others.sum() * (1 - wanted)
    target[a] = wanted
    if wanted == now[a]:
        target = now
    return b.advantages[n].abs() * (torch.special.xlogy(target, target) - target * torch.log_softmax(z, 0)).sum()


def ppo_cvx(z: Tensor, b: lg.TokenBatch, n: int) -> Tensor:
    """k* by cases: A > 0 lacks A r ((1 - pi) / pi - 1) below pi = 1/2; A < 0 lacks |A| r."""
    logp = _logp(z.detach(), b, n)
    size = b.advantages[n].abs() * torch.exp(logp - b.old_logprobs[n])
    k = size * max(torch.expm1(-logp) - 1, 0) if b.advantages[n] > 0 else size
    return (ppo_unclipped(z, b, n) + k * forward_kl(z, b, n, "old_logits")) / (1 + k)


def dppo(z: Tensor, b: lg.TokenBatch, n: int, kind: str = "binary_tv", detached: bool = True) -> Tensor:
    p, q = _distribution(z.detach()), _distribution(b.old_logits[n])
    a, mu = b.actions[n], torch.exp(b.old_logprobs[n])
    if kind.startswith("binary"):
        p, q = torch.stack([p[a], 1 - p[a]]), torch.stack([mu, 1 - mu])
    elif kind.startswith("topk"):
        kept = sorted({int(a), *q.argsort(descending=True)[:2].tolist()})
        p, q = (torch.cat([x[kept], (x.sum() - x[kept].sum())[None]]) for x in (p, q))
    distance = 0.5 * (p - q).abs().sum()
    if kind.endswith("kl"):
        distance = (q * torch.log((q + 1e-8 * (q == q[-1])) / (p + 1e-8 * (q == q[-1])))).sum()
    delta = 0.15 if kind.endswith("tv") else 0.05
    ratio = torch.exp(_logp(z, b, n) - b.old_logprobs[n])
    advantage = b.advantages[n]
    if (advantage > 0 and ratio > 1 and distance > delta) or (advantage <= 0 and ratio < 1 and distance > delta):
        return 0 * ratio
    if not detached:
        return -advantage * ratio
    return -advantage * min(ratio.item(), 10.0) * _logp(z, b, n)


def _logps(z: Tensor, b: lg.TokenBatch) -> Tensor:
    return torch.stack([_logp(z[n], b, n) for n in range(len(b))])


def _spread(values: dict[int, Tensor], groups: Tensor) -> Tensor:
    """Each group's loss over its number of tokens."""
    return torch.stack([values[int(g)] / (groups == g).sum() for g in groups])


def minpro(z: Tensor, b: lg.TokenBatch) -> Tensor:
    logps = _logps(z, b)
    ratios = torch.exp(logps - b.old_logprobs).tolist()
    losses = []
    for n in range(len(b)):
        before = [ratios[m] for m in range(n) if b.sequences[m] == b.sequences[n]]
        weight = min(max(min(before, default=1.0) * ratios[n], 0.8), 1.28)
        losses.append(-weight * b.advantages[n] * logps[n])
    return torch.stack(losses)


def gspo(z: Tensor, b: lg.TokenBatch, low: float = 3e-4, high: float = 4e-4) -> Tensor:
    logps, values = _logps(z, b), {}
    for g in b.sequences.unique().tolist():
        rows = b.sequences == g
        s = torch.exp((logps - b.old_logprobs)[rows].mean())
        advantage = b.advantages[rows].mean()
        values[g] = -torch.minimum(s * advantage, s.clamp(1 - low, 1 + high) * advantage)
    return _spread(values, b.sequences)


def preference(z: Tensor, b: lg.TokenBatch, kind: str) -> Tensor:
    raw = torch.stack([z[n, b.actions[n]] for n in range(len(b))])
    logps, values = _logps(z, b), {}
    for g in b.pairs.unique().tolist():
        won, lost = (b.pairs == g) & b.chosen, (b.pairs == g) & ~b.chosen
        shift = logps - b.ref_logprobs
        if kind == "dpo":
            values[g] = -torch.log(torch.sigmoid(0.1 * (shift[won].sum() - shift[lost].sum())))
        elif kind == "simpo":
            values[g] = -torch.log(torch.sigmoid(2.0 * (logps[won].mean() - logps[lost].mean()) - 1.0))
        elif kind == "qrm":
            values[g] = -torch.log(torch.sigmoid(0.2 * (raw[won].mean() - raw[lost].mean()) - 2.0))
        else:
            c = torch.sigmoid(b.advantages[won].mean() - b.advantages[lost].mean())
            m = 0.1 * (shift[won].sum() - shift[lost].sum())
            values[g] = -c * torch.log(torch.sigmoid(m)) - (1 - c) * torch.log(torch.sigmoid(-m))
    return _spread(values, b.pairs)


def derivatives(loss: Loss | Together, logits: Tensor, batch: lg.TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (N,), gradient (N, V), each token's Hessian (N, V, V)) by float64 double backward."""
    if isinstance(loss, Together):
        return _derivatives_together(loss, logits, batch)
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


def _derivatives_together(loss: Together, logits: Tensor, batch: lg.TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocab = logits.shape
    joint = joint_derivatives(loss, logits, batch)
    blocks = joint[2].reshape(tokens, vocab, tokens, vocab)
    return joint[0], joint[1], torch.stack([blocks[n, :, n] for n in range(tokens)])


def joint_derivatives(loss: Together, logits: Tensor, batch: lg.TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (N,), gradient (N, V) of the sum, its Hessian (NV, NV))."""
    z = logits.detach().double().requires_grad_()
    value = loss.per_token(z, batch)
    (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    rows = torch.eye(z.numel(), dtype=torch.float64, device=z.device)
    if not gradient.requires_grad:
        return value.detach(), gradient, torch.zeros_like(rows)
    columns = [
        torch.autograd.grad(gradient.flatten(), z, row, retain_graph=True, materialize_grads=True, allow_unused=True)[0]
        for row in rows
    ]
    return value.detach(), gradient.detach(), torch.stack([column.flatten() for column in columns])


# name -> (the package's objective, the oracle). The user's own objective stands for every one-line definition.
PAIRS: dict[str, tuple[lg.Objective, Loss | Together]] = {
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
    "minpro": (lg.objective("minpro"), Together(minpro)),
    "gspo": (lg.objective("gspo"), Together(gspo)),
    "gspo-unclipped": (
        lg.objective("gspo", clip_low=None, clip_high=None),
        Together(lambda z, b: gspo(z, b, 1, math.inf)),
    ),
    "dpo": (lg.objective("dpo"), Together(lambda z, b: preference(z, b, "dpo"))),
    "simpo": (lg.objective("simpo"), Together(lambda z, b: preference(z, b, "simpo"))),
    "qrm": (lg.objective("qrm"), Together(lambda z, b: preference(z, b, "qrm"))),
    "confidence-dpo": (lg.objective("confidence-dpo"), Together(lambda z, b: preference(z, b, "confidence"))),
    "dppo": (lg.objective("dppo"), dppo),
    "dppo-paper": (lg.objective("dppo", detached=False), lambda z, b, n: dppo(z, b, n, detached=False)),
    "dppo-binary-kl": (lg.objective("dppo", divergence="binary_kl"), lambda z, b, n: dppo(z, b, n, "binary_kl")),
    "dppo-topk-tv": (lg.objective("dppo", divergence="topk_tv", top_k=2), lambda z, b, n: dppo(z, b, n, "topk_tv")),
    "dppo-full-kl": (lg.objective("dppo", divergence="full_kl"), lambda z, b, n: dppo(z, b, n, "full_kl")),
    "entropy": (lg.objective("entropy"), entropy),
    "reverse-kl": (lg.objective("reverse-kl"), reverse_kl),
    "reverse-kl-rollout": (
        lg.objective("reverse-kl", to="rollout"),
        lambda z, b, n: reverse_kl(z, b, n, "old_logits"),
    ),
    "forward-kl": (lg.objective("forward-kl"), forward_kl),
    "forward-kl-rollout": (
        lg.objective("forward-kl", to="rollout"),
        lambda z, b, n: forward_kl(z, b, n, "old_logits"),
    ),
    "expected-advantage": (lg.objective("expected-advantage"), expected_advantage),
    "reppo": (lg.objective("reppo"), reppo),
    "dckd": (lg.objective("dckd", top_k=3), dckd),
    "lco-v0": (lg.objective("lco-v0"), lco_v0),
    "ppo-cvx": (lg.objective("ppo-cvx"), ppo_cvx),
    "sum-of-actions": (
        lg.objective("ppo") + 0.3 * lg.objective("k3") - 2 * lg.objective("sft"),
        lambda z, b, n: ppo(z, b, n) + 0.3 * k3(z, b, n) - 2 * sft(z, b, n),
    ),
    "sum-with-kl": (
        lg.objective("ppo", clip_low=None, clip_high=None) + 0.3 * lg.objective("forward-kl"),
        lambda z, b, n: ppo_unclipped(z, b, n) + 0.3 * forward_kl(z, b, n),
    ),
    "sum-of-everything": (
        lg.objective("ppo", clip_low=None, clip_high=None)
        - 0.5 * (lg.objective("entropy") + 0.7 * lg.objective("reverse-kl"))
        + 0.2 * lg.objective("lco-mse"),
        lambda z, b, n: (
            ppo_unclipped(z, b, n) - 0.5 * (entropy(z, b, n) + 0.7 * reverse_kl(z, b, n)) + 0.2 * lco_mse(z, b, n)
        ),
    ),
    # with advantages on several ids (Case.dense)
    "dense-lco-kld": (lg.objective("lco-kld"), lco_kld),
    "dense-lco-mse": (lg.objective("lco-mse"), lco_mse),
    "dense-lco-lch": (lg.objective("lco-lch"), lco_lch),
    "dense-expected-advantage": (lg.objective("expected-advantage"), expected_advantage),
    "dense-reppo": (lg.objective("reppo"), reppo),
    "dense-adpa": (lg.objective("adpa"), adpa),
}


def built(name: str, case: Case, device: torch.device) -> tuple[Tensor, lg.TokenBatch]:
    """The case's logits and batch as the pair `name` needs them."""
    return case.dense(device) if name.startswith("dense-") else case.build(device)


def usable(name: str, case: Case) -> bool:
    """Whether the loss has the derivatives asked for at this case."""
    # sqrt(-l) of the user's own objective has no derivative at l = 0, which is where saturated tokens round to.
    if name == "own-hinge" and case.logits == "saturated":
        return False
    # DPPO's mask jumps where r = 1: rounding decides there, and decides differently in two formulas.
    return not (name.startswith("dppo") and (case.log_ratio == 0 or case.logits == "saturated"))


CORE = ("sft", "reinforce", "ppo", "ppo-unclipped", "lco-kld", "lco-mse", "lco-lch", "own-hinge")


def pairs_and_cases(cases: list[Case]) -> list[tuple[str, Case]]:
    """(name, case): every case for the core objectives; for the others all logits at two advantages and ratios,
    with V = 400 at one of them."""
    some = ((2.0, 0.1), (-2.0, -0.5))
    chosen = [case for case in cases if (case.advantage, case.log_ratio) in some[: 1 if case.vocab == 400 else 2]]
    narrow = [case for case in cases if case.dtype != torch.float64]
    return [
        (name, case) for name in PAIRS for case in (cases if name in CORE else chosen + narrow) if usable(name, case)
    ]
