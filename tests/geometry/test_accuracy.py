"""Saturated tokens, where float64 double backward has no digits left: arithmetic with 140 digits is the oracle."""

from __future__ import annotations

import mpmath
import pytest
import torch

from lcogeom.geometry.hessian import action_hessian
from lcogeom.geometry.softmax import token_distribution

VOCAB = 6
TOKENS = 60  # many, because some roundings hurt one token in ten only


def error(found: torch.Tensor, wanted: list[mpmath.mpf]) -> float:
    """The largest relative error of any entry."""
    pairs = zip(found.flatten().tolist(), wanted, strict=True)
    return float(max(abs((mpmath.mpf(a) - b) / b) for a, b in pairs))


@pytest.mark.parametrize("gap", [1.0, 30.0, 60.0, 300.0])
@pytest.mark.parametrize("action", [0, 3])
def test_relative_accuracy_at_any_saturation(gap: float, action: int) -> None:
    rng = torch.Generator().manual_seed(int(gap))
    z, x = torch.randn(2, TOKENS, VOCAB, generator=rng, dtype=torch.float64)
    z[:, 0] = z[:, 1:].max(dim=1).values + gap
    d1 = -0.1 - torch.rand(TOKENS, generator=rng, dtype=torch.float64)
    d2 = torch.rand(TOKENS, generator=rng, dtype=torch.float64)
    actions = torch.full((TOKENS,), action)
    distribution = token_distribution(z, actions)
    H = action_hessian(z, actions, d1, d2)
    found = {
        "direction": distribution.direction(),
        "logprobs": distribution.logprobs,
        "odds": distribution.odds_against(),
        "diagonal": H.diagonal(),
        "dense": H.dense(),
        "quadratic": H.quadratic(x),
        "product": H @ x,
    }
    worst = dict.fromkeys(found, 0.0)
    with mpmath.workdps(140 + int(gap)):
        for n in range(TOKENS):
            weights = [mpmath.exp(mpmath.mpf(v)) for v in z[n].tolist()]
            p = [w / mpmath.fsum(weights) for w in weights]
            u = [(1 if j == action else 0) - p[j] for j in range(VOCAB)]
            slope, bend = mpmath.mpf(d1[n].item()), mpmath.mpf(d2[n].item())
            exact = [
                [bend * u[i] * u[j] - slope * ((p[i] if i == j else 0) - p[i] * p[j]) for j in range(VOCAB)]
                for i in range(VOCAB)
            ]
            v = [mpmath.mpf(value) for value in x[n].tolist()]
            product = [mpmath.fsum(exact[i][j] * v[j] for j in range(VOCAB)) for i in range(VOCAB)]
            wanted = {
                "direction": u,
                "logprobs": [mpmath.log(p[action])],
                "odds": [(1 - p[action]) / p[action]],
                "diagonal": [exact[i][i] for i in range(VOCAB)],
                "dense": [entry for row in exact for entry in row],
                "quadratic": [mpmath.fsum(a * b for a, b in zip(v, product, strict=True))],
                "product": product,
            }
            for name, values in wanted.items():
                worst[name] = max(worst[name], error(found[name][n], values))
    # exp(z) is conditioned by the size of z: a rounding of the logit gap is a relative error of the probability.
    unit = 2.0**-52 * (4 + gap)
    for name in ("direction", "logprobs", "odds"):
        assert worst[name] < unit, name
    for name in (
        "diagonal",
        "dense",
        "quadratic",
    ):  # dense: p_i w_j against p_i p_j sum(w), 1 / (1 - p_a) of the result
        assert worst[name] < (60 if name == "dense" else 20) * unit, name
    assert worst["product"] < 1e-10  # entries may cancel truly, where x_j is close to the mean of x
