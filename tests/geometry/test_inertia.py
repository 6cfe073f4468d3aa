"""The convexity criterion of method.md 2.2 against dense eigenvalues, and against itself where those fail."""

from __future__ import annotations

import pytest
import torch

import lcogeom as lg
from lcogeom.geometry.convexity import forward_kl_needed, negative_count, odds_against
from lcogeom.geometry.hessian import action_hessian
from lcogeom.geometry.softmax import token_distribution
from tests.cases import CASES, Case
from tests.oracles import PAIRS, built, derivatives, pairs_and_cases

# eigvalsh decides a sign only for eigenvalues well above its rounding: moderate cases (design.md, section 5).
MODERATE = [
    Case(vocab, logits, advantage, log_ratio)
    for vocab in (2, 3, 17)
    for logits in ("flat", "random", "tied", "half", "peaked")
    for advantage, log_ratio in ((1.0, 0.0), (-1.0, 0.0), (2.0, 0.1), (1.0, 0.5), (-2.0, -0.5), (0.0, 0.0))
]

# A second eigenvalue at 0: k* puts it there; with V = 2 and equal advantages sum_j p_j A_j is constant.
ON_THE_EDGE = ("ppo-cvx", "dense-expected-advantage")


def rounding_scale(objective: lg.Objective, logits: torch.Tensor, batch: lg.TokenBatch) -> torch.Tensor:
    """What double backward rounds at, (N,): |f'| + |f''|, however small (1 - pi) makes the result."""
    if not isinstance(objective, lg.ActionObjective):
        return torch.ones(len(batch), dtype=torch.float64, device=logits.device)
    _, d1, d2 = objective.derivatives(token_distribution(logits, batch.actions).logprobs, batch)
    return d1.abs() + d2.abs()


@pytest.mark.parametrize(("name", "case"), pairs_and_cases(MODERATE), ids=str)
def test_negative_count_equals_eigvalsh(name: str, case: Case, device: torch.device) -> None:
    objective, oracle = PAIRS[name]
    logits, batch = built(name, case, device)
    _, _, hessian = derivatives(oracle, logits, batch)
    values = torch.linalg.eigvalsh(hessian)
    noise = 1e-14 * rounding_scale(objective, logits, batch)[:, None]
    wanted = (values < -noise).sum(1)
    # A softmax loss has one eigenvalue that is 0; a second one at rounding level (pi = 1/2) decides nothing here.
    near = values.abs() <= noise
    decided = (near.sum(1) <= 1) | (near == (values == 0)).all(1)
    H = objective.hessian(logits, batch)
    assert torch.equal(H.negative_count()[decided], wanted[decided])
    assert torch.equal(H.is_convex(), H.negative_count() == 0)
    if case.logits != "half" and (case.vocab, case.logits) != (2, "flat") and name not in ON_THE_EDGE:
        assert decided.double().mean() >= 0.6  # GSPO at pi = 1/(1+n), a confidence of 1/2: two tokens lie on the edge


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ppo_cvx_is_convex(case: Case, device: torch.device) -> None:
    """Its second eigenvalue is 0 up to rounding by construction, and may never count as negative."""
    logits, batch = case.build(device)
    assert lg.objective("ppo-cvx").hessian(logits, batch).is_convex().all()


def test_exactly_one_half_is_convex(device: torch.device) -> None:
    """V = 2, flat: pi is 1/2 to the last bit, PPO's Hessian is 0, and no rounding may call it negative."""
    for advantage in (1.0, -1.0):
        logits, batch = Case(2, "flat", advantage, 0.5).build(device)
        H = lg.objective("ppo", clip_low=None, clip_high=None).hessian(logits, batch)
        assert H.negative_count().tolist() == [0] * len(batch)


def test_every_branch_of_the_criterion(device: torch.device) -> None:
    """Random f', f'' of both signs, zeros included: all five outcomes of method.md 2.2 occur and equal eigvalsh."""
    rng = torch.Generator().manual_seed(0)
    seen = set()
    for vocab in (2, 3, 6):
        logits = torch.randn(400, vocab, generator=rng, dtype=torch.float64)
        actions = torch.randint(vocab, (400,), generator=rng)
        d1 = torch.randint(-1, 2, (400,), generator=rng) * (0.1 + torch.rand(400, generator=rng, dtype=torch.float64))
        d2 = torch.randint(-1, 2, (400,), generator=rng) * (0.1 + torch.rand(400, generator=rng, dtype=torch.float64))
        H = action_hessian(logits, actions, d1, d2)
        values = torch.linalg.eigvalsh(H.dense())
        wanted = (values < -1e-12).sum(1)
        assert torch.equal(H.negative_count(), wanted)
        if vocab == 6:
            seen = set(zip(d1.sign().tolist(), wanted.tolist(), strict=True))
    assert seen == {(-1, 0), (-1, 1), (1, 5), (1, 4), (0, 0), (0, 1)}


def test_saturated_tokens_keep_their_sign() -> None:
    """The criterion where pi rounds to 1, to 0, or underflows: signs known by hand, out of eigvalsh's reach."""
    d1 = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    d2 = torch.tensor([-1.0, -1.0, 0.0, 1.0, 0.0, -1e-30], dtype=torch.float64)
    logprobs = torch.tensor([-1e-26, -800.0, -800.0, -1e-26, -800.0, -1e-30], dtype=torch.float64)
    # PPO at pi ~ 1: convex. PPO at pi ~ e^-800: one. REINFORCE A<0: V-1. f'>0 dominating at pi ~ 1: V-1. SFT: 0.
    assert negative_count(d1, d2, odds_against(logprobs), 10).tolist() == [0, 1, 9, 9, 0, 1]


def test_ppo_turns_convex_at_one_half(device: torch.device) -> None:
    """Unclipped PPO with A > 0: convex iff pi >= 1/2, decided at 1/2 +- 1e-9."""
    logits, batch = Case(17, "half", 1.0, 0.0).build(device)
    probs = token_distribution(logits, batch.actions).logprobs.exp()
    convex = lg.objective("ppo", clip_low=None, clip_high=None).hessian(logits, batch).is_convex()
    assert (probs[:2] - 0.5).abs().max() < 2e-9
    assert convex[0]
    assert not convex[1]
    assert torch.equal(convex[[0, 1, 3, 4]], (probs >= 0.5)[[0, 1, 3, 4]])


def test_forward_kl_needed_is_the_smallest(device: torch.device) -> None:
    rng = torch.Generator().manual_seed(2)
    logits = torch.randn(60, 7, generator=rng, dtype=torch.float64)
    actions = torch.randint(7, (60,), generator=rng)
    distribution = token_distribution(logits, actions)
    d1 = torch.randn(60, generator=rng, dtype=torch.float64)
    d2 = torch.randn(60, generator=rng, dtype=torch.float64)
    k = forward_kl_needed(d1, d2, distribution.odds_against())
    fisher = action_hessian(logits, actions, -torch.ones_like(d1), torch.zeros_like(d1)).dense()
    plain = action_hessian(logits, actions, d1, d2).dense()
    lowest = torch.linalg.eigvalsh(plain + k[:, None, None] * fisher)[:, 0]
    assert lowest.min() > -1e-12
    needed = k > 1e-6
    assert needed.any()
    below = torch.linalg.eigvalsh(plain + 0.99 * k[:, None, None] * fisher)[:, 0]
    assert (below[needed] < -1e-9).all()


@pytest.mark.parametrize("advantages", [(1.0, -1.0, 0.0, 0.0), (1.0, 1.0, -2.0, 0.0), (-1.0, 0.0, 1.0, 0.0)])
def test_an_advantage_that_is_exactly_the_mean(advantages: tuple[float, ...], device: torch.device) -> None:
    """Flat p and advantages of mean 0: some of the weights w are exactly 0, +0 for H and -0 for -H."""
    batch = lg.TokenBatch(
        torch.zeros(1, dtype=torch.long, device=device),
        torch.tensor([advantages], dtype=torch.float64, device=device),
        advantage_ids=torch.arange(4, device=device)[None],
    )
    for sign in (1.0, -1.0):
        objective = sign * lg.objective("expected-advantage")
        H = objective.hessian(torch.zeros(1, 4, dtype=torch.float64, device=device), batch)
        values = torch.linalg.eigvalsh(H.dense())[0]
        assert H.negative_count().item() == int((values < -1e-12).sum())
        low, high = H.eigenvalue_range()
        torch.testing.assert_close(torch.cat([low, high]), values[[0, -1]], rtol=1e-12, atol=1e-15)
