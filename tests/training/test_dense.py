"""Dense advantages against loops over tokens in float64, and inside the LCO losses that read them."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

import lcogeom as lg
from lcogeom.training import dense


def logits(seed: int, tokens: int = 7, vocab: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    return 4 * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def logprobs(row: Tensor) -> list[float]:
    values = row.double().tolist()
    top = max(values)
    total = top + math.log(math.fsum(math.exp(value - top) for value in values))
    return [value - total for value in values]


def best(row: Tensor, k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda j: -float(row[j]))[:k]


def normalised(values: list[float], how: str) -> list[float]:
    if how == "none":
        return values
    middle = statistics.fmean(values) if how == "mean-std" else 0.0
    return [(value - middle) / statistics.stdev(values) for value in values]


def same(found: tuple[Tensor, Tensor], wanted: list[tuple[list[float], list[int]]], tolerance: float = 1e-10) -> None:
    advantages, ids = found
    assert ids.tolist() == [row for _, row in wanted]
    np.testing.assert_allclose(advantages, [row for row, _ in wanted], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normalise", ["std", "mean-std", "none"])
@pytest.mark.parametrize("k", [2, 5, 40, 50])
def test_dpo_log_ratio(k: int, normalise: str) -> None:
    dpo, ref, policy = logits(0), logits(1), logits(2)
    wanted = []
    for d, r, p in zip(dpo, ref, policy, strict=True):
        ids, log_d, log_r = best(p, k), logprobs(d), logprobs(r)
        wanted.append((normalised([log_d[j] - log_r[j] for j in ids], normalise), ids))
    same(dense.dpo_log_ratio(dpo, ref, policy, k=k, normalise=normalise), wanted)


@pytest.mark.parametrize("normalise", ["std", "mean-std", "none"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_q_rm(version: str, normalise: str) -> None:
    verifier, policy = logits(3), logits(4)
    wanted = []
    for v, p in zip(verifier, policy, strict=True):
        ids, log_v = best(p if version == "v1" else v, 5), logprobs(v)
        wanted.append((normalised([log_v[j] for j in ids], normalise), ids))
    same(dense.q_rm(verifier, policy, version=version, normalise=normalise), wanted)
    if version == "v2":
        same(dense.q_rm(verifier, version=version, normalise=normalise), wanted)


def test_adpa() -> None:
    """The floor of 1e-7 is met on both sides: an id the reference nearly excludes, and one that the teacher does."""
    dpo, ref = logits(5), 6 * logits(6)
    wanted = []
    for d, r in zip(dpo, ref, strict=True):
        ids, log_d, log_r = best(d, 20), logprobs(d), logprobs(r)
        wanted.append(([math.log(max(math.exp(log_d[j]), 1e-7) / max(math.exp(log_r[j]), 1e-7)) for j in ids], ids))
    same(dense.adpa(dpo, ref, k=20), wanted)
    assert (dense.adpa(dpo, ref, k=20)[0] > 10).any()
    assert torch.isfinite(dense.adpa(dpo, torch.where(ref < 0, -torch.inf, ref))[0]).all()


def test_half_precision_is_read_in_float32() -> None:
    """Logits rounded to bf16 are the input; nothing is lost after that."""
    verifier, policy = logits(7, dtype=torch.bfloat16), logits(8)
    wanted = [([logprobs(v)[j] for j in best(p, 5)], best(p, 5)) for v, p in zip(verifier, policy, strict=True)]
    found = dense.q_rm(verifier, policy, normalise="none")
    assert found[0].dtype == torch.float32
    same(found, wanted, 1e-5)


def test_models_that_agree_about_everything_teach_nothing() -> None:
    advantages, _ = dense.dpo_log_ratio(logits(1), logits(1), logits(2))
    assert (advantages == 0).all()
    assert torch.isfinite(dense.q_rm(torch.zeros(3, 9), torch.zeros(3, 9), normalise="mean-std")[0]).all()
    one, _ = dense.q_rm(logits(1), logits(2), k=1)
    assert torch.isfinite(one).all()


@pytest.mark.parametrize("name", ["lco-kld", "lco-mse", "lco-lch"])
def test_they_are_what_the_losses_read(name: str) -> None:
    """The target that the authors' code builds, top 5 of the old policy and -100 elsewhere, worked out by hand."""
    policy, verifier, now = logits(0), logits(1), logits(2)
    how = "std" if name == "lco-kld" else "mean-std"
    advantages, ids = dense.q_rm(verifier, policy, normalise=how)
    batch = lg.TokenBatch(ids[:, 0], advantages, old_logits=policy, advantage_ids=ids)
    options = {"outside": "drop"} if name == "lco-kld" else {}
    found = lg.objective(name, beta=2.0, **options).loss(now, batch)
    for token in range(len(now)):
        chosen = best(policy[token], 5)
        log_v = logprobs(verifier[token])
        a = dict(zip(chosen, normalised([log_v[j] for j in chosen], how), strict=True))
        if name == "lco-kld":
            old, new = logprobs(policy[token]), logprobs(now[token])
            shifted = torch.tensor([old[j] + (a[j] / 2 if j in a else -100) for j in range(40)], dtype=torch.float64)
            target = logprobs(shifted)
            wanted = math.fsum(math.exp(t) * (t - n) for t, n in zip(target, new, strict=True))
        else:
            gaps = [float(now[token, j] - policy[token, j]) - a[j] / 2 for j in chosen]
            wanted = math.fsum(g * g / 2 if name == "lco-mse" else math.log(math.cosh(g)) for g in gaps)
        np.testing.assert_allclose(float(found[token]), wanted, rtol=1e-9)


def test_agreement_is_a_hundredfold_beta() -> None:
    """The damped advantages give, token by token, the loss of 100 beta where both are certain and of beta elsewhere."""
    old_logprobs = torch.tensor([-0.01, -0.01, -0.5, -0.0201, -0.001, -0.0, -2.0])
    verifier_logprobs = torch.tensor([-0.019, -0.3, -0.01, -0.001, -0.0001, -0.0, -3.0])
    agreed = dense.agreement(old_logprobs, verifier_logprobs)
    assert agreed.tolist() == [True, False, False, False, True, True, False]
    advantages, ids = dense.q_rm(logits(1), logits(0))
    old, now = logits(0), logits(2)

    def loss(name: str, beta: float, a: Tensor) -> Tensor:
        batch = lg.TokenBatch(ids[:, 0], a, old_logits=old, advantage_ids=ids)
        return lg.objective(name, beta=beta).loss(now, batch)

    for name in ("lco-kld", "lco-mse", "lco-lch"):
        wanted = torch.where(agreed, loss(name, 200.0, advantages), loss(name, 2.0, advantages))
        np.testing.assert_allclose(loss(name, 2.0, dense.damped(advantages, agreed)), wanted, rtol=1e-10)
    assert dense.damped(torch.ones(7), agreed)[0] == pytest.approx(0.01)


def test_q_values() -> None:
    verifier, actions = logits(9), torch.arange(7)
    raw = [float(verifier[t, t]) for t in range(7)]
    logged = [logprobs(verifier[t])[t] for t in range(7)]
    np.testing.assert_allclose(dense.q_values(verifier, actions), normalised(raw, "std"))
    np.testing.assert_allclose(dense.q_values(verifier, actions, raw=False), normalised(logged, "std"))
    np.testing.assert_allclose(dense.q_values(verifier, actions, normalise="none"), raw)
    np.testing.assert_allclose(dense.q_values(verifier, actions, normalise="mean-std"), normalised(raw, "mean-std"))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda z: dense.dpo_log_ratio(z, z[:2], z), "ref_logits: shape"),
        (lambda z: dense.dpo_log_ratio(z, z, z, k=0), "k: 0"),
        (dense.q_rm, "policy_logits: version"),
        (lambda z: dense.q_rm(z, z, version="v3"), "version: 'v3'"),
        (lambda z: dense.q_rm(z, z, normalise="max"), "normalise: 'max'"),
        (lambda z: dense.adpa(z[0], z[0]), r"dpo_logits: shape \(40,\)"),
    ],
)
def test_bad_input(call, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        call(logits(0))
