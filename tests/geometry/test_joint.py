"""The joint Hessian of losses that couple tokens, against double backward through all tokens' logits at once."""

from __future__ import annotations

import pytest
import torch

import lcogeom as lg
from tests.cases import Case
from tests.oracles import PAIRS, Together, joint_derivatives

COUPLED = ["gspo", "gspo-unclipped", "dpo", "simpo", "qrm", "confidence-dpo"]


@pytest.mark.parametrize("logits", ["random", "peaked", "tied"])
@pytest.mark.parametrize("name", COUPLED)
def test_equals_double_backward(name: str, logits: str, device: torch.device) -> None:
    objective, oracle = PAIRS[name]
    assert isinstance(oracle, Together)
    z, batch = Case(6, logits, 1.5, 1e-4).build(device)
    _, _, wanted = joint_derivatives(oracle, z, batch)
    joint = objective.joint_hessian(z, batch)
    torch.testing.assert_close(joint.dense(), wanted, rtol=1e-9, atol=1e-13)
    x = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    torch.testing.assert_close((joint @ x).flatten(), wanted @ x.flatten(), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(joint.quadratic(x), x.flatten() @ wanted @ x.flatten(), rtol=1e-9, atol=1e-13)
    coupling = wanted - torch.block_diag(*objective.hessian(z, batch).dense())
    assert coupling.abs().max() > 1e-6 * wanted.abs().max()  # there is something to couple


def test_of_a_sum(device: torch.device) -> None:
    z, batch = Case(5, "random", 1.0, 0.0).build(device)
    objective = 0.5 * lg.objective("gspo", clip_low=None, clip_high=None) + 2 * lg.objective("dpo")
    parts = [PAIRS["gspo-unclipped"][1], PAIRS["dpo"][1]]
    wanted = sum(weight * joint_derivatives(part, z, batch)[2] for weight, part in zip((0.5, 2), parts, strict=True))
    torch.testing.assert_close(objective.joint_hessian(z, batch).dense(), wanted, rtol=1e-9, atol=1e-13)


def test_without_coupling_it_is_the_blocks(device: torch.device) -> None:
    z, batch = Case(5, "random", 1.0, 0.0).build(device)
    objective = lg.objective("ppo")
    blocks = torch.block_diag(*objective.hessian(z, batch).dense())
    torch.testing.assert_close(objective.joint_hessian(z, batch).dense(), blocks)


def test_gspo_is_jointly_convex_where_the_mean_odds_allow(device: torch.device) -> None:
    """A > 0: convex iff mean_t (1 - p_t) / p_t <= 1, though each block already is where p_t >= 1 / (1 + n)."""
    objective = lg.objective("gspo", clip_low=None, clip_high=None)
    seen = set()
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        z = 1.5 * torch.randn(3, 4, generator=rng, dtype=torch.float64)
        actions = torch.where(torch.rand(3, generator=rng) < 0.8, z.argmax(1), 0)
        logp = torch.log_softmax(z, 1).gather(1, actions[:, None]).squeeze(1)
        fields = {"advantages": torch.ones(3), "old_logprobs": logp, "sequences": torch.zeros(3, dtype=torch.long)}
        batch = lg.TokenBatch(actions=actions, **fields)
        odds = torch.expm1(-logp).mean()
        lowest = torch.linalg.eigvalsh(objective.joint_hessian(z, batch).dense())[0]
        convex = bool(lowest > -1e-12)
        assert convex == bool(odds <= 1)
        seen.add((convex, bool(objective.hessian(z, batch).is_convex().all())))
    assert seen == {(True, True), (False, True), (False, False)}


def test_dense_stops_where_nobody_can_hold_it() -> None:
    batch = lg.TokenBatch(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="6000 rows and columns"):
        lg.objective("sft").joint_hessian(torch.zeros(3, 2000), batch).dense()
