"""BAPO and ACPO against their definitions, token by token in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

import lcogeom as lg

UNCLIPPED = {"clip_low": None, "clip_high": None}


def with_ratios(ratios: list[float], advantages: list[float], mask: list[int] | None = None, vocab: int = 5):
    """(logits, batch) whose ratios are these, float64."""
    rng = torch.Generator().manual_seed(len(ratios))
    logits = torch.randn(len(ratios), vocab, generator=rng, dtype=torch.float64) - 3
    logits[:, 0] = 9.0  # old log-probabilities must stay below 0: the action is a rare one
    actions = torch.randint(1, vocab, (len(ratios),), generator=rng)
    logprobs = torch.log_softmax(logits, 1).gather(1, actions[:, None]).squeeze(1)
    batch = lg.TokenBatch(
        actions,
        torch.tensor(advantages, dtype=torch.float64),
        old_logprobs=logprobs - torch.tensor(ratios, dtype=torch.float64).log(),
        mask=None if mask is None else torch.tensor(mask),
    )
    return logits, batch


def search(ratios, advantages, mask, *, target, low, high, step_low, step_high) -> tuple[float, float, float]:
    """(c_low, c_high, R): the definition (systems.md 5), one step after another."""

    def balance(c_low: float, c_high: float) -> float:
        terms = list(zip(ratios, advantages, mask, strict=True))
        pos = sum(min(r, c_high) * a for r, a, m in terms if a >= 0 and m)
        neg = sum(max(r, c_low) * -a for r, a, m in terms if a < 0 and m)
        return pos / (neg + 1e-8) if neg > 0 else math.inf

    c_low, c_high = low[0], high[0]
    while balance(c_low, c_high) < target and c_low < low[1] and step_low > 0:
        c_low = min(c_low + step_low, low[1])
    while balance(c_low, c_high) < target and c_high < high[1] and step_high > 0:
        c_high = min(c_high + step_high, high[1])
    return c_low, c_high, balance(c_low, c_high)


@pytest.mark.parametrize("seed", range(60))
def test_bapo_search(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 12, (), generator=rng))
    ratios = torch.randn(count, generator=rng, dtype=torch.float64).mul(0.8).exp().tolist()
    advantages = torch.randn(count, generator=rng, dtype=torch.float64).round(decimals=1).tolist()
    mask = torch.randint(2, (count,), generator=rng).tolist() if seed % 2 else [1] * count
    options = {
        "target": [0.0, 0.5, 0.9, 1.0, 1.3, 4.0][seed % 6],
        "low": [(0.6, 0.9), (0.8, 0.95), (0.7, 0.7)][seed % 3],
        "high": [(1.2, 3.0), (1.2, 1.2), (1.1, 2.0)][seed // 2 % 3],
        "step_low": [0.05, 0.07, 0.0][seed // 3 % 3],
        "step_high": [0.05, 0.3, 0.0][seed // 5 % 3],
    }
    logits, batch = with_ratios(ratios, advantages, mask)
    c_low, c_high, balance = search(ratios, advantages, mask, **options)
    choice = lg.intervention("bapo", **options)(logits, batch)
    assert choice.bounds[0].tolist() == [c_low] * count
    assert choice.bounds[1].tolist() == [c_high] * count
    assert choice.scores["balance"][0].item() == pytest.approx(balance, rel=1e-9)
    for n, (ratio, advantage) in enumerate(zip(ratios, advantages, strict=True)):
        dropped = advantage > 0 and ratio > c_high
        dropped |= advantage < 0 and (ratio < c_low or ratio > 3)
        assert choice.keep[n].item() == (bool(mask[n]) and not dropped), n
        assert choice.scores["ratio"][n].item() == pytest.approx(ratio)


def test_bapo_by_hand() -> None:
    """pos = min(2, c_high), neg = max(.5, c_low) 2. From (.6, 1.2): R = 1.2 / 1.2 = 1, below 1.2; raising c_low to .9
    makes it .667; c_high must then reach 2.16 for 1.2, which min(2, .) never does: both bounds end at their maxima."""
    logits, batch = with_ratios([2.0, 0.5], [1.0, -2.0])
    assert lg.intervention("bapo", target=0.99)(logits, batch).bounds[0][0] == 0.6
    choice = lg.intervention("bapo", target=1.2)(logits, batch)
    assert [bound[0].item() for bound in choice.bounds] == [0.9, 3.0]
    assert choice.scores["balance"][0].item() == pytest.approx(2 / 1.8)
    assert choice.keep.tolist() == [True, False]
    # .9 2 = 1.8 and target 1: c_high stops at the first rung at or above 1.8
    choice = lg.intervention("bapo", target=1.0000001, high=(1.2, 3.0), step_high=0.3)(logits, batch)
    assert [bound[0].item() for bound in choice.bounds] == pytest.approx([0.9, 2.1])


def test_bapo_without_negative_tokens_does_not_search() -> None:
    logits, batch = with_ratios([2.0, 1.1], [1.0, 0.0])
    choice = lg.intervention("bapo", target=100.0)(logits, batch)
    assert choice.scores["balance"].tolist() == [math.inf] * 2
    assert [bound[0].item() for bound in choice.bounds] == [0.6, 1.2]
    assert choice.keep.tolist() == [False, True]


@pytest.mark.parametrize("log_ratio", [-800.0, -19.0, 30.0, 800.0])
def test_huge_ratios(log_ratio: float) -> None:
    for advantage in (-1.0, 1.0):
        logits = torch.zeros(1, 2, dtype=torch.float64)
        logits[0, 1] = min(log_ratio, 0.0)
        old = -1e-3 if log_ratio < 0 else -log_ratio - math.log(2.0)
        batch = lg.TokenBatch(
            torch.tensor([1]), torch.tensor([advantage]), old_logprobs=torch.tensor([old], dtype=torch.float64)
        )
        for name in ("bapo", "acpo"):
            choice = lg.intervention(name)(logits, batch)
            far = log_ratio > 0 if advantage > 0 else log_ratio < 0 or name == "bapo"  # bapo: dual clip
            assert choice.keep.tolist() == [not far]
            assert not choice.scores["ratio"].isnan().any()
            if name == "bapo":  # the authors clamp the log-ratio to +-20
                expected = math.exp(max(-20.0, min(20.0, log_ratio)))
                assert choice.scores["ratio"].item() == pytest.approx(expected, rel=0.01)


def test_bounds_are_inclusive() -> None:
    """A ratio that stands on its bound is not clipped: PPO's surrogate has its slope there, too."""
    logits, batch = with_ratios([1.0, 1.0], [1.0, -1.0])
    assert lg.intervention("acpo", clip_low=0.0, clip_high=0.0, delta=0.0)(logits, batch).keep.all()
    rule = lg.intervention("bapo", low=(1.0, 1.0), high=(1.0, 1.0))
    assert rule(logits, batch).keep.all()


@pytest.mark.parametrize("seed", range(5))
def test_acpo(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    ratios = torch.randn(40, generator=rng, dtype=torch.float64).mul(0.3).exp().tolist()
    advantages = torch.randn(40, generator=rng, dtype=torch.float64).tolist()
    advantages[0] = 0.0
    logits, batch = with_ratios(ratios, advantages)
    choice = lg.intervention("acpo", clip_low=0.25, clip_high=0.1, delta=0.3)(logits, batch)
    for n, (ratio, advantage) in enumerate(zip(ratios, advantages, strict=True)):
        high = 1 + 0.1 + 0.3 * (1 + math.erf(advantage / math.sqrt(2))) / 2
        assert choice.bounds[1][n].item() == pytest.approx(high, rel=1e-14)
        assert choice.keep[n].item() == (ratio <= high if advantage > 0 else ratio >= 0.75 or advantage == 0)
    assert choice.bounds[1][0].item() == pytest.approx(1 + 0.1 + 0.3 / 2, rel=1e-15)  # Phi(0) = 1/2
    assert (choice.bounds[0] == 0.75).all()


def test_acpo_defaults_stay_below_the_bound_of_dapo() -> None:
    logits, batch = with_ratios([1.0, 1.0], [40.0, -40.0])
    high = lg.intervention("acpo")(logits, batch).bounds[1]
    torch.testing.assert_close(high, torch.tensor([1.28, 1.2], dtype=torch.float64))


@pytest.mark.parametrize("high", [1.2, 1.5])
def test_the_mask_is_the_clip(high: float) -> None:
    """PPO without bounds under fixed BAPO bounds updates as PPO with those bounds does."""
    rng = torch.Generator().manual_seed(0)
    ratios = torch.randn(50, generator=rng, dtype=torch.float64).exp().tolist()
    logits, batch = with_ratios(ratios, torch.randn(50, generator=rng).tolist())
    fixed = lg.intervention("bapo", low=(0.7, 0.7), high=(high, high), dual_clip=2.0)
    masked = fixed.on(lg.objective("ppo", **UNCLIPPED))
    clipped = lg.objective("ppo", clip_low=0.3, clip_high=high - 1, dual_clip=2.0)
    assert 5 < fixed(logits, batch).keep.sum() < 45
    torch.testing.assert_close(masked.gradient(logits, batch), clipped.gradient(logits, batch))
    torch.testing.assert_close(masked.hessian(logits, batch).dense(), clipped.hessian(logits, batch).dense())
