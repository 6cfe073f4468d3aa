"""Rules about the data of an update: which tokens, whose log-probabilities, which advantages."""

from __future__ import annotations

import numpy as np

from lcogeom.diagnosis.baseline import first, usual
from lcogeom.diagnosis.finding import Finding
from lcogeom.diagnosis.making import make, number
from lcogeom.diagnosis.signals import Signals
from lcogeom.diagnosis.tokens import Tokens

OUTSIDE = 1e-4
"""Of the squared gradient: exactly 0 with a right mask, and rounding leaves less than 1e-6."""
NOTICED = 1e-3
"""Share of the squared gradient from which on tokens are worth a finding."""
TAIL, TAILED = 2, 0.25
"""Repeated tokens at a sequence's end that make a tail, and the share of an update's sequences that end so, all with
one token: a policy that repeats itself does so with tokens of its choice, and stops at the end of sequence."""
TOGETHER, LOOKED, ENOUGH = 3, 48, 24
"""Neighbouring positions that count together, positions looked at, and tokens there in an update."""
SURPRISE = 0.5
"""Nat: mean of -log pi - entropy, which is 0 for tokens that the policy sampled (E[-log pi] is the entropy)."""
APART = 0.03
"""Mean |log r| before any update on a rollout: two engines in bf16 differ by 0.01 to 0.02; PPO's clip is at 0.18."""
FEW = 0.05
"""Of the tokens: single ones may have been put in by hand, or overflow."""
EXACTLY = 3e-4
"""Mean |log r| of a policy that computed the old log-probabilities itself, in float32."""
MIXED = 0.8
"""Share of ratios that are 1 but for rounding, below which a rollout is not that of the policy: saturated tokens' are 1
whatever is wrong."""
SETTLED = 3
"""Rollouts whose ratios were 1 after which a single one whose are not is enough."""
MINIBATCHED = 3
"""Returns to ratios of 1 after minibatches that were apart."""
OUTLIER, EARLY = 3.0, 4.0
"""Times the largest advantage before, and where little is known before. Normalised ones end at sqrt(n - 1) in a batch
of n; healthy runs came to 1.8."""
LARGEST_GROUP = 16
"""Completions of one prompt: common sizes are 4 to 16, and a smaller one would make the chance smaller yet."""
CHANCE = 0.01
"""Of a stretch without signal by bad luck alone, in the whole run."""


def unmasked_tokens(s: Signals) -> list[Finding]:
    """Gradient outside the marked tokens, or marked tokens that no policy sampled."""
    return _outside(s) or _padding(s) or _not_sampled(s)


def _outside(s: Signals) -> list[Finding]:
    share = s.get("outside_share")
    if share is None:
        if s.table == "updates":
            why = "the share of the gradient outside the completions; pass action_mask to probe.batch()"
            s.lacks("unmasked-tokens", "outside_share", why)
        return []
    at = first(share > OUTSIDE)
    if at is None:
        return []
    proof = [s.evidence("outside_share", at, share[at], 0.0, "of the squared gradient lies outside the marked tokens")]
    sentence = (
        f"At update {s.steps[at]}, {share[at]:.1%} of the squared gradient sits on tokens outside the completions "
        "that batch() marked: the loss includes prompt or padding."
    )
    return [make(s, "unmasked-tokens", at, 0.98, sentence, proof, share=float(share[at]))]


def _padding(s: Signals) -> list[Finding]:
    tokens, ids, position = s.tokens, s.token("token_id"), s.token("position")
    if tokens is None or ids is None or position is None or s.token("sequence") is None:
        return []
    order = np.lexsort((position, tokens.sequence))
    sequence, ids = tokens.sequence[order], ids[order]
    starts = np.flatnonzero(np.r_[True, sequence[1:] != sequence[:-1]])
    ends = np.r_[starts[1:], len(sequence)] - 1
    last = ids[ends]
    rows = np.arange(len(sequence))
    other = np.maximum.reduceat(np.where(ids != last[sequence], rows, -1), starts)
    repeats = ends - np.maximum(other, starts - 1) - 1  # of the last token, before it
    tailed = repeats >= TAIL
    update = tokens.update_of_sequence
    sequences = np.bincount(update, minlength=tokens.count)
    found = np.full(tokens.count, np.nan)
    found[sequences > 0] = 0.0
    for token in np.unique(last[tailed]):
        there = np.bincount(update[tailed & (last == token)], minlength=tokens.count)
        found = np.fmax(found, np.where((sequences >= 4) & (there >= 3), there / np.maximum(sequences, 1), 0.0))
    at = first(found > TAILED)
    if at is None:
        return []
    chosen = np.zeros(len(ids), dtype=bool)
    chosen[order] = (rows > other[sequence]) & (rows > starts[sequence]) & tailed[sequence]
    logprob, entropy = s.token("logprob"), s.token("entropy")
    if logprob is not None and entropy is not None:  # a policy that repeats itself is not surprised by it
        surprise = tokens.mean(-logprob - entropy, chosen)
        at = first((found > TAILED) & (surprise > SURPRISE))
        if at is None:
            return []
    if not tokens.share(chosen & (tokens.update == at))[at] > NOTICED:
        return []
    proof = [s.evidence("token_id", at, found[at], 0.0, "of the sequences end in one repeated token", "tokens")]
    sentence = (
        f"At update {s.steps[at]}, {found[at]:.0%} of the sequences end in the same token, repeated: padding is marked "
        "as completion and receives gradient."
    )
    return [make(s, "unmasked-tokens", at, 0.9, sentence, proof, chosen=chosen & (tokens.update == at))]


def _not_sampled(s: Signals) -> list[Finding]:
    """Some marked tokens surprise the policy more than its entropy allows, and sequences have them in common."""
    tokens, logprob, entropy = s.tokens, s.token("logprob"), s.token("entropy")
    position, ids = s.token("position"), s.token("token_id")
    if tokens is None or logprob is None or entropy is None or position is None or s.token("old_logprob") is None:
        return []  # without a behaviour policy (SFT) nobody says that the policy sampled them
    squares = s.token("sum_sq_prob")
    if ids is None or squares is None:
        return []
    excess, agree, expected = (np.zeros(s.size) for _ in range(3))
    begins = np.zeros(s.size, dtype=np.int64)
    for begin in range(0, min(int(position.max()) + 1, LOOKED), TOGETHER):
        some = (position >= begin) & (position < begin + TOGETHER)
        surprise = np.where(tokens.sums(tokens.weight, some) >= ENOUGH, tokens.mean(-logprob - entropy, some), np.nan)
        if not (surprise > SURPRISE).any():
            continue
        alike, chance = _agreement(s, some), tokens.mean(squares, some)  # of two samples of one policy
        better = (surprise > SURPRISE) & (alike - chance > 0.3) & (surprise > excess)
        for values, found in ((excess, surprise), (agree, alike), (expected, chance)):
            values[better] = found[better]
        begins[better] = begin
    at = first(excess > 0)
    if at is None:
        return []
    begin = int(begins[at])
    chosen = (position >= begin) & (position < begin + TOGETHER) & (tokens.update == at)
    if not tokens.share(chosen)[at] > NOTICED:  # a broken policy is sure of odd answers, and has no gradient
        return []
    which = "first" if begin == 0 else f"{begin + 1}th to {begin + TOGETHER}th"
    proof = [
        s.evidence("logprob", at, excess[at], 0.0, "nat more surprise than entropy at those tokens", "tokens"),
        s.evidence("token_id", at, agree[at], expected[at], "of neighbouring sequences are alike there", "tokens"),
    ]
    sentence = (
        f"At update {s.steps[at]} the {which} marked tokens were not sampled by the policy: they surprise it by "
        f"{excess[at]:.1f} nat more than its entropy, and neighbouring sequences share them: prompts or a tool's "
        "answers are in the loss."
    )
    return [make(s, "unmasked-tokens", at, 0.85, sentence, proof, chosen=chosen)]


def _agreement(s: Signals, early: np.ndarray) -> np.ndarray:
    """(U,): how often a token of the chosen rows is that of the next sequence at its place."""
    tokens, ids, position = s.tokens, s.token("token_id"), s.token("position")
    assert tokens is not None
    assert ids is not None
    assert position is not None
    rows = np.flatnonzero(early)
    order = rows[np.lexsort((tokens.sequence[rows], position[rows], tokens.update[rows]))]
    a, b = order[:-1], order[1:]
    pair = (tokens.update[a] == tokens.update[b]) & (position[a] == position[b])
    same = np.bincount(tokens.update[a[pair]], ids[a[pair]] == ids[b[pair]], tokens.count)
    count = np.bincount(tokens.update[a[pair]], minlength=tokens.count)
    return np.where(count >= 6, same / np.maximum(count, 1), np.nan)


def behaviour_mismatch(s: Signals) -> list[Finding]:
    """Ratios that are not 1 on a rollout that no update was made on."""
    tokens, ratio = s.tokens, s.token("ratio")
    if tokens is None or ratio is None:
        if s.get("sampler_gap") is not None:
            return _logged(s, "behaviour-mismatch", "sampler_gap", 10 * APART, "apart from the sampler's, nat a token")
        if s.tokens is not None and s.token("advantage") is not None:
            s.lacks("behaviour-mismatch", "old_logprob", "pass old_logprobs to probe.batch()", "tokens")
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.abs(np.log(ratio))
    apart = tokens.mean(np.where(np.isfinite(log_ratio), log_ratio, np.nan))
    many = tokens.mean((log_ratio > APART / 3).astype(float))
    fresh = np.zeros(s.size, dtype=bool) if tokens.again is None else ~tokens.again
    before = usual(np.where(fresh, np.maximum(apart, 1e-4), np.nan), least=1, prior=0.3)
    jumped = np.isnan(before.level) | (before.excess > np.log(3))
    far = fresh & (apart > APART) & (many > FEW)
    begins = [
        first(far & jumped & (apart > 3 * _within_rollouts(apart, far, fresh))),
        _no_longer_one(apart, fresh, tokens.mean((log_ratio < EXACTLY).astype(float))),
    ]
    at = min((one for one in begins if one is not None), default=None)
    if at is None:
        return []
    level = before.level[at]
    reference = level if np.isfinite(level) else 0.0
    proof = [
        s.evidence("ratio", at, apart[at], reference, "mean |log ratio| on a rollout not trained on yet", "tokens"),
        s.evidence("ratio", at, many[at], 0.0, f"of the tokens are apart by more than {APART / 3:.0%}", "tokens"),
    ]
    sentence = (
        f"At update {s.steps[at]}, on a rollout that no update was made on, the policy differs from the old "
        f"log-probabilities by {apart[at]:.2g} nat a token (before: {number(reference)}): they are not those of the "
        "policy that is trained."
    )
    first_of_run = s.steps[at] == 0 or (np.isfinite(level) and level < APART / 3)
    chosen = (tokens.update == at) & (log_ratio > APART)
    return [make(s, "behaviour-mismatch", at, 0.95 if first_of_run else 0.7, sentence, proof, chosen=chosen)]


def _no_longer_one(apart: np.ndarray, fresh: np.ndarray, exact: np.ndarray) -> int | None:
    """The first of the new rollouts whose ratios are not 1 any more, at all those that follow.

    exact: (U,) share of the tokens whose ratio is 1 but for rounding.
    """
    order = np.flatnonzero(fresh)
    at = np.flatnonzero((apart[order] < EXACTLY) & (exact[order] > 1 - FEW))
    if not len(at):
        return None
    after = order[at[-1] + 1 :]
    before = int(np.diff(at).max(initial=1)) - 1  # minibatches between two of them
    needed = 2 * before + 1 if before else 2 - (len(at) >= SETTLED)
    off = (apart[after] > EXACTLY) & (exact[after] < MIXED)
    return int(after[before]) if len(after) >= max(1, needed) and off.all() else None


def _within_rollouts(apart: np.ndarray, far: np.ndarray, fresh: np.ndarray) -> float:
    """How far minibatches of one rollout move apart from the first of them, where updates are made on such; else 0.

    Then the policy is that of the old log-probabilities again and again, and apart from them in between.
    """
    farthest, ends = 0.0, []
    for place in np.flatnonzero(fresh & (far | (apart < APART / 3))):
        if far[place]:
            farthest = max(farthest, apart[place])
        elif farthest:
            ends.append(farthest)
            farthest = 0.0
    return float(np.median(ends)) if len(ends) >= MINIBATCHED else 0.0


def advantage_outlier(s: Signals) -> list[Finding]:
    """The largest |A| of an update against those of other updates."""
    tokens, advantage = s.tokens, s.token("advantage")
    if tokens is None or advantage is None:
        if s.get("advantage_max") is not None:
            return _logged(s, "advantage-outlier", "advantage_max", None, "largest advantage")
        if s.tokens is not None and s.token("old_logprob") is not None:
            s.lacks("advantage-outlier", "advantage", "pass advantages to probe.batch()", "tokens")
        return []
    size = np.abs(advantage)
    largest = tokens.largest(size)
    positive = np.where(largest > 0, largest, np.nan)
    known = np.isfinite(positive)
    if not known.any():
        return []
    highest = np.fmax.accumulate(np.where(known, positive, 0.0))
    before = np.r_[np.nan, highest[:-1]]
    # The first updates have little or nothing before them: what came after is as good a measure.
    few = np.cumsum(known) <= 3
    typical = np.nanmedian(positive)
    reference = np.where(few, np.fmax(np.nan_to_num(before, nan=0.0), typical), before)
    reference = np.where(few & (np.nan_to_num(before) > EARLY * typical), typical, reference)
    at = first(positive > np.where(few, EARLY, OUTLIER) * reference)
    if at is None:
        return []
    chosen = (tokens.update == at) & (size > max(float(reference[at]), largest[at] / 2))
    share = float(tokens.share(chosen)[at])
    times = largest[at] / reference[at]
    proof = [
        s.evidence("advantage", at, largest[at], reference[at], f"largest |A|, {times:.3g} times any before", "tokens")
    ]
    numbers = s.token("sequence")
    who = np.unique(numbers[chosen]) if numbers is not None else np.array([])
    where = f"sequence {int(who[0])}" if len(who) == 1 else None
    sentence = (
        f"At update {s.steps[at]} an advantage of size {number(largest[at])} appears{f' in {where}' if where else ''}, "
        f"{times:.3g} times the largest usual one; its tokens make {share:.0%} of the squared gradient."
    )
    return [make(s, "advantage-outlier", at, 0.95, sentence, proof, share=share, where=where, chosen=chosen)]


def _logged(s: Signals, cause: str, column: str, limit: float | None, says: str) -> list[Finding]:
    """From one number of a plain log: above a limit, or EARLY times what it ever was before."""
    values = s.get(column)
    assert values is not None
    before = np.r_[np.nan, np.fmax.accumulate(np.nan_to_num(values, nan=0.0))[:-1]]
    known = np.cumsum(np.isfinite(values)) > 3
    at = first(values > limit) if limit is not None else first(known & (before > 0) & (values > EARLY * before))
    if at is None:
        return []
    reference = limit if limit is not None else before[at]
    proof = [s.evidence(column, at, values[at], reference, says)]
    sentence = (
        f"At update {s.steps[at]} the log's {column} is {number(values[at])} ({says}; against {number(reference)})."
    )
    return [make(s, cause, at, 0.6, sentence, proof)]


def no_signal(s: Signals) -> list[Finding]:
    """A stretch of updates whose advantages, or gradients, are all exactly zero, too long to be bad luck."""
    tokens, advantage = s.tokens, s.token("advantage")
    zero, told, flat = (np.zeros(s.size, dtype=bool) for _ in range(3))
    if tokens is not None and advantage is not None:
        largest = tokens.largest(np.abs(advantage))
        told = np.isfinite(largest)
        zero |= told & (largest < 1e-8)  # normalising by a deviation of 0 + 1e-4 leaves rounding
    for name in ("logit_grad_norm", "grad_norm"):
        values = s.get(name)
        if values is not None:
            flat |= values == 0
    zero |= flat & ~told
    share = s.get("zero_signal_share")
    if share is not None:
        zero |= share >= 1
    fresh = np.ones(s.size, dtype=bool) if tokens is None or tokens.again is None else ~tokens.again
    at, length, rate = _too_long(zero, fresh, _share_without(s, zero))
    if at is not None:
        column, table = ("advantage", "tokens") if told[at] else ("grad_norm", None)
        proof = [s.evidence(column, at, 0.0, None, f"zero for {length} rollouts in a row", table)]
        if not told[at] and share is not None and share[at] >= 1:
            proof = [s.evidence("zero_signal_share", at, share[at], None, f"for {length} updates in a row")]
        sentence = (
            f"From update {s.steps[at]} on, {length} rollouts in a row have no advantage at all (chance leaves "
            f"{rate:.1%} of rollouts without): all completions score alike, and the updates teach nothing."
        )
        return [make(s, "no-signal", at, 0.95, sentence, proof)]
    # Advantages there are, and nothing of them arrives, on new rollouts too, where none is clipped.
    at, length, rate = _too_long(flat & told, fresh, 1.0)
    if at is None:
        return []
    proof = [s.evidence("grad_norm", at, 0.0, None, f"zero for {length} rollouts in a row, though advantages are not")]
    sentence = (
        f"From update {s.steps[at]} on, the gradient of {length} rollouts in a row is exactly zero, though their "
        "advantages are not: what is minimised does not depend on the model (a mask that is empty, a tensor that was "
        "detached), and the updates teach nothing."
    )
    return [make(s, "no-signal", at, 0.85, sentence, proof)]


def _too_long(zero: np.ndarray, fresh: np.ndarray, by_group: float) -> tuple[int | None, int, float]:
    """(where a stretch of zeros too long for chance begins, its rollouts, the chance that one rollout has none)."""
    for at in np.flatnonzero(zero & ~np.r_[False, zero[:-1]]):
        stop = at + int(np.argmin(np.r_[zero[at:], False]))
        length = int(fresh[at:stop].sum())
        elsewhere = fresh.copy()
        elsewhere[at:stop] = False
        # Share of rollouts without signal otherwise; one in four of four more where little is known.
        rate = min((np.sum(zero & elsewhere) + 1) / (np.sum(elsewhere) + 4), by_group)
        if length >= 2 and fresh.sum() * rate**length < CHANCE:
            return int(at), length, rate
    return None, 0, 1.0


def _share_without(s: Signals, zero: np.ndarray) -> float:
    """The chance that no group of a rollout has an advantage, from how often one has none; 1 if that is not known."""
    tokens, advantage = s.tokens, s.token("advantage")
    if tokens is None or advantage is None:
        return 1.0
    size = np.bincount(tokens.sequence, np.abs(np.nan_to_num(advantage)))
    other = ~zero[tokens.update_of_sequence]
    without = float((size[other] < 1e-8).mean()) if other.any() else 0.0
    if without == 0:  # normalised over the batch, not in groups
        return 1.0
    sequences = float(np.median(np.bincount(tokens.update_of_sequence, minlength=tokens.count)))
    return without ** max(1.0, sequences / _group_size(tokens, advantage))


def _group_size(tokens: Tokens, advantage: np.ndarray) -> int:
    """Completions that are each other's baseline, whose advantages sum to 0; LARGEST_GROUP where that is not seen."""
    count = np.maximum(np.bincount(tokens.sequence), 1)
    mean = np.bincount(tokens.sequence, np.nan_to_num(advantage)) / count
    by_update = np.split(mean, np.flatnonzero(np.diff(tokens.update_of_sequence)) + 1)
    size = len(by_update[0])
    if any(len(own) != size for own in by_update):  # some sequences have no token in the record
        return LARGEST_GROUP
    all_of_them, largest = np.array(by_update), np.abs(mean).max()
    for group in range(2, min(size, LARGEST_GROUP) + 1):
        if size % group == 0 and np.abs(all_of_them.reshape(-1, group).sum(1)).max() < 1e-3 * largest:
            return group
    return LARGEST_GROUP
