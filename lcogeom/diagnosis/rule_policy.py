"""Rules about the policy that updates leave behind, and about numbers that are none."""

from __future__ import annotations


import numpy as np

from lcogeom.diagnosis.baseline import first
from lcogeom.diagnosis.finding import Finding
from lcogeom.diagnosis.making import make, number
from lcogeom.diagnosis.signals import Signals

COLLAPSED = 0.1
"""Of the entropy that the run began with; learning sharpens a policy too, but leaves more or takes longer."""
DRIFT = 5.0
"""Nat that the log normaliser moves: logits of a trained model lie within 10 to 30 of each other."""


def entropy_collapse(s: Signals) -> list[Finding]:
    """Entropy fell to a tenth of what it was."""
    entropy = s.get("entropy")
    if entropy is None:
        if s.tokens is not None:
            s.lacks("entropy-collapse", "entropy", "how much the policy still varies")
        return []
    known = np.flatnonzero(np.isfinite(entropy))
    if len(known) < 3:
        return []
    start = float(np.median(entropy[known[:5]]))
    smooth = np.fmin(entropy, np.r_[entropy[1:], np.nan])
    low = (np.fmax(entropy, smooth) < COLLAPSED * start) & np.isfinite(entropy)
    at = first(low)
    if at is None:
        return []
    # The fall began where entropy last was near its usual value.
    high = np.flatnonzero(entropy[:at] > 0.5 * start)
    begins = int(high[-1]) + 1 if len(high) else at
    proof = [
        s.evidence("entropy", at, entropy[at], start, "entropy, nat; at the beginning of the run"),
        s.evidence("entropy", begins, entropy[begins], start, "where its fall began"),
    ]
    sentence = (
        f"Entropy falls from {number(start)} to {number(entropy[at])} nat between updates {s.steps[begins]} and "
        f"{s.steps[at]}: the policy says the same whatever it is asked."
    )
    return [make(s, "entropy-collapse", begins, 0.8, sentence, proof)]


def logit_drift(s: Signals) -> list[Finding]:
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
        f"From update {s.steps[begins]} on the logits drift together: their log normaliser goes from {number(start)} to "
        f"{number(level[at])} nat by update {s.steps[at]}, which no probability shows."
    )
    return [make(s, "logit-drift", begins, 0.8, sentence, proof)]


def non_finite(s: Signals) -> list[Finding]:
    """The first update with a NaN or an infinity, and the tensor where it began."""
    bad, column = np.zeros(s.size, dtype=bool), {}
    for name in ("loss", "grad_norm", "grad_norm_clipped", "update_norm", "logit_grad_norm", "weight_norm"):
        values = s.get(name)
        if values is None and name in s.updates and len(s.updates):
            values = s.updates[name].to_numpy(dtype=np.float64, na_value=np.nan)
            values = values if name == "grad_norm_clipped" else None  # a column that is all empty was not recorded
        if values is None:
            continue
        infinite = np.isinf(values)
        if name in ("grad_norm_clipped", "update_norm", "weight_norm"):
            infinite |= np.isnan(values) & _goes_on(values)
        for place in np.flatnonzero(infinite & ~bad):
            column[int(place)] = name
        bad |= infinite
    prob = s.token("logprob")
    if s.tokens is not None and prob is not None:
        lost = s.tokens.sums(np.ones(len(prob)), np.isnan(prob)) > 0
        for place in np.flatnonzero(lost & ~bad):
            column[int(place)] = "logprob"
        bad |= lost
    entries = [e for e in s.black_box if e.first_non_finite is not None or _says_so(e.reason)]
    at = first(bad)
    entry = entries[0] if entries else None
    if entry is not None and (at is None or entry.step <= s.steps[at]):
        at = int(np.searchsorted(s.steps, entry.step))
        step = entry.step
    elif at is not None:
        step = int(s.steps[at])
    else:
        return []
    inside = min(at, s.size - 1)
    where, proof = None, []
    if entry is not None and entry.step == step:
        proof.append(s.evidence("reason", inside, entry.reason, None, "from the black box", "black_box"))
        if entry.first_non_finite is not None:
            one = entry.first_non_finite
            where = f"{one.what} {one.name}"
            proof.append(
                s.evidence("first_non_finite", inside, where, one.kind, "first tensor not finite", "black_box")
            )
    if where is None and s.layers is not None and at < s.size:
        broken = np.flatnonzero(~np.isfinite(s.layers.grad_norm[at]) & np.isfinite(s.layers.grad_norm[:at]).any(0))
        if len(broken):
            where = f"gradient of the parameters of {s.layers.names[int(broken[-1])]}"
            proof.append(s.evidence("grad_norm", at, "not finite", None, where, "norms"))
    if at in column:
        proof.append(s.evidence(column[at], at, "not finite", None, f"the column {column[at]}"))
    sentence = f"At update {step} a number is not finite" + (f": first {where}." if where else ".")
    found = make(s, "non-finite", inside, 0.97, sentence, proof, where=where)
    return [found if found.update == step else _moved(found, step)]


def _moved(finding: Finding, step: int) -> Finding:
    from dataclasses import replace

    return replace(finding, update=step)  # the update that has no row, because training stopped in it


def _goes_on(values: np.ndarray) -> np.ndarray:
    """Whether a value was known before: an empty cell then is a NaN, not a column that begins later."""
    return np.r_[False, np.cumsum(np.isfinite(values))[:-1] > 0] | np.isnan(values).all()


def _says_so(reason: str) -> bool:
    return any(f" {word}" in f" {reason}".replace(",", " ") for word in ("nan", "inf", "-inf"))
