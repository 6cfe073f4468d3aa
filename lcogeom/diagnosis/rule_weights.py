"""Rules about what drives an update: one sequence that the loss weighs more, or rare tokens that are pushed down."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from lcogeom.diagnosis.baseline import first
from lcogeom.diagnosis.finding import Finding
from lcogeom.diagnosis.making import heaviest, make
from lcogeom.diagnosis.signals import Signals

DRIVES = 0.3
"""Share of the squared gradient from which on a kind of token is said to drive an update."""
NOTICED = 0.02
"""Share of the squared gradient from which on a sequence's weight is looked at, once one dominates."""
OUTWEIGHS = 3.0
"""Times the weight of the typical sequence, both with and without account of its length."""
PUSHED = 0.1
"""Ratio: ten times less likely than when it was sampled. Three inner epochs of an unclipped loss make a few per cent of
the gradient so; with one that only punishes they make most of it."""
RARE = (1e-3, 1e-4)
"""Probabilities below which a token is rare."""
SEVERAL = 4
"""Updates that count together: with a few rare tokens in each, or made on a rollout of which little is left."""
SMALL_MASS = 0.05
"""Of all tokens together, each at the limit; a quarter of it is taken for what a policy gives them."""
UNLIKELY = 1e-5
"""Chance of that many rare tokens: 10,000 updates give 0.1 false alarms."""


def dominant_sequence(s: Signals) -> list[Finding]:
    """One sequence holds most of the gradient because the loss weighs it more than the others."""
    tokens, weights = s.tokens, s.loss_weights
    if tokens is None or weights is None or tokens.square is None or s.token("sequence") is None:
        return []
    update = tokens.update_of_sequence
    squares = tokens.by_sequence(tokens.square)
    length = tokens.by_sequence(tokens.weight)
    known = np.isfinite(weights)
    count = tokens.by_sequence(known * tokens.weight)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.exp(tokens.by_sequence(np.where(known, tokens.weight * np.log(weights), 0.0)) / count)
        total = np.bincount(update, squares, tokens.count)[update]
        share = squares / total
    heavy = np.minimum(_times_others(own, update, tokens.count), _times_others(own * length, update, tokens.count))
    # What its share would be if the loss weighed it as it weighs the others.
    fair = share / heavy**2 / (1 - share + share / heavy**2)
    found = (share > DRIVES) & (heavy > OUTWEIGHS) & (fair < share / 2)
    places = np.flatnonzero(found)
    if not len(places):
        return []
    # Once it is clear that the loss weighs unequally: where that began, however much that sequence's gradient was then.
    places = np.flatnonzero((share > NOTICED) & (heavy > OUTWEIGHS) & (fair < share / 2))
    place = places[np.lexsort((-share[places], update[places]))[0]]
    at = int(update[place])
    name = f"sequence {int(s.token('sequence')[tokens.sequence == place][0])}"  # type: ignore[index]
    proof = [
        s.evidence(
            "logit_grad_norm", at, share[place], fair[place], f"share of {name}, of the squared gradient", "tokens"
        ),
        s.evidence("d1", at, own[place], own[place] / heavy[place], "weight of its tokens in the loss", "tokens"),
    ]
    sentence = (
        f"At update {s.steps[at]}, {name} makes {share[place]:.0%} of the squared gradient: the loss weighs its tokens "
        f"{heavy[place]:.3g} times as heavily as others' (with equal weights it would be {fair[place]:.0%})."
    )
    chosen = tokens.sequence == place
    return [
        make(s, "dominant-sequence", at, 0.9, sentence, proof, share=float(share[place]), where=name, chosen=chosen)
    ]


def _times_others(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """(Q,): each value over the median of its group's; 1 where it is not known."""
    known = np.isfinite(values) & (values > 0)
    at, some = group[known], values[known]
    order = np.lexsort((some, at))
    bounds = np.searchsorted(at[order], np.arange(groups + 1))
    size = np.diff(bounds)
    middle = np.full(groups, np.nan)
    full = size > 3
    middle[full] = some[order][bounds[:-1][full] + (size[full] - 1) // 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = values / middle[group]
    return np.where(np.isfinite(found) & (found > 0), found, 1.0)


def negative_rare_token(s: Signals) -> list[Finding]:
    """Tokens with A < 0 and a tiny probability drive updates: sampled too often, or made rare and pushed on."""
    found = _sampled_too_often(s) + _pushed_on(s)
    return sorted(found, key=lambda finding: finding.update)[:1]


def _pushed_on(s: Signals) -> list[Finding]:
    """Tokens that updates on their rollout made several times less likely drive it, and are pushed down further."""
    tokens, advantage, ratio, slope = s.tokens, s.token("advantage"), s.token("ratio"), s.token("d1")
    if tokens is None or advantage is None or ratio is None or slope is None or tokens.again is None:
        return []
    pushed = (advantage < 0) & (ratio < PUSHED) & (slope > 0)
    share = tokens.share(pushed)
    at = first(tokens.again & (share > DRIVES))
    if at is None:
        return []
    fallen = max(float(np.median(ratio[pushed & (tokens.update == at)])), 1e-300)  # which may have underflown to 0
    chosen = pushed & (tokens.update == at)
    proof = [
        s.evidence("ratio", at, fallen, 1.0, "ratio of the tokens pushed down, their median", "tokens"),
        s.evidence("logit_grad_norm", at, share[at], None, "their share of the squared gradient", "tokens"),
    ]
    sentence = (
        f"At update {s.steps[at]}, tokens with a negative advantage that are {1 / fallen:.3g} times less likely than "
        f"when they were sampled make {share[at]:.0%} of the squared gradient, which pushes them further"
        f"{heaviest(tokens.named(at, chosen))}: nothing stops it."
    )
    return [make(s, "negative-rare-token", at, 0.85, sentence, proof, chosen=chosen)]


def _sampled_too_often(s: Signals) -> list[Finding]:
    """More tokens with A < 0 and a tiny probability than sampling brings, with a good part of the gradient."""
    tokens, advantage, prob = s.tokens, s.token("advantage"), s.token("prob")
    if tokens is None or advantage is None or prob is None or tokens.square is None:
        return []
    total = tokens.sums(tokens.weight)
    # Two updates on one rollout show the same tokens: those of the first count, and stand for the others.
    fresh = np.ones(s.size, dtype=bool) if tokens.again is None else ~tokens.again
    best, vocabulary = None, s.meta.get("vocabulary")
    for limit in RARE:
        rare = (advantage < 0) & (prob < limit) & (tokens.square > 0)
        here = tokens.sums(tokens.weight, rare)
        # No policy gives tokens below the limit more than the limit each: of a small vocabulary that is a bound.
        mass = vocabulary * limit / 4 if isinstance(vocabulary, int) and vocabulary * limit < SMALL_MASS else 0.0
        at = _surplus(here[fresh], total[fresh], mass)
        if at is None:
            continue
        place = int(np.flatnonzero(fresh)[at])
        drives = tokens.share(rare)[place : place + SEVERAL].max() > DRIVES / 3
        several = here[place : place + SEVERAL].sum() >= SEVERAL + 1  # a policy's rarest tokens come in threes
        if drives and several and (best is None or place < best[0]):
            seen, read = here[fresh][:at].sum(), total[fresh][:at].sum()
            expected = (seen + 0.5) * total[place] / (read + total[place])
            best = place, limit, rare, float(here[place]), float(expected)
    if best is None:
        return []
    at, limit, rare, here_count, usual_count = best
    share = tokens.share(rare)[at]
    proof = [
        s.evidence("prob", at, here_count, usual_count, f"tokens with A < 0 and pi < {limit:g}", "tokens"),
        s.evidence("logit_grad_norm", at, share, None, "their share of the squared gradient", "tokens"),
    ]
    chosen = rare & (tokens.update == at)
    sentence = (
        f"At update {s.steps[at]}, {here_count:.0f} tokens with a negative advantage have a probability below "
        f"{limit:g} ({usual_count:.1f} were to be expected) and make {share:.0%} of the squared gradient"
        f"{heaviest(tokens.named(at, chosen))}."
    )
    return [make(s, "negative-rare-token", at, 0.85, sentence, proof, chosen=chosen)]


def _surplus(here: np.ndarray, total: np.ndarray, mass: float) -> int | None:
    """The first of the updates from which on rare tokens are too many for chance, in one update or in several together.

    here, total: (U,) rare tokens, and all. mass: of rare tokens, what the policy may have given them at least.
    """
    # From all updates before; half a token more, so that none seen is not taken for none possible.
    seen, read = np.r_[0.0, np.cumsum(here)[:-1]], np.r_[0.0, np.cumsum(total)[:-1]]
    rate = np.fmax((seen + 0.5) / np.fmax(read + total, 1.0), mass)  # of tokens
    alone = next((at for at in range(len(here)) if _unlikely(at, at + 1, here, total, rate)), len(here))
    for at in np.flatnonzero(here[:alone] >= 1):  # several before it, without it
        span = int(at), min(int(at) + SEVERAL, alone)
        if _unlikely(*span, here, total, rate) and poisson_tail(int(here[at]), rate[at] * total[at]) < 0.05:
            return int(at)
    return alone if alone < len(here) else None


def _unlikely(at: int, end: int, here: np.ndarray, total: np.ndarray, rate: np.ndarray) -> bool:
    """Whether the rare tokens of updates [at, end) are more than chance brings, by the rate before them."""
    expected = rate[at] * total[at:end].sum()
    found = int(here[at:end].sum())
    return found >= 1 and poisson_tail(found, max(expected, 1e-9)) < UNLIKELY


@lru_cache(maxsize=4096)
def _log_factorial(n: int) -> float:
    return math.lgamma(n + 1)


def poisson_tail(n: int, mean: float) -> float:
    """P(N >= n) of a Poisson number with that mean."""
    if n <= 0:
        return 1.0
    if n > mean + 40 * math.sqrt(mean) + 40:
        return 0.0
    below = sum(math.exp(k * math.log(mean) - mean - _log_factorial(k)) for k in range(n))
    return max(0.0, 1.0 - below)
