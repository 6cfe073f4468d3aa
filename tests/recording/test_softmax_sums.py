"""The one pass over the logits against the plain softmax, in high precision where float64 itself cancels."""

from __future__ import annotations

import mpmath
import pytest
import torch

from lcogeom.recording import softmax_sums as module
from lcogeom.recording.softmax_sums import softmax_sums


def rows(kind: str, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (6, V) and actions."""
    rng = torch.Generator().manual_seed(vocabulary)
    z = torch.randn(6, vocabulary, generator=rng, dtype=torch.float64)
    actions = torch.randint(0, vocabulary, (6,), generator=rng)
    if kind == "saturated":  # by the action in three rows, by another token in three
        at = torch.where(torch.arange(6) < 3, actions, (actions + 1) % vocabulary)
        z[torch.arange(6), at] += torch.tensor([30.0, 100.0, 800.0, 30.0, 100.0, 800.0], dtype=torch.float64)
    if kind == "tied":
        z = torch.full_like(z, 3.0)
    if kind == "masked" and vocabulary > 2:
        z[:, 1::2] = -torch.inf
        actions -= actions % 2
    return z, actions


@pytest.mark.parametrize("together", [4, 2**20])
@pytest.mark.parametrize("kind", ["plain", "saturated", "tied", "masked"])
@pytest.mark.parametrize("vocabulary", [2, 3, 50])
def test_against_high_precision(
    kind: str, vocabulary: int, together: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(module, "CPU_ELEMENTS", together)
    z, actions = rows(kind, vocabulary)
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    others = torch.empty(z.shape, device=device, dtype=torch.float64)
    found = softmax_sums(z.to(device), actions.to(device), g.to(device), others)
    with mpmath.workdps(400):
        for row, (logits, a) in enumerate(zip(z.tolist(), actions.tolist(), strict=True)):
            weights = [mpmath.exp(mpmath.mpf(value)) for value in logits]
            p = [weight / sum(weights) for weight in weights]
            rest = sum(weights) - weights[a]
            s = [-weight / rest for weight in weights]
            s[a] = mpmath.mpf(1)
            wanted = {
                "logprobs": mpmath.log(p[a]),
                "log_odds": mpmath.log(rest / weights[a]),
                "complement": rest / sum(weights),
                "entropy": -sum(x * mpmath.log(x) for x in p if x),
                "sum_sq_prob": sum(x * x for x in p),
                "direction_norm": mpmath.sqrt(sum(x * x for x in s)),
                "seen_along": sum(x * y for x, y in zip(s, g[row].tolist(), strict=True)),
            }
            seen = [mpmath.mpf(x) for x in g[row].tolist()]
            slope = wanted["seen_along"] / wanted["direction_norm"] ** 2
            wanted["seen_rest"] = sum((x - slope * y) ** 2 for x, y in zip(seen, s, strict=True))
            for name, value in wanted.items():
                attribute = getattr(found, name)
                got = float((attribute() if callable(attribute) else attribute)[row])
                scale = {"seen_along": 1.0, "seen_rest": 1.0, "entropy": 1e-2}.get(
                    name, 0.0
                )  # where others saturate, 1e-16 is lost
                assert got == pytest.approx(float(value), rel=1e-13, abs=1e-13 * scale + 1e-300), (name, row)
            assert others[row].cpu().tolist() == pytest.approx([0.0 if j == a else float(-x) for j, x in enumerate(s)])


@pytest.mark.parametrize("kind", ["plain", "saturated", "tied", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_logits_lose_no_more_than_float32(dtype: torch.dtype, kind: str, device: torch.device) -> None:
    """Against float64 sums of the same numbers; gradients are those of a loss of log pi and a tenth of noise."""
    z, actions = rows(kind, 5000)
    low, actions = z.to(device, dtype), actions.to(device)
    slopes = torch.softmax(low.double(), 1) - torch.nn.functional.one_hot(actions, 5000)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(device)
    g = (slopes + 0.1 * slopes.norm(dim=1, keepdim=True) * noise / 5000**0.5).to(dtype)
    found, exact = softmax_sums(low, actions, g), softmax_sums(low.double(), actions, g.double())
    close = {"rtol": 3e-6, "atol": 1e-44}  # where float32 ends
    for name in ("log_odds", "others_squares", "seen_along", "seen_rest"):
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), **close)
    for name in ("logprobs", "complement", "sum_sq_prob", "direction_norm"):
        torch.testing.assert_close(getattr(found, name)(), getattr(exact, name)(), **close)
    torch.testing.assert_close(found.entropy(), exact.entropy(), rtol=3e-6, atol=1e-6)


def test_what_is_left_of_a_gradient_is_seen_where_it_is_small(device: torch.device) -> None:
    """A part in 10^6 that is no slope of log pi: differences of squares in float32 would lose it."""
    z, actions = rows("plain", 5000)
    z, actions = z.float().to(device), actions.to(device)
    slopes = torch.softmax(z.double(), 1) - torch.nn.functional.one_hot(actions, 5000)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    g = slopes + 1e-6 * slopes.norm(dim=1, keepdim=True) * noise / 5000**0.5
    misfit = (softmax_sums(z, actions, g.float()).seen_rest / g.square().sum(1)).sqrt()
    torch.testing.assert_close(misfit, torch.full_like(misfit, 1e-6), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_rows_are_nan_and_the_others_are_not(value: float, device: torch.device) -> None:
    z, actions = rows("plain", 50)
    z[2, (actions[2] + 1) % 50] = value
    found = softmax_sums(z.to(device), actions.to(device))
    assert found.logprobs().isnan().tolist() == [False, False, True, False, False, False]
    assert found.entropy().isnan().tolist() == [False, False, True, False, False, False]


def test_threads_change_nothing() -> None:
    z, actions = rows("plain", 50)
    many, at = z.repeat(2000, 1), actions.repeat(2000)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(softmax_sums(many, at, many))
    finally:
        torch.set_num_threads(threads)
    for name in ("log_odds", "others_entropy", "seen_along", "seen_rest"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))


def test_buffers_that_are_kept_change_no_earlier_result(device: torch.device) -> None:
    """Two batches of one shape, the first one within inference mode, where tensors cannot be written to later."""
    z, actions = (part.to(device) for part in rows("plain", 50))
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    with torch.inference_mode():
        first = softmax_sums(z, actions, g)
    again = [softmax_sums(z, actions, g), softmax_sums(2 * z, actions, -g), softmax_sums(z, actions, g)]
    for one in (again[0], again[2]):
        for name in ("log_odds", "others_entropy", "others_squares", "seen_along", "seen_rest", "seen_sum"):
            assert torch.equal(getattr(one, name), getattr(first, name))
    assert not torch.equal(again[1].log_odds, first.log_odds)


@pytest.mark.parametrize("size", [1.0, 1e-8, 1e-10, 1e-30])
def test_small_gradients_are_told_from_others_as_large_ones_are(size: float, device: torch.device) -> None:
    """Along s, the residual is rounding; off it by a tenth, it is a tenth: whatever the gradient's size."""
    z, actions = (part.to(device) for part in rows("plain", 50))
    s = -torch.softmax(z.scatter(1, actions[:, None], -torch.inf), 1).scatter(1, actions[:, None], -1.0)
    off = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    off -= (off * s).sum(1, keepdim=True) / s.square().sum(1, keepdim=True) * s
    off *= 0.1 * s.norm(dim=1, keepdim=True) / off.norm(dim=1, keepdim=True)
    for part, wanted in ((s, 0.0), (s + off, 0.1)):
        found = softmax_sums(z.float(), actions, (size * part).float())
        assert found.seen_rest is not None
        misfit = found.seen_rest.sqrt() / (size * s.norm(dim=1))
        assert torch.allclose(misfit, torch.full_like(misfit, wanted), rtol=1e-4, atol=1e-5)
