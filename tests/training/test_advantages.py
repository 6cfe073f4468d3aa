"""Advantages against plain Python in float64, and against TRL's own trainers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcogeom.training import advantages as adv
from tests.integrations import trainers

REWARDS = st.sampled_from([0.0, 1.0, -1.0, 0.1, 1 / 3, 1e30, -1e30]) | st.floats(-1e3, 1e3, width=32)
BATCHES = st.lists(st.tuples(REWARDS, st.sampled_from([0, 7, -3, 10**12])), min_size=1, max_size=12)


def others(rows: list[tuple[float, int]], place: int) -> list[float]:
    """The rewards of the same group, the one at `place` left out."""
    return [reward for other, (reward, group) in enumerate(rows) if group == rows[place][1] and other != place]


def grpo_loop(rows: list[tuple[float, int]], eps: float, scale: bool) -> list[float]:
    found = []
    for place, (reward, _) in enumerate(rows):
        same = [reward, *others(rows, place)]
        if len(set(same)) == 1:
            found.append(0.0)
            continue
        apart = reward - math.fsum(same) / len(same)
        found.append(apart / (statistics.stdev(same) + eps) if scale else apart)
    return found


def rloo_loop(rows: list[tuple[float, int]]) -> list[float]:
    rest = [others(rows, place) for place in range(len(rows))]
    return [r - math.fsum(o) / len(o) if o else 0.0 for (r, _), o in zip(rows, rest, strict=True)]


@settings(max_examples=200, deadline=None)
@given(BATCHES)
def test_groups_of_any_size_in_any_order(rows: list[tuple[float, int]]) -> None:
    rewards = torch.tensor([reward for reward, _ in rows], dtype=torch.float64)
    groups = torch.tensor([group for _, group in rows])
    size = max(1.0, float(rewards.abs().max()))
    for found, wanted, unit in (
        (adv.group_relative(rewards, groups), grpo_loop(rows, 1e-4, True), 1.0),
        (adv.group_relative(rewards, groups, eps=1.0), grpo_loop(rows, 1.0, True), 1.0),
        (adv.group_relative(rewards, groups, scale="none"), grpo_loop(rows, 0.0, False), size),
        (adv.leave_one_out(rewards, groups), rloo_loop(rows), size),
    ):
        # the loop's own mean rounds to 1e-16 of the largest reward, which a small deviation magnifies
        spread = 1e-9 if unit == size else 1e-9 + 1e-14 * size
        np.testing.assert_allclose(found.numpy() / unit, np.array(wanted) / unit, rtol=1e-9, atol=min(spread, 1e-3))


@settings(max_examples=100, deadline=None)
@given(BATCHES, st.randoms(use_true_random=False))
def test_they_move_with_the_completions(rows: list[tuple[float, int]], chance) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(rows)))
    chance.shuffle(order)
    rewards, groups = torch.tensor([r for r, _ in rows]), torch.tensor([g for _, g in rows])
    for function in (adv.group_relative, adv.leave_one_out, adv.informative_groups):
        whole = function(rewards, groups)
        np.testing.assert_allclose(function(rewards[order], groups[order]).numpy(), whole[order].numpy(), rtol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7, 1e20, 3e38])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equal_rewards_teach_nothing(value: float, size: int) -> None:
    """Exactly nothing: a mean that rounds would give 1e20 * 1e-16 / 1e-4, a large advantage out of thin air."""
    rewards, groups = torch.full((size,), value), torch.zeros(size, dtype=torch.long)
    for name in ("group", "dr-grpo", "rloo", "reinforce-mean"):
        assert (adv.sequence_advantages(name, rewards, groups) == 0).all()
    assert not adv.informative_groups(rewards, groups).any()


def test_huge_rewards_stay_finite() -> None:
    rewards, groups = torch.tensor([3e38, -3e38, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    np.testing.assert_allclose(adv.group_relative(rewards, groups)[:2], [2**-0.5, -(2**-0.5)], rtol=1e-6)
    assert adv.group_relative(rewards, groups).dtype == torch.float32
    assert adv.group_relative(rewards.bfloat16(), groups).dtype == torch.float32
    assert adv.group_relative(torch.tensor([5, -5, 1, 1]), groups, clip=0.5).tolist() == [0.5, -0.5, 0, 0]


@pytest.mark.parametrize(
    ("maker", "options", "ours"),
    [
        (trainers.grpo, {}, adv.group_relative),
        (trainers.grpo, {"scale_rewards": "none"}, lambda r, g: adv.group_relative(r, g, scale="none")),
        (trainers.rloo, {}, adv.leave_one_out),
    ],
    ids=["GRPO", "Dr. GRPO", "RLOO"],
)
def test_as_trl(maker: Callable, options: dict, ours: Callable[[Tensor, Tensor], Tensor], tmp_path: Path) -> None:
    """The same rewards, of completions that TRL sampled, through TRL's own normalisation."""
    trainer = maker(tmp_path, 1, per_device_train_batch_size=16, steps_per_generation=1, beta=0.0, **options)
    rewards: list[Tensor] = []
    theirs = trainer._calculate_rewards

    def listen(*arguments: object) -> Tensor:
        rewards.append(theirs(*arguments))
        return rewards[-1]

    trainer._calculate_rewards = listen
    prompts = [{"prompt": prompt} for prompt in trainers.PROMPTS[:4] for _ in range(4)]
    wanted = trainer._generate_and_score_completions(prompts)["advantages"]
    assert wanted.abs().max() > 0.5
    groups = torch.arange(4).repeat_interleave(4)
    np.testing.assert_allclose(ours(rewards[0][:, 0], groups), wanted, rtol=1e-4, atol=1e-5)


def test_reinforce_and_rule() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5])
    assert torch.equal(adv.reinforce_baseline(rewards, baseline="none"), rewards)
    np.testing.assert_allclose(adv.reinforce_baseline(rewards), rewards - 0.5, atol=1e-7)
    assert adv.rule_reward(rewards).tolist() == [1, -1, -1, 1, -1]
    assert adv.rule_reward(torch.tensor([-1.0, 1.0])).tolist() == [-1, 1]


def test_informative_groups() -> None:
    found = adv.informative_groups(torch.tensor([1.0, 0, 1, 1, 0, 0, 1]), torch.tensor([0, 0, 5, 5, 2, 2, 9]))
    assert found.tolist() == [True, True, False, False, False, False, False]


def test_overlong_penalty() -> None:
    """Points on DAPO's line, with its own numbers: 20,480 tokens of which the last 4,096 are punished."""
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 20481, 10**6])
    wanted = [0, 0, -1 / 4096, -0.5, -1, -1, -1]
    np.testing.assert_allclose(adv.overlong_penalty(lengths, longest=20480, buffer=4096), wanted, rtol=1e-6)
    assert not torch.signbit(adv.overlong_penalty(lengths[:2], longest=20480, buffer=4096) + 0.0).any()


def adora_loop(rows: list[tuple[float, int, int]], longest: int, version: str) -> list[float]:
    found = []
    for _, group, _ in rows:
        same = [row for row in rows if row[1] == group]
        right = [length for reward, _, length in same if reward >= 1]
        wrong = [length for reward, _, length in same if reward < 1 and length < longest]
        if not right:
            found.append(1.0 if version == "vl" else 0.1)
        else:
            found.append(1.0 if not wrong or max(right) > sum(wrong) / len(wrong) else 0.1)
    return found


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(0, 2), st.integers(1, 10)), min_size=1, max_size=12),
    st.sampled_from(["llm", "vl"]),
)
def test_adora(rows: list[tuple[float, int, int]], version: str) -> None:
    rewards, groups, lengths = (torch.tensor(column) for column in zip(*rows, strict=True))
    weights = adv.adora_weights(rewards, groups, lengths, correct=1.0, longest=10, version=version)
    np.testing.assert_allclose(weights, adora_loop(rows, 10, version), rtol=1e-6)
    scaled = adv.group_relative(rewards, groups, eps=1e-6) * weights
    assert torch.equal(adv.adora(rewards, groups, lengths, correct=1.0, longest=10, version=version), scaled)


def gae_loop(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> np.ndarray:
    """A_t = sum_k (gamma lam)^k (r + gamma V' - V), a double sum over the action tokens of each row."""
    found = np.zeros(mask.shape)
    for row, kept in enumerate(mask):
        places = kept.nonzero()[:, 0].tolist()
        r, v = rewards[row].double()[places].tolist(), [*values[row].double()[places].tolist(), 0.0]
        for t, place in enumerate(places):
            deltas = (r[k] + gamma * v[k + 1] - v[k] for k in range(t, len(places)))
            found[row, place] = math.fsum((gamma * lam) ** k * delta for k, delta in enumerate(deltas))
    return found


MASKS = {
    "all": lambda b, t: torch.ones(b, t, dtype=torch.bool),
    "right padding": lambda b, t: torch.arange(t)[None] < torch.arange(1, b + 1)[:, None] * t // b,
    "left padding": lambda b, t: torch.arange(t)[None] >= torch.arange(b)[:, None] * t // b,
    "holes": lambda b, t: torch.rand(b, t, generator=torch.Generator().manual_seed(1)) < 0.5,
    "an empty row": lambda b, t: (torch.arange(b)[:, None] > 0).expand(b, t).clone(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("gamma", "lam"), [(1, 1), (0.9, 0.8), (0.99, 0.95), (1, 0), (0, 1), (0, 0), (0.5, 1)])
def test_gae_is_the_double_sum(gamma: float, lam: float, mask: str, dtype: torch.dtype) -> None:
    """bf16 input is exact in float32, where the sums of at most 37 terms keep six digits."""
    source = torch.Generator().manual_seed(0)
    for length in (1, 2, 16, 37):
        rewards, values = torch.randn(2, 5, length, generator=source, dtype=torch.float64).to(dtype)
        kept = MASKS[mask](5, length)
        advantages, returns = adv.gae(rewards, values, kept, gamma=gamma, lam=lam)
        wanted = gae_loop(rewards, values, kept, gamma, lam)
        assert advantages.dtype == returns.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        np.testing.assert_allclose(advantages, wanted, atol=tolerance)
        np.testing.assert_allclose(returns, np.where(kept, wanted + values.double().numpy(), 0.0), atol=tolerance)


def test_gae_does_not_read_off_the_mask() -> None:
    kept = torch.tensor([[False, True, False, True, False]])
    rewards, values = torch.where(kept, 1.0, torch.nan), torch.where(kept, 2.0, torch.inf)
    advantages, returns = adv.gae(rewards, values, kept, gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[0, 0, 0, -1, 0]]
    assert returns.tolist() == [[0, 2, 0, 1, 0]]


def test_lambda_one_is_the_return_minus_the_value() -> None:
    """What GAE is for: with lam = 1 the critic leaves the sum of rewards to come as it is."""
    rewards, values = torch.randn(2, 3, 200, dtype=torch.float64)
    _, returns = adv.gae(rewards, values, torch.ones(3, 200, dtype=torch.bool), gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, rewards.flip(1).cumsum(1).flip(1), atol=1e-11)


def test_q_advantages_and_whitening() -> None:
    kept = torch.tensor([[True, True, False], [True, False, False]])
    q, values = torch.tensor([[1.0, 2, torch.nan], [3, 9, 9]]), torch.full((2, 3), 10.0)
    advantages, returns = adv.q_advantages(q, values, kept)
    np.testing.assert_allclose(advantages, [[0.9, 1.9, 0], [2.9, 0, 0]], rtol=1e-6)
    assert returns.tolist() == [[1, 2, 0], [3, 0, 0]]
    white = adv.whiten(q, kept)
    np.testing.assert_allclose(white, [[-1, 0, 0], [1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(adv.whiten(q, kept, centre=False), [[1, 2, 0], [3, 0, 0]], rtol=1e-6)
    assert not adv.whiten(q, torch.zeros_like(kept)).any()


def test_names() -> None:
    rewards, groups = torch.tensor([1.0, 0, 1]), torch.tensor([0, 0, 0])
    lengths = torch.tensor([4, 2, 1])
    for name in (*adv.SEQUENCE_ADVANTAGES, "adora"):
        assert adv.sequence_advantages(name, rewards, groups, lengths=lengths, longest=9).shape == (3,)
    assert torch.equal(adv.sequence_advantages("reinforce", rewards, groups), rewards)
    assert adv.sequence_advantages("rule", rewards, groups).tolist() == [1, -1, 1]
    np.testing.assert_allclose(adv.sequence_advantages("rloo", rewards, groups), [0.5, -1, 0.5])
    np.testing.assert_allclose(adv.sequence_advantages("dr-grpo", rewards, groups), [1 / 3, -2 / 3, 1 / 3])
    np.testing.assert_allclose(adv.sequence_advantages("group", rewards, groups), [0.5773, -1.1545, 0.5773], atol=2e-4)
    np.testing.assert_allclose(adv.sequence_advantages("reinforce-mean", rewards, groups), [1 / 3, -2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda r, g: adv.group_relative(r, g[:2]), "groups: shape"),
        (lambda r, g: adv.group_relative(r[None], g), "rewards: shape"),
        (lambda r, g: adv.group_relative(r, g, scale="var"), "scale: 'var'"),
        (lambda r, g: adv.leave_one_out(r.where(r > 0, torch.nan), g), "rewards: NaN or infinite at completion 1"),
        (lambda r, g: adv.reinforce_baseline(r, baseline="group"), "baseline"),
        (lambda r, g: adv.overlong_penalty(g, longest=5, buffer=6), "buffer: 6"),
        (lambda r, g: adv.adora_weights(r, g, g, correct=1, longest=5, version="video"), "version"),
        (lambda r, g: adv.sequence_advantages("grpoo", r, g), "no 'grpoo'"),
        (lambda r, g: adv.sequence_advantages("adora", r, g), "needs lengths"),
        (lambda r, g: adv.gae(r[None], r[None], g[None] == 0, gamma=1.1, lam=1), "gamma: 1.1"),
        (lambda r, g: adv.gae(r[None], r[None, :2], g[None] == 0, gamma=1, lam=1), "values: shape"),
    ],
)
def test_bad_input(call: Callable, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))
