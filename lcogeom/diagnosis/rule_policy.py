"""Rules about the policy that updates leave behind, and about numbers that are none."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pandas as pd

from lcogeom.diagnosis.baseline import WINDOW, first, longest_from
from lcogeom.diagnosis.finding import Finding
from lcogeom.diagnosis.making import make, number
from lcogeom.diagnosis.signals import Signals
from lcogeom.runs import BlackBoxEntry

BATCHES = 8
"""Updates whose median is taken."""
COLLAPSED, LEARNED = 0.4, 0.15
"""Of the entropy that the run began with, where rewards did not rise, and where they did: to learn is to grow surer."""
ALIKE = 0.05
"""Cosine of the logit gradients with the vector of ones: rounding leaves 1e-6, a z-loss of 1e-4 about 0.01."""
OUTPUTS = (
    *("lm_head", "embed_out", "embed_tokens", "wte", "embed_in", "output"),
    *("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "ln_out"),
)
"""Names of output matrices, of the input embeddings that are tied to them, and of the normalisation before them."""
DRIFTS, TIMES, LASTS = 0.1, 6.0, 3
"""Nat an update, times what was usual, and updates in a row."""
DRIFT = 5.0
"""Nat that the log normaliser moves: logits of a trained model lie within 10 to 30 of each other."""


def entropy_collapse(s: Signals) -> list[Finding]:
    """Entropy fell to a fraction of what it was, over several batches."""
    entropy = s.get("entropy")
    if entropy is None:
        if s.tokens is not None:
            s.lacks("entropy-collapse", "entropy", "how much the policy still varies")
        return []
    # From batch to batch entropy differs with the problems: medians of several are compared.
    smooth = pd.Series(entropy).rolling(BATCHES, min_periods=BATCHES // 2).median().to_numpy()
    known = entropy[np.isfinite(entropy)]
    if len(known) < 2 * BATCHES:
        return []
    start = float(np.median(known[:BATCHES]))
    limit = LEARNED if _learned(s) else COLLAPSED
    at = first(smooth < limit * start)
    if at is None:
        return []
    high = np.flatnonzero(smooth[:at] >= 0.9 * start)
    begins = int(high[-1]) + 1 if len(high) else at
    proof = [
        s.evidence("entropy", at, smooth[at], start, f"entropy, nat, median of {BATCHES}; at the beginning of the run"),
        s.evidence("entropy", begins, smooth[begins], start, "where its fall began"),
    ]
    sentence = (
        f"Entropy falls from {number(start)} to {number(smooth[at])} nat between updates {s.steps[begins]} and "
        f"{s.steps[at]}: the policy says the same whatever it is asked."
    )
    return [make(s, "entropy-collapse", begins, 0.8, sentence, proof)]


def _learned(s: Signals) -> bool:
    """Whether rewards rose, by more than they scatter: a policy that learns grows surer of itself."""
    reward = s.get("reward")
    if reward is None:
        return False
    known = reward[np.isfinite(reward)]
    part = len(known) // 4
    if part < 4:
        return False
    early, late = known[:part], known[-part:]
    error = float(np.hypot(early.std(), late.std())) / part**0.5
    return float(late.mean() - early.mean()) > 3 * error


def logit_drift(s: Signals) -> list[Finding]:
    """All logits of a token are pushed alike: by the loss, by a head that changes between steps, or in effect."""
    found = [one for rule in (pushed_alike, _output_moves, _normaliser_drifts, _normaliser_moves) for one in rule(s)]
    return sorted(found, key=lambda finding: finding.update)[:1]


def pushed_alike(s: Signals) -> list[Finding]:
    """Gradients of probabilities sum to 0 over the vocabulary: what is left pushes all logits of a token alike."""
    tokens, summed, vocabulary = s.tokens, s.token("logit_grad_sum"), s.meta.get("vocabulary")
    if tokens is None or summed is None or tokens.square is None or not isinstance(vocabulary, int):
        return []
    alike = tokens.sums(tokens.weight * summed**2 / vocabulary)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.sqrt(alike / tokens.sums(tokens.square))
    known = pd.Series(share).shift(1)
    usual_share = known.rolling(WINDOW, min_periods=1).median().fillna(0.0).to_numpy(copy=True)
    if str(s.meta.get("objective")).find("lco-m") >= 0 or str(s.meta.get("objective")).find("lco-lch") >= 0:
        usual_share[0] = np.inf  # these move logits themselves, and sum to something from the first update on
    at = first(share > np.maximum(ALIKE, 3 * usual_share))
    if at is None:
        return []
    level = s.get("logsumexp")
    proof = [
        s.evidence("logit_grad_sum", at, share[at], usual_share[at], "cosine of gradients with (1, ..., 1)", "tokens")
    ]
    if level is not None:
        proof.append(s.evidence("logsumexp", s.size - 1, level[-1], level[at], "log normaliser at the end, and here"))
    sentence = (
        f"From update {s.steps[at]} on the loss pushes all logits of a token alike (a part of {share[at]:.0%} of its "
        "gradient, where a loss of probabilities has none): they drift without changing a probability."
    )
    return [make(s, "logit-drift", at, 0.9, sentence, proof, share=float(share[at] ** 2))]


def is_output(layer: str) -> bool:
    """Whether all logits pass through it last."""
    return layer.rsplit(".", 1)[-1] in OUTPUTS and not re.search(r"\.\d+(\.|$)", layer)


def _output_moves(s: Signals) -> list[Finding]:
    """The output matrix or the normalisation before it, and nothing else, changes between steps, again and again."""
    layers = s.layers
    if layers is None:
        return []
    last = [place for place, name in enumerate(layers.names) if is_output(name)]
    if not last:
        return []
    moved = np.nan_to_num(layers.moved_between, nan=0.0)
    output = moved[:, last].sum(1)
    others = np.delete(moved, last, axis=1).sum(1)
    at = longest_from((output > 0) & (others == 0), 3)
    if at is None:
        return []
    name = layers.names[last[int(moved[at, last].argmax())]]
    proof = [s.evidence("moved_between", at, output[at], 0.0, f"norm of what changes {name} between steps", "norms")]
    level = s.get("logsumexp")
    if level is not None:
        proof.append(s.evidence("logsumexp", s.size - 1, level[-1], level[at], "log normaliser at the end, and here"))
    sentence = (
        f"From update {s.steps[at]} on something other than the optimiser changes {name} after every step, and it "
        "alone: all logits move with it."
    )
    return [make(s, "logit-drift", at, 0.85, sentence, proof, where=name, between=True)]


def _normaliser_drifts(s: Signals) -> list[Finding]:
    """The log normaliser moves one way, update after update, several times as far as it used to.

    From one update to the next on the same rollout, where there are such: other tokens have others.
    """
    level = s.get("logsumexp")
    if level is None:
        return []
    again = None if s.tokens is None else s.tokens.again
    moved = np.r_[np.nan, np.diff(level)]
    places = np.flatnonzero(np.isfinite(moved) & (True if again is None or not again.any() else again))
    moved = moved[places]
    usual_size = pd.Series(np.abs(moved)).shift(1).rolling(WINDOW, min_periods=2).median().to_numpy()
    far = np.abs(moved) > np.fmax(DRIFTS, TIMES * usual_size)
    found = longest_from(far & (moved > 0), LASTS), longest_from(far & (moved < 0), LASTS)
    begin = min((one for one in found if one is not None), default=None)
    if begin is None:
        return []
    at = int(places[begin])
    proof = [
        s.evidence("logsumexp", at, moved[begin], usual_size[begin], "nat that the log normaliser moves; usually"),
        s.evidence("logsumexp", s.size - 1, level[-1], level[at], "log normaliser at the end, and here"),
    ]
    sentence = (
        f"From update {s.steps[at]} on the logits' log normaliser moves one way, by {number(abs(moved[begin]))} nat an "
        f"update where {number(usual_size[begin])} was usual: logits grow or shift together."
    )
    return [make(s, "logit-drift", at, 0.8, sentence, proof)]


def _normaliser_moves(s: Signals) -> list[Finding]:
    """The softmax's log normaliser left its range."""
    level = s.get("logsumexp")
    if level is None:
        if s.token("prob") is not None:
            s.lacks("logit-drift", "logsumexp", "how far logits moved together; record with this version's attach()")
        return []
    known = np.flatnonzero(np.isfinite(level))
    if len(known) < 3:
        return []
    start = float(np.median(level[known[:5]]))
    scatter = 1.4826 * float(np.median(np.abs(np.diff(level[known])))) if len(known) > 3 else 0.0
    off = np.abs(level - start)
    at = first(off > max(DRIFT, 8 * scatter))
    if at is None:
        return []
    inside = np.flatnonzero(off[:at] < max(DRIFT / 5, 3 * scatter))
    begins = int(inside[-1]) + 1 if len(inside) else at
    proof = [s.evidence("logsumexp", at, level[at], start, "log normaliser, nat; at the beginning of the run")]
    sentence = (
        f"From update {s.steps[begins]} on the logits drift together: their log normaliser goes from {number(start)} "
        f"to {number(level[at])} nat by update {s.steps[at]}, which no probability shows."
    )
    return [make(s, "logit-drift", begins, 0.8, sentence, proof)]


def non_finite(s: Signals) -> list[Finding]:
    """The first update with a NaN or an infinity, and the tensor where it began."""
    column = _first_not_finite(s)
    told: list[tuple[int, str, BlackBoxEntry | None]] = [
        (entry.step, entry.reason, entry) for entry in s.black_box if _says_so(entry)
    ]
    told += [(event["step"], event["reason"], None) for event in s.events if _named(event["reason"])]
    step: int | None = None
    reason, entry = "", None
    if told:
        step, reason, entry = min(told, key=lambda one: one[0])
    if column is not None and (step is None or s.steps[column[0]] < step):
        step, entry, reason = int(s.steps[column[0]]), None, ""
    if step is None:
        return []
    at = min(int(np.searchsorted(s.steps, step)), s.size - 1)
    where, proof = None, []
    if reason:
        proof.append(replace(s.evidence("reason", at, reason, None, "what the recorder saw", "black_box"), update=step))
    if entry is not None and entry.first_non_finite is not None:
        one = entry.first_non_finite
        where = f"{one.what} {one.name}"
        proof.append(s.evidence("first_non_finite", at, where, one.kind, "first tensor not finite", "black_box"))
    elif reason.startswith("training raised"):
        where = reason.partition(": ")[2].partition(".")[0]
    if where is None and s.layers is not None and s.steps[at] == step:
        broken = np.flatnonzero(~np.isfinite(s.layers.grad_norm[at]) & np.isfinite(s.layers.grad_norm[:at]).any(0))
        if len(broken):
            where = f"gradient of the parameters of {s.layers.names[int(broken[-1])]}"
            proof.append(s.evidence("grad_norm", at, "not finite", None, where, "norms"))
    if column is not None and s.steps[column[0]] == step:
        proof.append(s.evidence(column[1], at, "not finite", None, f"the column {column[1]}"))
    sentence = f"At update {step} a number is not finite" + (f": first {where}." if where else ".")
    # Logits that are not finite were there before anything was made of them: advantages, ratios, a gradient.
    logprob = s.token("logprob")
    forward = False
    if s.tokens is not None and logprob is not None and s.steps[at] == step:
        forward = not np.isfinite(logprob[s.tokens.rows(at)]).all()
    return [replace(make(s, "non-finite", at, 0.97, sentence, proof, where=where, between=forward), update=step)]


def _first_not_finite(s: Signals) -> tuple[int, str] | None:
    """(index of the first update with a number that is not finite, its column)."""
    found: list[tuple[int, str]] = []
    for name in ("loss", "grad_norm", "grad_norm_clipped", "update_norm", "logit_grad_norm", "weight_norm"):
        values = s.raw(name)
        if values is None:
            continue
        bad = np.isinf(values)
        if name in ("grad_norm_clipped", "update_norm", "weight_norm"):  # never empty by themselves
            before = np.r_[False, np.cumsum(np.isfinite(values))[:-1] > 0]
            bad |= np.isnan(values) & (before | (name == "grad_norm_clipped"))
        at = first(bad)
        found += [] if at is None else [(at, name)]
    logprob = s.token("logprob")
    if s.tokens is not None and logprob is not None:
        at = first(s.tokens.sums(np.ones(len(logprob)), ~np.isfinite(logprob)) > 0)
        found += [] if at is None else [(at, "logprob")]
    return min(found, default=None, key=lambda one: one[0])


def _says_so(entry: BlackBoxEntry) -> bool:
    return entry.first_non_finite is not None or _named(entry.reason)


def _named(reason: str) -> bool:
    words = re.findall(r"[a-z]+", reason.lower())
    return any(word in ("nan", "nans", "inf", "infinite", "infinity") for word in words)
