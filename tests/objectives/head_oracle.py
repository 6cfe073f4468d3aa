"""CAPO's numbers without any of the package's formulas: the oracle of test_capo.py.

It forms the head's step D naively, token by token, from autograd gradients of losses written a second time
(tests/oracles.py) and torch's own optimisers, then differentiates -L(W + t D) and KL(pi_W || pi_{W + t D}) twice in t.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import lcogeom as lg
from tests.oracles import PAIRS, Loss, ppo_unclipped

N, V, D_MODEL = 7, 9, 4
SEQUENCES = torch.tensor([3, 0, 3, 3, 0, 5, 5])  # neither sorted nor contiguous
MASKS = {"all": None, "some": torch.tensor([1, 1, 0, 1, 1, 0, 0])}  # the last completion is masked out whole


@dataclass
class Head:
    """A last layer with a batch that it produced."""

    weight: Tensor
    hidden: Tensor
    batch: lg.TokenBatch

    @property
    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T


def make_head(mask: str = "all", vocab: int = V, scale: float = 1.0) -> Head:
    rng = torch.Generator().manual_seed(vocab)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    weight, hidden = scale * draw(vocab, D_MODEL), draw(N, D_MODEL)
    logits = hidden @ weight.T
    actions = torch.randint(vocab, (N,), generator=rng)
    logprobs = torch.log_softmax(logits, 1).gather(1, actions[:, None]).squeeze(1)
    batch = lg.TokenBatch(
        actions,
        draw(N),
        old_logprobs=(logprobs - 0.1 * draw(N)).clamp(max=-1e-3),
        ref_logprobs=(logprobs + 0.2 * draw(N)).clamp(max=-1e-3),
        mask=MASKS[mask],
        old_logits=logits + 0.3 * draw(N, vocab),
        sequences=SEQUENCES,
    )
    return Head(weight, hidden, batch)


def oracle_of(name: str, head: Head) -> tuple[lg.Objective | None, Loss, lg.TokenBatch]:
    """(what the rule is given, the loss written a second time, the batch that this loss reads)."""
    if name == "paper":  # -A r with the policy itself as the old one: r = 1
        logp = torch.log_softmax(head.logits, 1).gather(1, head.batch.actions[:, None]).squeeze(1)
        return None, ppo_unclipped, replace(head.batch, old_logprobs=logp)
    return *PAIRS[name], head.batch


def warm_adam(head: Head, rate: float) -> torch.optim.Adam:
    weight = head.weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=rate)
    for step in range(3):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.step()
    return optimizer


def real_step(head: Head, gradient: Tensor, rate: float, adam: torch.optim.Adam | None) -> Tensor:
    """What one step of torch's optimiser adds to W, from the optimiser's present state, which is left as it is."""
    weight = head.weight.clone().requires_grad_()
    optimizer: torch.optim.Optimizer = torch.optim.SGD([weight], lr=rate)
    if adam is not None:
        optimizer = torch.optim.Adam([weight], lr=rate)
        optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
    weight.grad = gradient.clone()
    optimizer.step()
    return weight.detach() - head.weight


def visible(head: Head, n: int, top_k: int | None) -> Tensor:
    """The ids that token n's policy is renormalised on, in any order."""
    order = head.logits[n].argsort(descending=True).tolist()
    kept = order if top_k is None else order[:top_k]
    action = int(head.batch.actions[n])
    return torch.tensor(kept if action in kept else [*kept[:-1], action])


def local(head: Head, batch: lg.TokenBatch, n: int, ids: Tensor) -> lg.TokenBatch:
    """Token n's own batch on some ids."""
    batch = batch[slice(n, n + 1)]
    column = (ids == batch.actions).nonzero()[0]
    return replace(batch, actions=column, old_logits=batch.old_logits[:, ids])


def naive(
    head: Head,
    loss: Loss,
    batch: lg.TokenBatch,
    *,
    level: str,
    rate: float,
    adam: torch.optim.Adam | None,
    top_k: int | None = None,
) -> dict[str, Tensor]:
    """m_H and both m_F, (N,) each, one group after another."""
    live = torch.ones(N) if batch.mask is None else batch.mask.double()
    names = {"token": range(N), "sentence": SEQUENCES.tolist(), "global": [0] * N}[level]
    found = {key: torch.zeros(N, dtype=torch.float64) for key in ("m_H", "m_F_empirical", "m_F_exact")}
    seen = [visible(head, n, top_k) for n in range(N)]
    for name in set(names):
        group = [n for n in range(N) if names[n] == name and live[n]]
        if not group:
            continue
        total, count = torch.zeros_like(head.weight), torch.zeros(len(head.weight), 1, dtype=torch.float64)
        for n in group:
            weight = head.weight.clone().requires_grad_()
            value = loss((weight @ head.hidden[n])[seen[n]], local(head, batch, n, seen[n]), 0)
            total += torch.autograd.grad(value, weight)[0]
            count[seen[n]] += 1
        step = real_step(head, total / count.clamp(min=1), rate, adam)
        terms = torch.stack(
            [expansions(head, loss, local(head, batch, n, seen[n]), n, step=step, ids=seen[n]) for n in group]
        ).mean(0)
        for n in range(N):
            if names[n] == name and (level != "token" or live[n]):
                for key, term in zip(found, terms, strict=True):
                    found[key][n] = term
    return found


def expansions(head: Head, loss: Loss, own: lg.TokenBatch, n: int, *, step: Tensor, ids: Tensor) -> Tensor:
    """(rise of -L to second order, 1/2 (d log p_a)^2, KL to second order) of token n along the head's step."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    z = ((head.weight + t * step) @ head.hidden[n])[ids]
    logp = torch.log_softmax(z, 0)

    def slopes(value: Tensor) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad(value, t, create_graph=True)
        (second,) = torch.autograd.grad(first, t, retain_graph=True)
        return first.detach(), second.detach()

    first, second = slopes(-loss(z, own, 0))
    (along_action, _) = slopes(logp[own.actions[0]])
    kl = (logp.exp().detach() * (logp.detach() - logp)).sum()
    return torch.stack([first + second / 2, along_action.square() / 2, slopes(kl)[1] / 2])


def layer_of(head: Head, rate: float, adam: torch.optim.Adam | None) -> lg.LastLayer:
    state = None if adam is None else lg.AdamState(**adam.state[adam.param_groups[0]["params"][0]])
    return lg.LastLayer(head.hidden, rate, state)
