"""KL(before || after) against its definition in multiple precision (mpmath), and its aggregates against plain loops."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch import Tensor

import lcogeom as lg
from tests.cases import LOGITS, TOKENS, make_logits

# V rounding units of the logits' own differences and of two sums of V positive terms; the worst seen is 8e-15.
TOLERANCE = 2e-14


def exact_kl(before: Tensor, after: Tensor, digits: int = 80) -> list[mpmath.mpf]:
    """sum_j p_j (log p_j - log p'_j) of each row. It cancels: a KL of 1e-n needs n digits more than are asked for."""
    found = []
    with mpmath.workdps(digits):
        for row, moved in zip(before.double().tolist(), after.double().tolist(), strict=True):
            logs = []
            for logits in (row, moved):
                z = [mpmath.mpf(value) for value in logits]
                norm = mpmath.log(mpmath.fsum(mpmath.exp(value) for value in z))
                logs.append([value - norm for value in z])
            found.append(mpmath.fsum(mpmath.exp(p) * (p - q) for p, q in zip(*logs, strict=True)))
    return found


def worst_error(before: Tensor, after: Tensor, digits: int = 80) -> float:
    """Largest relative error of `lg.token_kl`."""
    exact = exact_kl(before, after, digits)
    return max(
        abs(float((found - true) / true)) if true else abs(found)
        for found, true in zip(lg.token_kl(before, after).tolist(), exact, strict=True)
    )


@pytest.mark.parametrize("size", [1e-14, 1e-8, 1e-3, 0.3, 1.0, 8.0, 60.0])
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("vocab", [2, 17, 200])
def test_every_digit(vocab: int, kind: str, size: float) -> None:
    """KLs from 1e-55 to 1e3: displacements are exact in float64, so the KL is as exact as its sums."""
    rng = torch.Generator().manual_seed(vocab)
    before = make_logits(kind, vocab, rng)
    after = before + size * torch.randn(TOKENS, vocab, generator=rng, dtype=torch.float64)
    assert worst_error(before, after) < TOLERANCE


def test_tiny_kl_is_not_rounding() -> None:
    """1e-12 and far below, where p (log p - log p') has no digit left."""
    before = torch.randn(4, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    after = before + 1e-9 * torch.randn(4, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logp, logq = before.log_softmax(1), after.log_softmax(1)
    naive = (logp.exp() * (logp - logq)).sum(1)
    true = torch.tensor([float(value) for value in exact_kl(before, after)])
    assert ((naive - true).abs() / true).max() > 1  # or the test shows nothing
    assert true.max() < 1e-17
    assert worst_error(before, after) < TOLERANCE


@pytest.mark.parametrize("top", [60.0, 600.0, 1000.0])
def test_saturated_token_that_loses_its_mass(top: float) -> None:
    """An id of probability e^-top, 0 in float64 beyond 745, rises by more than e^x holds."""
    before = torch.tensor([[top, 0.0, -1.0]] * 4, dtype=torch.float64)
    after = before.clone()
    after[0, 1] += top - 1
    after[1, 1] += top + 30
    after[2, 1] += top - 40
    after[3, 1] += 1e-3
    if top > 700:
        after[3, 1] += top  # below e^-745 nothing small can be seen: the KL itself underflows
    assert worst_error(before, after, digits=500) < TOLERANCE


def test_a_kl_of_thousands() -> None:
    """The likeliest id falls by 2000: e^x overflows, the KL does not."""
    before = torch.tensor([[3.0, 1.0, -2.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    after = before - torch.tensor([[2000.0, 0.0, 0.0], [1e6, 1e5, 0.0]], dtype=torch.float64)
    assert lg.token_kl(before, after).min() > 1000
    assert worst_error(before, after) < TOLERANCE


@pytest.mark.parametrize(("top", "size"), [(60.0, 2.0**-17), (30.0, 2.0**-24)])
def test_small_steps_that_nothing_but_the_rare_ids_make(top: float, size: float) -> None:
    """p_a = 1 - e^-top and all ids rise by 0.3, the others by 1e-5 or 1e-7 more or less: the 0.3 rounds away."""
    before = torch.tensor([[top, 0.0, 0.0]], dtype=torch.float64)
    after = before + torch.tensor([[0.3, 0.3 + size, 0.3 - 2 * size]], dtype=torch.float64)
    assert lg.token_kl(before, after).item() < 1e-25
    assert worst_error(before, after) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_other_types(dtype: torch.dtype) -> None:
    """The KL of the numbers given, whatever they are rounded to; float32 differences are exact in float64."""
    rng = torch.Generator().manual_seed(3)
    before = (3 * torch.randn(TOKENS, 50, generator=rng)).to(dtype)
    after = (before.float() + 0.01 * torch.randn(TOKENS, 50, generator=rng) + 7).to(dtype)
    assert worst_error(before, after) < TOLERANCE
    assert lg.token_kl(before, after).dtype == torch.float64


def test_what_does_not_change_the_policy() -> None:
    before = 5 * torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lg.token_kl(before, before), torch.zeros(3, dtype=torch.float64))
    assert lg.token_kl(before.double(), before.double() + 2.0).max() < 1e-28
    masked = before.clone()
    masked[:, 5:] = torch.finfo(torch.float32).min  # ids that may not be sampled
    moved = masked.clone()
    moved[:, 0] += 0.5
    torch.testing.assert_close(lg.token_kl(masked, moved), lg.token_kl(before[:, :5], moved[:, :5]), rtol=1e-13, atol=0)


def test_half_of_the_variance_to_second_order() -> None:
    """KL / (1/2 Var_p(dz)) -> 1, its error halving with the step (method.md, 3)."""
    rng = torch.Generator().manual_seed(5)
    before, step = torch.randn(2, 6, 30, generator=rng, dtype=torch.float64)
    p = before.softmax(1)
    variance = (p * (step - (p * step).sum(1, keepdim=True)).square()).sum(1)
    gaps = [(lg.token_kl(before, before + t * step) / (t**2 * variance / 2) - 1).abs() for t in (1e-4, 5e-5)]
    assert gaps[0].max() < 1e-3
    torch.testing.assert_close(gaps[0] / gaps[1], torch.full((6,), 2.0, dtype=torch.float64), rtol=1e-2, atol=0)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_block_size_does_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(2)
    before, after = torch.randn(2, 9, 7, generator=rng)
    expected = lg.token_kl(before, after)
    monkeypatch.setattr("lcogeom.geometry.softmax.CPU_BLOCK", block)
    torch.testing.assert_close(lg.token_kl(before, after), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mask", [None, [1, 0, 1, 1, 0, 0]])
def test_sequences_and_update(mask: list[int] | None, device: torch.device) -> None:
    rng = torch.Generator().manual_seed(4)
    before, after = torch.randn(2, 6, 11, generator=rng).to(device)
    sequences = [8, 2, 8, 2, 5, 8]  # neither sorted nor contiguous; the mask leaves nothing of completion 5
    found = lg.update_kl(
        before,
        after,
        mask=None if mask is None else torch.tensor(mask, device=device),
        sequences=torch.tensor(sequences, device=device),
    )
    values = [float(value) for value in exact_kl(before.cpu(), after.cpu())]
    live = [True] * 6 if mask is None else [bool(one) for one in mask]
    groups = {
        name: [v for v, s, on in zip(values, sequences, live, strict=True) if s == name and on] for name in (2, 5, 8)
    }
    kept = [v for v, on in zip(values, live, strict=True) if on]
    assert found.sequence_ids.tolist() == [2, 5, 8]
    assert found.token.tolist() == pytest.approx(
        [v if on else 0 for v, on in zip(values, live, strict=True)], rel=1e-13
    )
    assert found.sequence_sum.tolist() == pytest.approx([sum(group) for group in groups.values()], rel=1e-13)
    means = [sum(group) / len(group) if group else 0 for group in groups.values()]
    assert found.sequence_mean.tolist() == pytest.approx(means, rel=1e-13)
    assert (found.total.item(), found.mean.item()) == pytest.approx((sum(kept), sum(kept) / len(kept)), rel=1e-13)
    assert lg.update_kl(before, after).sequence_mean is None


def test_bad_input() -> None:
    good = torch.zeros(3, 5)
    broken = good.clone()
    broken[1, 2] = float("-inf")
    for before, after, message in (
        (good, torch.zeros(3, 4), r"before, after: shapes \(3, 5\) and \(3, 4\)"),
        (good[0], good[0], r"must be \(N, V\)"),
        (broken, good, "before: token 1 holds"),
        (good, broken, "after: token 1 holds"),
    ):
        with pytest.raises(ValueError, match=message):
            lg.token_kl(before, after)
    for name in ("mask", "sequences"):
        with pytest.raises(ValueError, match=rf"{name}: shape \(2,\); must be \(3,\)"):
            lg.update_kl(good, good, **{name: torch.ones(2, dtype=torch.long)})
