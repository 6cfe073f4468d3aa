"""Extreme eigenvalues by bisection on the inertia in extended precision: what logit_hessian.py takes errors against.

It shares nothing with the package: H = diag(-f' p) + U C U^T with U = [e_a, p] is taken as it stands in the definition,
and #{eigenvalues < x} counted by Sylvester's law from D = diag(-f' p) - x and the 2 x 2 matrix M = C^-1 + U^T D^-1 U:

    #negative(H - x) = #negative(D) + #positive(M) - #positive(C).

Exact to 4e-16 on tokens that are not saturated (`certified` says whether); ends below 1e-18 count as 0.
"""

from __future__ import annotations

import mpmath
import numpy as np

WIDE = np.longdouble  # 64 bits of mantissa on x86
HALVINGS = 200


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of one row of float32 logits, (V,)."""
    weights = np.exp(logits.astype(WIDE) - logits.max())
    return weights / weights.sum()


def log_probability(logits: np.ndarray, action: int) -> WIDE:
    """log p_a of one row of float32 logits."""
    shifted = logits.astype(WIDE) - logits.max()
    return shifted[action] - np.log(np.exp(shifted).sum())


def count_below(x: WIDE, p: np.ndarray, a: int, f1: WIDE, f2: WIDE) -> int:
    """Eigenvalues of f'' u u^T - f' S below x."""
    d = -f1 * p - x
    m22 = (p * p / d).sum()
    if f2 == 0:  # C is the number f', on U = [p]
        return int((d < 0).sum()) + int(1 / f1 + m22 > 0) - int(f1 > 0)
    # C = [[f'', -f''], [-f'', f'' + f']], det C = f' f''
    m11 = (f2 + f1) / (f1 * f2) + 1 / d[a]
    m12 = 1 / f1 + p[a] / d[a]
    m22 = 1 / f1 + m22
    return int((d < 0).sum()) + positive(m11, m12, m22) - positive(f2, -f2, f2 + f1)


def positive(a11: WIDE, a12: WIDE, a22: WIDE) -> int:
    """Positive eigenvalues of a symmetric 2 x 2 matrix."""
    if a11 * a22 < a12 * a12:
        return 1
    return 2 if a11 + a22 > 0 else 0


def extremes(logits: np.ndarray, action: int, f1: WIDE, f2: WIDE) -> tuple[float, float]:
    """(lowest, highest) of one token; the number 0 where no eigenvalue lies beyond it."""
    if not np.finfo(WIDE).eps < 1e-18:
        raise RuntimeError("truth: this machine's long double is no wider than float64; run it on x86 Linux.")
    p, slopes = probabilities(logits), (WIDE(f1), WIDE(f2))
    bound = abs(f1) + 2 * abs(f2)  # |S| <= 1/2, |u|^2 <= 2
    lowest = -one_end(lambda x: count_below(-x, p, action, *slopes) >= 1, bound)
    highest = one_end(lambda x: count_below(x, p, action, *slopes) < len(p), bound)
    return float(lowest), float(highest)


def one_end(beyond, bound: float) -> WIDE:
    """The largest x > 0 with an eigenvalue beyond it, to the last digits; 0 where there is none above 1e-18."""
    low, high = WIDE(1e-18), WIDE(bound)
    if not beyond(low):
        return WIDE(0)
    for _ in range(HALVINGS):
        middle = np.sqrt(low * high) if high > 2 * low else (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if beyond(middle) else (low, middle)
    return (low + high) / 2


def certified(logits: np.ndarray, action: int, f1: WIDE, f2: WIDE, *, ends: tuple[float, float]) -> bool:
    """At 60 digits: does the count change between end (1 - 4e-16) and end (1 + 4e-16), at both ends that are not 0?"""
    with mpmath.workdps(60):
        weights = [mpmath.exp(mpmath.mpf(float(z))) for z in logits]
        total = mpmath.fsum(weights)
        p = np.array([weight / total for weight in weights], dtype=object)
        slopes = mpmath.mpf(float(f1)), mpmath.mpf(float(f2))
        for end, wanted in zip(ends, (1, len(p)), strict=True):
            near, far = sorted(mpmath.mpf(end) * (1 + width) for width in (-mpmath.mpf("4e-16"), mpmath.mpf("4e-16")))
            counts = [count_below(x, p, action, *slopes) for x in (near, far)]
            if end != 0 and not counts[0] < wanted <= counts[1]:
                return False
    return True
