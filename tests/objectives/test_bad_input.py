"""What a TokenBatch, an objective and a Hessian refuse, and what they say."""

from __future__ import annotations

import pytest
import torch

import lcogeom as lg

ACTIONS = torch.tensor([1, 2, 0])
GOOD = {"actions": ACTIONS, "advantages": torch.ones(3), "old_logprobs": -torch.ones(3)}
FULL = GOOD | {
    "ref_logprobs": -torch.ones(3),
    "old_logits": torch.zeros(3, 5),
    "ref_logits": torch.zeros(3, 5),
    "sequences": torch.zeros(3, dtype=torch.long),
    "pairs": torch.zeros(3, dtype=torch.long),
    "chosen": torch.tensor([True, False, True]),
}
DENSE = {"advantages": torch.eye(3)[:, :2], "advantage_ids": torch.tensor([[0, 1]] * 3)}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"actions": torch.empty(0, dtype=torch.long), "advantages": None, "old_logprobs": None},
            "no completion token",
        ),
        ({"actions": torch.tensor([[1, 2, 0]])}, r"actions: shape \(1, 3\)"),
        ({"actions": torch.tensor([1.0, 2.0, 0.0])}, "integer token ids"),
        ({"actions": torch.tensor([1, -100, 0])}, "ignored labels such as -100"),
        ({"advantages": torch.ones(2)}, r"advantages: shape \(2,\); must be \(3,\)"),
        ({"advantages": torch.ones(3, 2)}, "advantages: shape"),
        ({"advantages": torch.tensor([1.0, float("nan"), 0.0])}, "advantages: NaN or infinite at token 1"),
        ({"old_logprobs": torch.tensor([-1.0, -1.0, -float("inf")])}, "old_logprobs: NaN or infinite at token 2"),
        ({"mask": torch.ones(4)}, "mask: shape"),
        ({"old_logits": torch.zeros(3)}, "old_logits: shape"),
        ({"advantage_ids": torch.zeros(3, 2, dtype=torch.long), "advantages": torch.ones(3, 2)}, "same id twice"),
        ({"advantage_ids": torch.zeros(3, 2, dtype=torch.long), "advantages": torch.ones(3, 3)}, "advantages: shape"),
    ],
)
def test_token_batch(wrong: dict, said: str) -> None:
    lg.TokenBatch(**GOOD)
    with pytest.raises(ValueError, match=said):
        lg.TokenBatch(**(GOOD | wrong))


def test_a_field_that_is_missing() -> None:
    logits = torch.zeros(3, 5)
    for name, field in (("ppo", "old_logprobs"), ("reinforce", "advantages"), ("lco-kld", "old_logits")):
        batch = lg.TokenBatch(ACTIONS, None if field == "advantages" else torch.ones(3))
        for method in ("loss", "gradient"):
            with pytest.raises(ValueError, match=f"{field}: objective '{name}' needs it"):
                getattr(lg.objective(name), method)(logits, batch)


@pytest.mark.parametrize("name", lg.objective_names())
def test_logits_that_do_not_fit(name: str) -> None:
    batch = lg.TokenBatch(**(FULL | DENSE if name == "adpa" else FULL))
    objective = lg.objective(name)
    for method in (objective.loss, objective.gradient, objective.hessian):
        with pytest.raises(ValueError, match="one row per token"):
            method(torch.zeros(2, 5), batch)
        with pytest.raises(ValueError, match="not below V = 2"):
            method(torch.zeros(3, 2), batch)
    spoiled = torch.zeros(3, 5)
    spoiled[2, 1] = float("-inf")
    for method in (objective.gradient, objective.hessian):
        with pytest.raises(ValueError, match="token 2 holds"):
            method(spoiled, batch)


@pytest.mark.parametrize("name", lg.objective_names())
def test_every_field_an_objective_lacks_is_named(name: str) -> None:
    """Without anything but actions, each objective but SFT and the entropy says what it needs."""
    objective = lg.objective(name)
    if name in ("sft", "entropy"):
        return
    with pytest.raises(ValueError, match=r"^\w+: objective '[\w-]+' needs it; pass TokenBatch\("):
        objective.loss(torch.zeros(3, 5), lg.TokenBatch(ACTIONS))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ppo", {"dual_clip": 1.0}, "dual_clip: 1"),
        ("grpo", {"beta": -1.0}, "beta: -1"),
        ("cispo", {"clip_high": -0.1}, "clip_high: -0.1"),
        ("minpro", {"clip_low": -1.0}, "clip_low: -1"),
        ("gspo", {"clip_low": -1.0}, "clip_low: -1"),
        ("dpo", {"beta": 0.0}, "beta: 0"),
        ("simpo", {"gamma": float("nan")}, "gamma: nan"),
        ("dppo", {"divergence": "tv"}, "divergence: 'tv'; must be one of binary_tv"),
        ("dppo", {"delta_high": -1.0}, "delta_high: -1"),
        ("dppo", {"most": 0.0}, "most: 0"),
        ("dppo", {"top_k": 0}, "top_k: 0"),
        ("reverse-kl", {"to": "teacher"}, "to: 'teacher'; must be one of reference, rollout"),
        ("reppo", {"alpha": -1.0}, "alpha: -1"),
        ("dckd", {"weight": -1.0}, "weight: -1"),
        ("dckd", {"top_k": 0}, "top_k: 0"),
        ("adpa", {"weight": float("inf")}, "weight: inf"),
        ("lco-v0", {"ratio_positive": 0.0}, "ratio_positive: 0"),
        ("lco-v0", {"most": 1.0}, "most: 1"),
    ],
)
def test_options_out_of_range(name: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lg.objective(name, **options)


def test_sums() -> None:
    ppo, entropy = lg.objective("ppo"), lg.objective("entropy")
    assert (ppo - 0.01 * entropy).name == "ppo + -0.01 * entropy"
    assert isinstance(ppo + lg.objective("sft"), lg.ActionObjective)  # a sum of functions of l is one
    with pytest.raises(ValueError, match="factor of an objective must be finite"):
        _ = float("nan") * ppo
    with pytest.raises(TypeError, match="multiplied by a number, not by ActionObjective"):
        _ = ppo * ppo
    with pytest.raises(TypeError):
        _ = ppo + 1.0
    batch = lg.TokenBatch(**FULL)
    H = entropy.hessian(torch.zeros(3, 5), batch)
    with pytest.raises(ValueError, match="different logits"):
        _ = H + entropy.hessian(torch.ones(3, 5), batch)


def test_names_and_options() -> None:
    with pytest.raises(ValueError, match="Did you mean 'lco-kld'"):
        lg.objective("lco-kl")
    with pytest.raises(TypeError, match=r"has no option 'clip'\. Its options: clip_low, clip_high"):
        lg.objective("ppo", clip=0.1)
    with pytest.raises(ValueError, match="clip_high: -1"):
        lg.objective("ppo", clip_high=-1)
    for name in ("lco-kld", "lco-mse", "lco-lch"):
        for wrong in ({"beta": 0.0}, {"beta": float("inf")}, {"target": "old"}, {"negative_beta_scale": -1.0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                lg.objective(name, **wrong)
        batch = lg.TokenBatch(**GOOD, old_logits=torch.zeros(3, 5))
        with pytest.raises(ValueError, match="standardise: needs several"):
            lg.objective(name, standardise=True).loss(torch.zeros(3, 5), batch)


def test_a_function_that_is_no_action_objective() -> None:
    batch = lg.TokenBatch(**GOOD)
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="one loss per token"):
        lg.action_objective(lambda logp, b: logp.mean()).loss(logits, batch)
    with pytest.raises(ValueError, match="depends on other tokens"):
        lg.action_objective(lambda logp, b: logp * logp.sum()).gradient(logits, batch)


def test_a_constant_objective_has_no_gradient() -> None:
    batch = lg.TokenBatch(**GOOD)
    nothing = lg.action_objective(lambda logp, b: torch.zeros_like(b.advantages))
    logits = torch.zeros(3, 5)
    assert not nothing.gradient(logits, batch).any()
    assert nothing.hessian(logits, batch).is_convex().all()


def test_hessian_arguments() -> None:
    batch = lg.TokenBatch(**GOOD)
    H = lg.objective("sft").hessian(torch.zeros(3, 5000), batch)
    assert H.shape == (3, 5000, 5000)
    with pytest.raises(ValueError, match=r"0\.6 GiB; dense\(\) stops at V = 4096"):
        H.dense()
    with pytest.raises(ValueError, match=r"x: shape \(3, 4\)"):
        _ = H @ torch.zeros(3, 4)
