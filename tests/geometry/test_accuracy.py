"""Saturated tokens, where float64 double backward has no digits left: 60-digit arithmetic is the oracle."""

from __future__ import annotations

import mpmath
import pytest
import torch

from lcogeom.geometry.hessian import action_hessian
from lcogeom.geometry.softmax import token_distribution

VOCAB = 6


@pytest.mark.parametrize("gap", [1.0, 30.0, 60.0, 300.0])
@pytest.mark.parametrize("action", [0, 3])
def test_relative_accuracy_at_any_saturation(gap: float, action: int) -> None:
    z = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)[None].clone()
    z[0, 0] = 1 + gap
    x = torch.sin(torch.arange(VOCAB, dtype=torch.float64))[None]
    d1, d2 = torch.tensor([-1.5], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    distribution = token_distribution(z, torch.tensor([action]))
    H = action_hessian(distribution, d1, d2)

    with mpmath.workdps(60 + int(gap)):
        weights = [mpmath.exp(mpmath.mpf(v)) for v in z[0].tolist()]
        p = [w / mpmath.fsum(weights) for w in weights]
        u = [(1 if j == action else 0) - p[j] for j in range(VOCAB)]
        exact = mpmath.matrix(VOCAB, VOCAB)
        for i in range(VOCAB):
            for j in range(VOCAB):
                fisher = (p[i] if i == j else 0) - p[i] * p[j]
                exact[i, j] = mpmath.mpf(0.7) * u[i] * u[j] + mpmath.mpf(1.5) * fisher
        v = [mpmath.mpf(value) for value in x[0].tolist()]
        product = [mpmath.fsum(exact[i, j] * v[j] for j in range(VOCAB)) for i in range(VOCAB)]
        quadratic = mpmath.fsum(v[i] * product[i] for i in range(VOCAB))

        def error(found: torch.Tensor, wanted: list) -> float:
            pairs = zip(found.flatten().tolist(), wanted, strict=True)
            return float(max(abs((mpmath.mpf(a) - b) / b) for a, b in pairs))

        # exp(z) is conditioned by the size of z: a rounding of the logit gap is a relative error of the probability.
        unit = 2.0**-52 * (4 + gap)
        assert error(distribution.direction(), u) < unit
        assert error(distribution.logprobs, [mpmath.log(p[action])]) < unit
        assert error(H.diagonal(), [exact[i, i] for i in range(VOCAB)]) < 10 * unit
        assert error(H.dense(), list(exact)) < 10 * unit
        assert error(H.quadratic(x), [quadratic]) < 20 * unit
        assert error(H @ x, product) < 20 * unit
