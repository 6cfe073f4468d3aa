"""CAPO against a real last layer z = W h, its closed forms, and torch's Adam.

Everything is float64; 1e-9 of the largest term leaves room for the sums.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lcogeom as lg
from tests.objectives.head_oracle import (
    D_MODEL,
    MASKS,
    N,
    V,
    layer_of,
    make_head,
    naive,
    oracle_of,
    visible,
    warm_adam,
)

NAMES = ["paper", "ppo-unclipped", "reinforce", "sft", "lco-kld", "lco-lch", "grpo"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("level", ["token", "sentence", "global"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_second_order_of_the_real_layer(name: str, level: str, optimizer: str, mask: str) -> None:
    head = make_head(mask)
    rate = 0.3 if optimizer == "sgd" else 0.05
    adam = warm_adam(head, rate) if optimizer == "adam" else None
    objective, loss, oracle_batch = oracle_of(name, head)
    expected = naive(head, loss, oracle_batch, level=level, rate=rate, adam=adam)
    rule = lg.intervention("capo", level=level)
    found = rule(head.logits, head.batch, objective=objective, layer=layer_of(head, rate, adam)).scores
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)
    assert torch.equal(found["m_F"], found["m_F_empirical"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("level", ["token", "sentence", "global"])
@pytest.mark.parametrize("name", ["paper", "lco-kld"])
def test_top_k(name: str, level: str, optimizer: str) -> None:
    head = make_head("some")
    adam = warm_adam(head, 0.05) if optimizer == "adam" else None
    objective, loss, oracle_batch = oracle_of(name, head)
    if name == "paper":  # r = 1 under the renormalised policy
        logp = [
            torch.log_softmax(head.logits[n][ids], 0)[ids == head.batch.actions[n]]
            for n, ids in ((n, visible(head, n, 4)) for n in range(N))
        ]
        oracle_batch = replace(oracle_batch, old_logprobs=torch.cat(logp))
    assert any(int(head.batch.actions[n]) not in head.logits[n].topk(4).indices for n in range(N))
    expected = naive(head, loss, oracle_batch, level=level, rate=0.05, adam=adam, top_k=4)
    rule = lg.intervention("capo", level=level, top_k=4)
    layer = layer_of(head, 0.05, adam)
    found = rule(head.logits, head.batch, objective=objective, layer=layer).scores
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


def test_top_k_of_everything_changes_nothing() -> None:
    head = make_head()
    layer = lg.LastLayer(head.hidden, 0.1)
    for top_k in (V, 10 * V):
        cut = lg.intervention("capo", level="sentence", top_k=top_k)(head.logits, head.batch, layer=layer).scores
        whole = lg.intervention("capo", level="sentence")(head.logits, head.batch, layer=layer).scores
        for key in whole:
            assert torch.equal(cut[key], whole[key])


@pytest.mark.parametrize("name", ["ppo-unclipped", "sft", "lco-kld"])
def test_third_order_remainder(name: str) -> None:
    """-L(W + D) + L(W) - m_H falls by about 8 when the learning rate is halved: m_H is right to second order."""
    head = make_head()
    objective, loss, batch = oracle_of(name, head)
    remainders = []
    for rate in (1e-3, 5e-4):
        layer = lg.LastLayer(head.hidden, rate)
        rise = lg.intervention("capo", level="global")(head.logits, batch, objective=objective, layer=layer)
        gradient = objective.gradient(head.logits, batch).T @ head.hidden / N
        moved = head.hidden @ (head.weight - rate * gradient).T
        actual = sum(loss(head.logits[n], batch, n) - loss(moved[n], batch, n) for n in range(N)) / N
        remainders.append((actual - rise.scores["m_H"][0]).abs().item())
    assert 6 < remainders[0] / remainders[1] < 10


@pytest.mark.parametrize("scale", [1e-3, 1.0, 4.0])
def test_closed_forms_of_one_token(scale: float) -> None:
    """systems.md 2.3: SGD, and Adam's sign step from zero moments; A on both sides."""
    head = make_head(scale=scale)
    p = torch.softmax(head.logits, 1)
    unit = torch.nn.functional.one_hot(head.batch.actions, V).double()
    pi, v, advantage = (p * unit).sum(1), unit - p, head.batch.advantages
    size, rate = v.square().sum(1), 0.02
    bend = pi * (1 - pi) - 2 * pi * (pi - p.square().sum(1)) + p.pow(3).sum(1) - p.square().sum(1) ** 2  # v^T S v
    rule = lg.intervention("capo")

    two, one = head.hidden.square().sum(1), head.hidden.abs().sum(1)
    found = rule(head.logits, head.batch, layer=lg.LastLayer(head.hidden, rate)).scores
    linear = rate * advantage**2 * size * two
    torch.testing.assert_close(found["m_H"], linear + rate**2 / 2 * advantage**3 * two**2 * (size**2 - bend))
    torch.testing.assert_close(found["m_F_empirical"], rate**2 / 2 * advantage**2 * two**2 * size**2)
    torch.testing.assert_close(found["m_F_empirical"] / found["m_F_exact"], size**2 / bend)

    zero = torch.zeros(V, D_MODEL, dtype=torch.float64)
    first = lg.LastLayer(head.hidden, rate, lg.AdamState(zero, zero, 0, eps=1e-200))
    found = rule(head.logits, head.batch, layer=first).scores
    rise = 2 * rate * advantage.abs() * (1 - pi) * one
    rise = rise + 2 * rate**2 * advantage * one**2 * (1 - pi) * (1 - 2 * pi)
    torch.testing.assert_close(found["m_H"], rise)
    torch.testing.assert_close(found["m_F"], 2 * rate**2 * one**2 * (1 - pi) ** 2)


def test_bias_of_the_empirical_fisher() -> None:
    """Far above 1 on a flat distribution, far below near p_a = 1 (systems.md 2.3): its table, by one formula."""
    flat = torch.zeros(1, 1000, dtype=torch.float64)
    sure = torch.zeros(1, 3, dtype=torch.float64)
    sure[0, 0] = math.log(0.95 / 0.025)
    ratios = []
    for logits in (flat, sure):
        batch = lg.TokenBatch(torch.tensor([0]), torch.ones(1))
        scores = lg.intervention("capo")(logits, batch, layer=lg.LastLayer(torch.ones(1, 2), 1e-3)).scores
        ratios.append((scores["m_F_empirical"] / scores["m_F_exact"]).item())
    size, pi = 0.999, 1e-3
    assert ratios[0] == pytest.approx(size**2 / (pi * size), rel=1e-9)  # v^T S v = ||v||^2 / V on a flat p
    assert ratios[1] < 0.1


def test_saturated_tokens_keep_their_digits() -> None:
    """1 - p = 2e-26, far below the rounding of p: the closed form of the sign step still holds."""
    logits = torch.zeros(1, 3, dtype=torch.float64)
    logits[0, 1] = 60.0
    rest = 2 * math.exp(-60.0)
    zero = torch.zeros(3, 1, dtype=torch.float64)
    layer = lg.LastLayer(torch.ones(1, 1), 0.1, lg.AdamState(zero, zero, 0, eps=1e-200))
    batch = lg.TokenBatch(torch.tensor([1]), torch.tensor([2.0]))
    scores = lg.intervention("capo")(logits, batch, layer=layer).scores
    assert scores["m_H"].item() == pytest.approx(2 * 0.1 * 2 * rest - 2 * 0.01 * 2 * rest, rel=1e-12, abs=0)
    assert scores["m_F"].item() == pytest.approx(2 * 0.01 * rest**2, rel=1e-12, abs=0)
    assert scores["m_F_exact"].item() == pytest.approx(0.01 * 4 * rest / 2, rel=1e-12, abs=0)

    # Momentum that moves all logits together, one of them twice as far: what they share must not swallow the rest.
    moments = lg.AdamState(torch.tensor([[2.0], [1.0], [1.0]]).double(), torch.ones(3, 1).double(), 10**6, eps=1e-200)
    scores = lg.intervention("capo")(logits, batch, layer=lg.LastLayer(torch.ones(1, 1), 0.1, moments)).scores
    pace = 0.1 * 0.9 / 0.999**0.5
    assert scores["m_F"].item() == pytest.approx((pace * rest / 2) ** 2 / 2, rel=1e-9, abs=0)
    assert scores["m_F_exact"].item() == pytest.approx(pace**2 * rest / 4, rel=1e-9, abs=0)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("level", ["token", "sentence", "global"])
def test_moments_of_some_rows(level: str, top_k: int | None) -> None:
    """The published code keeps moments per token id; an id without them has zeros."""
    head = make_head()
    full = layer_of(head, 0.05, warm_adam(head, 0.05)).adam
    rows = torch.tensor([7, 0, 4])
    sparse = replace(full, exp_avg=full.exp_avg[rows], exp_avg_sq=full.exp_avg_sq[rows], rows=rows)
    known = torch.zeros(V, 1, dtype=torch.float64)
    known[rows] = 1
    padded = replace(full, exp_avg=full.exp_avg * known, exp_avg_sq=full.exp_avg_sq * known)
    rule = lg.intervention("capo", level=level, top_k=top_k)
    found, expected = (
        rule(head.logits, head.batch, layer=lg.LastLayer(head.hidden, 0.05, adam)).scores for adam in (sparse, padded)
    )
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-14, atol=0)


@pytest.mark.parametrize("level", ["token", "sentence", "global"])
def test_nothing_it_is_given_changes(level: str) -> None:
    head = make_head("some")
    adam = warm_adam(head, 0.05)
    layer = layer_of(head, 0.05, adam)
    layer = replace(layer, hidden=layer.hidden.clone().requires_grad_())
    given = [
        head.logits.requires_grad_(),
        layer.hidden,
        layer.adam.exp_avg,
        layer.adam.exp_avg_sq,
        torch.as_tensor(layer.adam.step),
    ]
    before = [tensor.clone() for tensor in given]
    mask = head.batch.mask.clone()
    choice = lg.intervention("capo", level=level)(given[0], head.batch, layer=layer)
    assert not any(score.requires_grad for score in choice.scores.values())
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
    assert torch.equal(head.batch.mask, mask)
    assert float(adam.state[adam.param_groups[0]["params"][0]]["step"]) == 3


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("blocks", [1, 7, 50])
@pytest.mark.parametrize("level", ["token", "sentence", "global"])
def test_block_size_does_not_matter(
    level: str, blocks: int, top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head("some")
    layer = layer_of(head, 0.05, warm_adam(head, 0.05))
    rule = lg.intervention("capo", level=level, top_k=top_k)
    expected = rule(head.logits, head.batch, layer=layer).scores
    monkeypatch.setattr("lcogeom.geometry.softmax.CPU_BLOCK", blocks)
    found = rule(head.logits, head.batch, layer=layer).scores
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-12, atol=1e-15)


def test_acceptance_rules() -> None:
    head = make_head()
    layer = lg.LastLayer(head.hidden, 0.3)

    def keep(**options: object) -> Tensor:
        return lg.intervention("capo", **options)(head.logits, head.batch, layer=layer).keep

    scores = lg.intervention("capo")(head.logits, head.batch, layer=layer).scores
    rise, kl, exact = scores["m_H"], scores["m_F"], scores["m_F_exact"]
    assert (rise < 0).any()
    assert (rise > 0).any()
    for bound in (*rise.abs().tolist(), *kl.tolist(), *exact.tolist(), 0.05):  # ties included
        assert torch.equal(keep(tau_h=bound, tau_f=None), rise.abs() < bound)
        assert torch.equal(keep(rule="one-sided", tau_h=bound, tau_f=0), rise >= bound)
        assert torch.equal(keep(tau_h=0, tau_f=bound), kl < bound)
        assert torch.equal(keep(tau_h=0, tau_f=bound, fisher="exact"), exact < bound)
        assert torch.equal(keep(tau_h=bound, tau_f=bound), (rise.abs() < bound) & (kl < bound))
        interval = keep(rule="one-sided", tau_h=0.0, tau_h_high=bound, tau_f=None)
        assert torch.equal(interval, (rise >= 0) & (rise < bound))
    assert keep(tau_h=0, tau_f=0).all()
    assert keep(tau_h=None, tau_f=None).all()


def test_published_thresholds() -> None:
    for name, tau_h, tau_f in (("capo", 0.01, 1e-4), ("dr-capo", 5e-4, 1e-3), ("rein-capo", 0.1, 1e-5)):
        options = lg.intervention(name).options
        assert (options["tau_h"], options["tau_f"]) == (tau_h, tau_f)
        assert (options["rule"], options["fisher"], options["level"]) == ("symmetric", "empirical", ("token",))
        assert lg.intervention(name, tau_h=3.0).options["tau_h"] == 3.0


def test_levels_one_after_another() -> None:
    head = make_head()
    layer = lg.LastLayer(head.hidden, 0.3)
    bounds = {"token": {"tau_h": 0.4, "tau_f": None}, "sentence": {"tau_h": 0.02, "tau_f": None}}
    several = {"tau_h": {"token": 0.4, "sentence": 0.02}, "tau_f": None}

    first = lg.intervention("capo", level="token", **bounds["token"])(head.logits, head.batch, layer=layer)
    at_once = lg.intervention("capo", level="sentence", **bounds["sentence"])(head.logits, head.batch, layer=layer)
    after = lg.intervention("capo", level="sentence", **bounds["sentence"])(head.logits, first.batch, layer=layer)
    assert not torch.equal(first.keep & at_once.keep, after.keep)  # or the test shows nothing

    both = lg.intervention("capo", level=["sentence", "token"], **several)(head.logits, head.batch, layer=layer)
    assert torch.equal(both.keep, first.keep & at_once.keep)
    assert torch.equal(both.scores["token.m_H"], first.scores["m_H"])
    assert torch.equal(both.scores["sentence.m_H"], at_once.scores["m_H"])
    sequential = lg.intervention("capo", level=("token", "sentence"), sequential=True, **several)
    choice = sequential(head.logits, head.batch, layer=layer)
    assert torch.equal(choice.keep, after.keep)
    assert torch.equal(choice.scores["sentence.m_H"], after.scores["m_H"])


def test_it_judges_the_objective_it_guards() -> None:
    head = make_head()
    layer = lg.LastLayer(head.hidden, 0.3)
    for name in ("sft", "reinforce", "lco-kld"):
        objective = lg.objective(name)
        rises = lg.intervention("capo")(head.logits, head.batch, objective=objective, layer=layer).scores["m_H"]
        rule = lg.intervention("capo", tau_h=rises.abs().median().item(), tau_f=None)
        choice = rule(head.logits, head.batch, objective=objective, layer=layer)
        assert choice.keep.sum() == N // 2
        assert not torch.equal(choice.scores["m_H"], rule(head.logits, head.batch, layer=layer).scores["m_H"])
        assert torch.equal(rule.on(objective, layer=layer).choice(head.logits, head.batch).keep, choice.keep)


def test_a_number_that_overflowed_is_not_trusted() -> None:
    batch = lg.TokenBatch(torch.tensor([0, 1]), torch.tensor([1e200, 1e-3], dtype=torch.float64))
    logits = torch.zeros(2, 4, dtype=torch.float64)
    layer = lg.LastLayer(torch.ones(2, 3, dtype=torch.float64), 1.0)
    for rule in ("symmetric", "one-sided"):
        found = lg.intervention("capo", rule=rule, tau_h=1e-12, tau_f=0.1)(logits, batch, layer=layer).keep
        assert not found[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_of_other_types(dtype: torch.dtype) -> None:
    head = make_head()
    logits = head.logits.to(dtype)
    layer = lg.LastLayer(head.hidden.to(dtype), 0.1)
    wide = lg.LastLayer(head.hidden.to(dtype).double(), 0.1)
    for level in ("token", "sentence"):
        rule = lg.intervention("capo", level=level)
        found, expected = rule(logits, head.batch, layer=layer), rule(logits.double(), head.batch, layer=wide)
        for key, value in expected.scores.items():
            assert torch.equal(found.scores[key], value)
            assert found.scores[key].dtype == torch.float64


@pytest.mark.parametrize("level", ["token", "sentence", "global"])
def test_on_the_device(level: str, device: torch.device) -> None:
    """The same numbers wherever it runs; on a machine without a GPU this compares the CPU with itself."""
    head = make_head("some")
    layer = layer_of(head, 0.05, warm_adam(head, 0.05))
    rule = lg.intervention("capo", level=level, top_k=4)
    expected = rule(head.logits, head.batch, layer=layer).scores
    given = {key: value.to(device) for key, value in vars(head.batch).items() if value is not None}
    state = lg.AdamState(layer.adam.exp_avg.to(device), layer.adam.exp_avg_sq.to(device), 3)
    there = lg.LastLayer(head.hidden.to(device), 0.05, state)
    found = rule(head.logits.to(device), lg.TokenBatch(**given), layer=there).scores
    for key, value in expected.items():
        assert found[key].device.type == device.type
        torch.testing.assert_close(found[key].cpu(), value, rtol=1e-9, atol=1e-12)
