"""The audit's numbers against dense float64 Hessians of the logits, which the file does not hold.

The oracle differentiates each loss as a function of the logits twice, takes eigenvalues, and finds k* by bisection on
them. Nothing of it calls the package's formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from torch import Tensor

import lcogeom as lg
from tests.audit.logged import logged_tokens, write

ROUNDING = 1e-9  # bisection stops there, eigenvalues of 4 x 4 matrices are good to 1e-14


def surrogate(low: float, high: float) -> Callable[[Tensor, pd.Series], Tensor]:
    def loss(logp: Tensor, row: pd.Series) -> Tensor:
        ratio = torch.exp(logp - row.old_logprobs)
        return -torch.minimum(ratio * row.advantages, ratio.clamp(1 - low, 1 + high) * row.advantages)

    return loss


def k3(logp: Tensor, row: pd.Series) -> Tensor:
    return torch.exp(row.ref_logprobs - logp) - (row.ref_logprobs - logp) - 1


CASES: dict[str, tuple[str, dict, Callable[[Tensor, pd.Series], Tensor]]] = {
    "ppo": ("ppo", {}, surrogate(0.2, 0.2)),
    "ppo-options": ("ppo", {"clip_low": 0.1, "clip_high": 0.3}, surrogate(0.1, 0.3)),
    "ppo-unclipped": ("ppo", {"clip_low": None, "clip_high": None}, surrogate(1.0, 1e9)),
    "reinforce": ("reinforce", {}, lambda logp, row: -row.advantages * logp),
    "sft": ("sft", {}, lambda logp, row: -logp),
    "k3": ("k3", {}, k3),
    "grpo": ("grpo", {"beta": 0.3}, lambda logp, row: surrogate(0.2, 0.2)(logp, row) + 0.3 * k3(logp, row)),
}


def oracle(logits: Tensor, frame: pd.DataFrame, loss: Callable[[Tensor, pd.Series], Tensor]) -> pd.DataFrame:
    """Per token: convex, k*, the lowest generalised eigenvalue of (H, S), H_aa, f' and f''."""
    found = []
    for z, (_, row) in zip(logits, frame.iterrows(), strict=True):
        a, vocab = row.token_id, len(z)

        def of_logits(z: Tensor, row: pd.Series = row, a: int = a) -> Tensor:
            return loss(torch.log_softmax(z, 0)[a], row)

        hessian = torch.autograd.functional.hessian(of_logits, z).numpy()
        gradient = torch.autograd.functional.jacobian(of_logits, z).numpy()
        p = torch.softmax(z, 0).numpy()
        fisher = np.diag(p) - np.outer(p, p)
        tolerance = 1e-12 * max(1.0, np.abs(hessian).max())

        def convex(k: float, hessian: np.ndarray = hessian, fisher: np.ndarray = fisher, t: float = tolerance) -> bool:
            return bool(np.linalg.eigvalsh(hessian + k * fisher)[0] >= -t)

        low, high = 0.0, 1.0
        while not convex(high):
            high *= 2
        while high - low > ROUNDING * high and not convex(0.0):
            low, high = (low, (low + high) / 2) if convex((low + high) / 2) else ((low + high) / 2, high)
        basis = scipy.linalg.null_space(np.ones((1, vocab)))  # S is singular along 1, and so is H
        margin = scipy.linalg.eigh(basis.T @ hessian @ basis, basis.T @ fisher @ basis, eigvals_only=True)[0]
        d1 = gradient[a] / (1 - p[a])
        d2 = (hessian[a, a] + d1 * p[a] * (1 - p[a])) / (1 - p[a]) ** 2
        found.append((convex(0.0), 0.0 if convex(0.0) else high, margin, hessian[a, a], d1, d2))
    return pd.DataFrame(found, columns=["convex", "k", "margin", "own", "d1", "d2"])


@pytest.mark.parametrize("case", CASES)
def test_every_number_equals_the_dense_hessians(case: str, tmp_path: Path) -> None:
    name, options, loss = CASES[case]
    logits, frame = logged_tokens()
    true = oracle(logits, frame, loss)
    report = lg.audit_file(write(frame, tmp_path / "log.parquet"), name, options=options, worst=len(frame))

    signs = frame["advantages"]
    for group, some in {"all": signs < 9, "positive": signs > 0, "negative": signs < 0, "zero": signs == 0}.items():
        got, want = report.groups[group], true[some]
        assert got.tokens == len(want)
        assert got.convex == want["convex"].sum()
        assert got.convex_share == pytest.approx(want["convex"].mean())
        assert got.kl_missing == pytest.approx(want["k"].sum(), rel=1e-7)
        size = want["margin"].abs().sum()
        if size > 1e-9:
            assert got.negative_mass == pytest.approx(want["k"].sum() / size, rel=1e-7)
            share = want["own"].clip(upper=0).abs().sum() / want["own"].abs().sum()
            assert got.own_curvature_negative == pytest.approx(share, rel=1e-7, abs=1e-12)
        else:
            assert got.negative_mass is None

    bad = true[true["k"] > 0].sort_values("k", ascending=False)
    assert [token.row - 1 for token in report.worst] == bad.index.tolist()
    for token, (index, want) in zip(report.worst, bad.iterrows(), strict=True):
        row = frame.loc[index]
        assert token.kl_needed == pytest.approx(want["k"], rel=1e-7)
        assert (token.d1, token.d2) == (pytest.approx(want["d1"], rel=1e-7), pytest.approx(want["d2"], abs=1e-7))
        assert (token.sequence, token.position, token.token_id) == (row["sequence"], row["position"], row["token_id"])
        assert (token.text, token.advantage, token.logprob) == (row["text"], row["advantages"], row["logprobs"])
        assert token.prob == pytest.approx(float(torch.softmax(logits[index], 0)[row["token_id"]]))
        assert token.ratio == pytest.approx(np.exp(row["logprobs"] - row["old_logprobs"]))


def test_an_objective_of_ones_own_gets_every_column(tmp_path: Path) -> None:
    file = write(logged_tokens()[1], tmp_path / "log.parquet")
    mine = lg.action_objective(lambda logp, b: -b.advantages * (logp - b.old_logprobs).exp())
    own, named = lg.audit_file(file, mine), lg.audit_file(file, options={"clip_low": None, "clip_high": None})
    assert own.groups == named.groups
    assert own.objective == "custom"


def test_tokens_at_the_edge_of_float64(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            # pi underflows: k* is infinite; the ratio overflows: nothing can be said; pi = 1: convex, A > 0
            "logprobs": [-800.0, -0.5, 0.0, -0.1],
            "old_logprobs": [-800.0, -800.0, 0.0, -0.1],
            "advantages": [1.0, 1.0, 1.0, -1.0],
        }
    )
    options = {"clip_low": None, "clip_high": None}
    report = lg.audit_file(write(frame, tmp_path / "log.csv"), options=options)
    group = report.groups["all"]
    assert (group.tokens, group.convex, group.infinite, group.overflowed) == (4, 1, 1, 1)
    assert group.convex_share == pytest.approx(1 / 3)
    assert np.isfinite(group.kl_missing)
    assert np.isfinite(group.negative_mass)
    assert [token.row for token in report.worst] == [2, 5]
    assert report.to_dict()["worst"][0]["kl_needed"] is None
    assert report.to_dict()["groups"]["all"]["kl_needed"]["max"] is None
