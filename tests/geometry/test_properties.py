"""Cases that nobody thought of: random logits, advantages from 1e-8 to 1e8, ratios to 1e6, V from 2."""

from __future__ import annotations

import mpmath
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lcogeom as lg
from tests.geometry.test_spectrum import certify

OBJECTIVES = [
    lg.objective("ppo", clip_low=None, clip_high=None),
    lg.objective("ppo"),
    lg.objective("reinforce"),
    lg.objective("grpo"),
    lg.objective("cispo"),
    lg.objective("k3"),
    lg.objective("entropy"),
    lg.objective("reverse-kl"),
    lg.objective("expected-advantage"),
    lg.objective("ppo-cvx"),
    lg.objective("lco-kld"),
    lg.objective("ppo", clip_low=None, clip_high=None) + 0.01 * lg.objective("forward-kl"),
    lg.objective("ppo") - 0.01 * lg.objective("entropy"),
    lg.objective("reverse-kl") + lg.objective("lco-lch"),
]


@st.composite
def tokens(draw: st.DrawFn) -> tuple[torch.Tensor, lg.TokenBatch]:
    vocab = draw(st.integers(2, 6))
    spread = draw(st.sampled_from([0.0, 1.0, 10.0, 60.0]))
    unit = st.lists(st.floats(-1, 1, width=32), min_size=vocab, max_size=vocab)
    z, old, ref = (torch.tensor([draw(unit)], dtype=torch.float64) for _ in range(3))
    action = draw(st.integers(0, vocab - 1))
    size = 10.0 ** draw(st.floats(-8, 8))
    log_ratio = draw(st.floats(-14, 13.8))
    z = spread * z
    logp = torch.log_softmax(z, 1)[:, action]
    batch = lg.TokenBatch(
        actions=torch.tensor([action]),
        advantages=torch.tensor([draw(st.sampled_from([-1.0, 1.0])) * size], dtype=torch.float64),
        old_logprobs=logp - log_ratio,
        ref_logprobs=(logp + draw(st.floats(-3, 3))).clamp(max=0.0),
        old_logits=z + old,
        ref_logits=z + 3 * ref,
    )
    return z, batch


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tokens(), st.integers(0, len(OBJECTIVES) - 1))
def test_ends_certified_and_consistent(token: tuple[torch.Tensor, lg.TokenBatch], which: int) -> None:
    z, batch = token
    H = OBJECTIVES[which].hessian(z, batch)
    with mpmath.workdps(250):
        certify(H, 0)
    low, high = H.eigenvalue_range()
    size = torch.maximum(low.abs(), high.abs())
    assert (low <= high).all()
    assert ((low < 0) == (H.negative_count() > 0)).all()
    assert (H.negative_count() < z.shape[1] + 1).all()
    off = 1e-12 * size + 1e-15 * (H.fisher.abs() + H.action.abs())  # where terms cancel, their rounding is left
    x = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rayleigh = H.quadratic(x) / x.square().sum(1)
    assert (low - off <= rayleigh).all()
    assert (rayleigh <= high + off).all()
    torch.testing.assert_close((x * (H @ x)).sum(1), H.quadratic(x), rtol=1e-9, atol=float(off.max()))
    assert (H.trace() <= z.shape[1] * (high + off)).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens())
def test_a_sum_is_the_sum_of_the_matrices(token: tuple[torch.Tensor, lg.TokenBatch]) -> None:
    z, batch = token
    parts = [lg.objective("ppo"), lg.objective("entropy"), lg.objective("lco-mse"), lg.objective("reverse-kl")]
    total = parts[0] - 0.25 * parts[1] + 3 * (parts[2] + parts[3])
    weights = (1.0, -0.25, 3.0, 3.0)
    dense = [w * part.hessian(z, batch).dense() for w, part in zip(weights, parts, strict=True)]
    scale = float(sum(d.abs().max() for d in dense))
    torch.testing.assert_close(total.hessian(z, batch).dense(), sum(dense), rtol=1e-12, atol=1e-14 * scale)
    slopes = [w * part.gradient(z, batch) for w, part in zip(weights, parts, strict=True)]
    scale = float(sum(s.abs().max() for s in slopes))
    torch.testing.assert_close(total.gradient(z, batch), sum(slopes), rtol=1e-12, atol=1e-14 * scale)
