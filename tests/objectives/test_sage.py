"""SAGE against brute force over pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lcogeom as lg


def pairs_of(count: int, seed: int = 0, vocab: int = 6) -> tuple[torch.Tensor, lg.TokenBatch]:
    """Pairs of a few tokens on each side, their tokens shuffled."""
    rng = torch.Generator().manual_seed(seed)
    pairs, chosen = [], []
    for pair in range(count):
        for side in (True, False):
            tokens = int(torch.randint(1, 4, (), generator=rng))
            pairs += [10 * pair + 3] * tokens
            chosen += [side] * tokens
    order = torch.randperm(len(pairs), generator=rng)
    logits = torch.randn(len(pairs), vocab, generator=rng, dtype=torch.float64)
    actions = torch.randint(vocab, (len(pairs),), generator=rng)
    ref = -torch.rand(len(pairs), generator=rng, dtype=torch.float64) * 3 - 1e-3
    return logits, lg.TokenBatch(
        actions, ref_logprobs=ref, pairs=torch.tensor(pairs)[order], chosen=torch.tensor(chosen)[order]
    )


def brute_force(logits, batch, keep, beta, damping) -> tuple[list[bool], dict[int, float], dict[int, float]]:
    """(keep per token, margin per pair, score per pair)."""
    live = [True] * len(batch) if batch.mask is None else batch.mask.bool().tolist()
    margins, scores = {}, {}
    for pair in sorted(set(batch.pairs.tolist())):
        margin = 0.0
        for n in range(len(batch)):
            if batch.pairs[n] == pair and live[n]:
                p = torch.softmax(logits[n], 0)[batch.actions[n]].item()
                gain = math.log(p) - batch.ref_logprobs[n].item()
                margin += beta * gain if batch.chosen[n] else -beta * gain
        slope = 1 / (1 + math.exp(margin))
        margins[pair], scores[pair] = margin, slope**2 / (slope * (1 - slope) + damping)
    alive = [pair for pair in margins if any(live[n] for n in range(len(batch)) if batch.pairs[n] == pair)]
    ranked = sorted(alive, key=lambda pair: (-scores[pair], pair))
    kept = set(ranked[: math.ceil(round(keep * len(alive), 9))])
    return [live[n] and batch.pairs[n].item() in kept for n in range(len(batch))], margins, scores


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force(seed: int) -> None:
    logits, batch = pairs_of(1 + seed, seed)
    rng = torch.Generator().manual_seed(seed)
    if seed % 2:
        mask = torch.rand(len(batch), generator=rng) < 0.7
        batch = replace(batch, mask=mask & (batch.pairs != 3))  # one pair is masked out whole
    for keep, beta, damping in ((0.5, 0.1, 1e-2), (0.07, 2.0, 1e-3), (1.0, 0.1, 0.1)):
        choice = lg.intervention("sage", keep=keep, beta=beta, damping=damping)(logits, batch)
        expected, margins, scores = brute_force(logits, batch, keep, beta, damping)
        assert choice.keep.tolist() == expected
        for n, pair in enumerate(batch.pairs.tolist()):
            assert choice.scores["margin"][n].item() == pytest.approx(margins[pair], rel=1e-12, abs=1e-13)
            assert choice.scores["score"][n].item() == pytest.approx(scores[pair], rel=1e-12)


def test_pairs_are_kept_whole_and_the_count_is_exact() -> None:
    for count, keep, kept in ((10, 0.3, 3), (10, 0.7, 7), (3, 0.5, 2), (1, 1e-3, 1), (100, 0.07, 7), (100, 0.29, 29)):
        logits, batch = pairs_of(count, seed=count)
        choice = lg.intervention("sage", keep=keep)(logits, batch)
        assert len(batch.pairs[choice.keep].unique()) == kept
        assert not set(batch.pairs[choice.keep].tolist()) & set(batch.pairs[~choice.keep].tolist())


def test_of_equal_scores_the_lower_id_is_kept() -> None:
    logits = torch.zeros(8, 3)
    batch = lg.TokenBatch(
        torch.zeros(8, dtype=torch.long),
        ref_logprobs=-torch.ones(8),
        pairs=torch.tensor([9, 9, 2, 2, 5, 5, 7, 7]),
        chosen=torch.tensor([True, False] * 4),
    )
    choice = lg.intervention("sage", keep=0.5)(logits, batch)
    assert choice.batch.pairs[choice.keep].unique().tolist() == [2, 5]


@settings(deadline=None, max_examples=100)
@given(st.floats(-600, 600), st.floats(1e-6, 10), st.floats(1e-3, 1e-1))
def test_the_score_falls_with_the_margin(margin: float, gap: float, damping: float) -> None:
    """So which pairs are kept does not depend on `damping`: they are those with the lowest margins."""
    logits = torch.zeros(4, 2, dtype=torch.float64)
    shift = math.log(2)
    ref = [-shift - max(margin, 0), -shift - max(-margin, 0)]  # l - l_ref = max(m, 0) and max(-m, 0)
    ref += [ref[0] - gap, ref[1]]
    batch = lg.TokenBatch(
        torch.zeros(4, dtype=torch.long),
        ref_logprobs=torch.tensor(ref, dtype=torch.float64),
        pairs=torch.tensor([0, 0, 1, 1]),
        chosen=torch.tensor([True, False, True, False]),
    )
    scores = lg.intervention("sage", beta=1.0, damping=damping)(logits, batch).scores
    assert scores["margin"][2] >= scores["margin"][0]
    assert scores["score"][2] <= scores["score"][0]
    assert scores["score"].isfinite().all()


def test_a_pair_needs_both_answers() -> None:
    logits, batch = pairs_of(3)
    lonely = replace(batch, chosen=batch.chosen | (batch.pairs == 13))
    with pytest.raises(ValueError, match="chosen: pair 13 has no rejected token"):
        lg.intervention("sage")(logits, lonely)
    with pytest.raises(ValueError, match="chosen: pair 3 has no chosen token"):
        lg.intervention("sage")(logits, replace(batch, chosen=batch.chosen & (batch.pairs != 3)))


def test_on_dpo() -> None:
    logits, batch = pairs_of(5)
    rule = lg.intervention("sage", keep=0.4)
    keep = rule(logits, batch).keep
    plain, guarded = lg.objective("dpo"), rule.on(lg.objective("dpo"))
    torch.testing.assert_close(guarded.gradient(logits, batch)[keep], plain.gradient(logits, batch)[keep])
    assert not guarded.gradient(logits, batch)[~keep].any()
    assert guarded.loss(logits, batch)[keep].sum() > 0
    x = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = guarded.joint_hessian(logits, batch) @ x
    torch.testing.assert_close(product[keep], (plain.joint_hessian(logits, batch) @ x)[keep])
    assert not product[~keep].any()
