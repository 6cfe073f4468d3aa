"""What all interventions have in common: they go with any objective, and refuse what they cannot judge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lcogeom as lg
from tests.cases import Case

OBJECTIVES = {
    "ppo": lg.objective("ppo", clip_low=None, clip_high=None),
    "reinforce": lg.objective("reinforce"),
    "lco-kld": lg.objective("lco-kld"),
    "lco-lch": lg.objective("lco-lch"),
    "sft": lg.objective("sft"),
    "grpo": lg.objective("grpo"),
    "own": lg.action_objective(lambda logp, b: b.advantages * (logp - b.ref_logprobs).square()),
}
RULES = {
    "capo": lg.intervention("capo", tau_h=0.05, tau_f=2e-3),
    "capo-levels": lg.intervention("capo", level=("token", "sentence", "global"), tau_h=0.05, sequential=True),
    "dr-capo": lg.intervention("dr-capo", rule="one-sided", tau_h=1e-3, fisher="exact", top_k=3),
    "rein-capo": lg.intervention("rein-capo"),
    "bapo": lg.intervention("bapo", low=(0.9, 1.0), high=(1.05, 1.2)),
    "acpo": lg.intervention("acpo", clip_low=0.05, clip_high=0.01),
    "sage": lg.intervention("sage", keep=0.5),
    "none": lg.Intervention("none", lambda logits, batch, *_: lg.Verdict(torch.zeros_like(batch.chosen), {})),
}
CASES = [
    Case(17, "random", 1.0, 0.1),
    Case(17, "tied", -1.0, -0.5),
    Case(2, "random", 1.0, 0.0),
    Case(2, "half", -2.0, 0.3),
    Case(17, "saturated", 1e4, 13.8),
    Case(17, "random", 1.0, 0.0, torch.bfloat16),
]


def layer_of(logits: Tensor) -> lg.LastLayer:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.linspace(0.1, 2, len(logits))[:, None] * torch.randn(len(logits), 3, generator=rng)
    return lg.LastLayer(hidden.to(logits.device), 0.05)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("rule", RULES)
def test_the_objective_where_kept_and_zero_elsewhere(rule: str, name: str, case: Case, device: torch.device) -> None:
    logits, batch = case.build(device)
    batch = replace(batch, mask=torch.tensor([1, 1, 1, 1, 0], device=device))
    objective, layer = OBJECTIVES[name], layer_of(logits)
    choice = RULES[rule](logits, batch, objective=objective, layer=layer)
    keep = choice.keep
    assert keep.dtype == torch.bool
    assert not keep[4]
    assert torch.equal(choice.batch.mask, keep)
    for key, score in choice.scores.items():
        assert score.shape == (len(batch),), key
        assert score.dtype == torch.float64, key

    guarded = RULES[rule].on(objective, layer=layer)
    found = guarded.loss(logits, batch), guarded.gradient(logits, batch), guarded.hessian(logits, batch).dense()
    plain = objective.loss(logits, batch), objective.gradient(logits, batch), objective.hessian(logits, batch).dense()
    for got, whole in zip(found, plain, strict=True):
        assert torch.equal(got[keep], whole[keep])
        assert not got[~keep].any()


def test_the_cases_drop_some_tokens_and_keep_some() -> None:
    """Or the test above shows nothing."""
    seen: dict[str, set[bool]] = {name: set() for name in RULES}
    for case in CASES:
        logits, batch = case.build(torch.device("cpu"))
        for name, rule in RULES.items():
            seen[name] |= set(rule(logits, batch, layer=layer_of(logits)).keep.tolist())
    assert seen.pop("none") == {False}
    assert all(kept == {True, False} for kept in seen.values()), seen


@pytest.mark.parametrize("name", ["ppo", "reinforce", "lco-kld", "sft"])
@pytest.mark.parametrize("rule", ["capo", "capo-levels", "bapo", "acpo", "sage", "none"])
def test_double_backward_of_the_guarded_loss(rule: str, name: str, device: torch.device) -> None:
    """The choice is made without gradient: differentiating the loss twice gives gradient and Hessian."""
    logits, batch = Case(17, "random", 1.0, 0.1).build(device)
    guarded = RULES[rule].on(OBJECTIVES[name], layer=layer_of(logits))
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(guarded.loss(z, batch).sum(), z, create_graph=True)
    torch.testing.assert_close(gradient.detach(), guarded.gradient(logits, batch), rtol=1e-9, atol=1e-12)
    assert not guarded.gradient(z, batch).requires_grad
    x = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    (product,) = torch.autograd.grad((gradient * x).sum(), z)
    torch.testing.assert_close(product, guarded.hessian(logits, batch) @ x, rtol=1e-9, atol=1e-11)


def test_interventions_of_interventions(device: torch.device) -> None:
    logits, batch = Case(17, "random", 1.0, 0.1).build(device)
    first, second, objective = RULES["acpo"], RULES["sage"], OBJECTIVES["reinforce"]
    both = second.on(first.on(objective))
    keep = first(logits, second(logits, batch).batch).keep
    assert torch.equal(both.gradient(logits, batch), objective.gradient(logits, replace(batch, mask=keep)))
    assert both.name == "reinforce+acpo+sage"
    assert both.options["acpo.clip_low"] == 0.05
    assert "intervention('sage', keep=0.5" in repr(both)
    judged = RULES["capo"](logits, batch, objective=first.on(objective), layer=layer_of(logits))
    alone = RULES["capo"](logits, first(logits, batch).batch, objective=objective, layer=layer_of(logits))
    torch.testing.assert_close(judged.scores["m_H"], alone.scores["m_H"])
    assert (both + objective).gradient(logits, batch).shape == logits.shape


@pytest.mark.parametrize("rule", RULES)
def test_an_empty_mask(rule: str, device: torch.device) -> None:
    logits, batch = Case(17, "random", 1.0, 0.1).build(device)
    batch = replace(batch, mask=torch.zeros(len(batch), device=device))
    choice = RULES[rule](logits, batch, layer=layer_of(logits))
    assert not choice.keep.any()
    assert not any(score.isnan().any() for score in choice.scores.values())
    assert not RULES[rule].on(OBJECTIVES["ppo"], layer=layer_of(logits)).gradient(logits, batch).any()


def test_registry() -> None:
    assert lg.intervention_names() == ["capo", "dr-capo", "rein-capo", "bapo", "acpo", "sage"]
    for name in lg.intervention_names():
        rule = lg.intervention(name)
        assert rule.name == name
        assert repr(rule).startswith(f"intervention({name!r}, ")
        assert lg.intervention(name, **rule.options).options == rule.options
    with pytest.raises(ValueError, match=r"no intervention 'cap'. Did you mean 'capo'"):
        lg.intervention("cap")
    with pytest.raises(TypeError, match=r"intervention 'sage' has no option 'tau'. Its options: keep, beta, damping"):
        lg.intervention("sage", tau=1)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("capo", {"level": "word"}, "level: .*must be one or several of token, sentence, global"),
        ("capo", {"level": ()}, "level: "),
        ("capo", {"rule": "both"}, "rule: 'both'; must be one of symmetric, one-sided"),
        ("capo", {"fisher": "true"}, "fisher: 'true'"),
        ("capo", {"tau_h": -0.1}, "tau_h: -0.1; must be a finite number >= 0"),
        ("capo", {"tau_f": {"token": float("nan")}}, "tau_f: nan"),
        ("capo", {"tau_f": {"global": 0.1}}, "tau_f: levels global; this rule judges token"),
        ("capo", {"tau_h_high": 1.0}, "tau_h_high: the symmetric rule has one bound"),
        ("capo", {"top_k": 1}, "top_k: 1"),
        ("bapo", {"low": (0.9, 0.6)}, r"low: \(0.9, 0.6\)"),
        ("bapo", {"high": (0.0, 1.0)}, "high: "),
        ("bapo", {"low": (0.6, 1.3)}, "low: may rise to 1.3, above where high starts, 1.2"),
        ("bapo", {"step_low": -1.0}, "step_low: -1.0"),
        ("bapo", {"target": float("inf")}, "target: inf"),
        ("bapo", {"dual_clip": 1.0}, "dual_clip: 1.0; must be > 1"),
        ("acpo", {"delta": -0.1}, "delta: -0.1"),
        ("sage", {"keep": 0.0}, r"keep: 0.0; must be in \(0, 1\]"),
        ("sage", {"damping": 0.0}, "damping: 0.0"),
        ("sage", {"beta": -1.0}, "beta: -1.0"),
    ],
)
def test_options_out_of_range(name: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lg.intervention(name, **options)


def test_fields_that_are_missing() -> None:
    logits, actions = torch.zeros(3, 5), torch.tensor([0, 1, 2])
    layer = lg.LastLayer(torch.ones(3, 2), 0.1)
    bare = lg.TokenBatch(actions, torch.ones(3))
    for rule, field in (("bapo", "old_logprobs"), ("acpo", "old_logprobs"), ("sage", "ref_logprobs")):
        with pytest.raises(ValueError, match=f"{field}: intervention '{rule}' needs it; pass TokenBatch"):
            lg.intervention(rule)(logits, bare)
    with pytest.raises(ValueError, match="sequences: intervention 'capo' needs it"):
        lg.intervention("capo", level="sentence")(logits, bare, layer=layer)
    with pytest.raises(ValueError, match=r"advantages: objective .* needs it"):
        lg.intervention("capo")(logits, lg.TokenBatch(actions), layer=layer)
    with pytest.raises(ValueError, match=r"pass layer=lg.LastLayer\(hidden, learning_rate=...\)"):
        lg.intervention("capo")(logits, bare)
    ids = torch.tensor([[0, 1]] * 3)
    dense = lg.TokenBatch(actions, torch.ones(3, 2), old_logprobs=-torch.ones(3), advantage_ids=ids)
    with pytest.raises(ValueError, match="advantages: intervention 'bapo' needs those of the sampled actions"):
        lg.intervention("bapo")(logits, dense)
    with pytest.raises(ValueError, match="top_k: advantages of several ids per token"):
        lg.intervention("capo", top_k=2)(logits, dense, layer=layer)


def test_logits_and_layers_that_do_not_fit() -> None:
    batch = lg.TokenBatch(torch.tensor([0, 1, 2]), torch.ones(3))
    hidden, zero = torch.ones(3, 2), torch.zeros(5, 2)
    rule = lg.intervention("capo")
    for wrong, said in (
        (hidden[:2], "hidden: 2 rows, but the batch has 3 tokens"),
        (hidden[None], r"hidden: shape \(1, 3, 2\); must be \(N, d\)"),
        (hidden / torch.tensor([[1.0], [0.0], [1.0]]), "hidden: NaN or infinite in row 1"),
    ):
        with pytest.raises(ValueError, match=said):
            rule(torch.zeros(3, 5), batch, layer=lg.LastLayer(wrong, 0.1))
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"learning_rate: .*must be a finite number > 0"):
            lg.LastLayer(hidden, rate)
    with pytest.raises(ValueError, match="exp_avg: 5 rows, but V = 7"):
        rule(torch.zeros(3, 7), batch, layer=lg.LastLayer(hidden, 0.1, lg.AdamState(zero, zero, 1)))
    with pytest.raises(ValueError, match="exp_avg: rows of width 2, but hidden has d = 4"):
        lg.LastLayer(torch.ones(3, 4), 0.1, lg.AdamState(zero, zero, 1))
    for changed, said in (
        ({"exp_avg_sq": zero[:2]}, "exp_avg, exp_avg_sq: shapes"),
        ({"exp_avg": zero + float("inf")}, "exp_avg: NaN or infinite in row 0"),
        ({"exp_avg_sq": zero - 1}, "exp_avg_sq: negative"),
        ({"betas": (0.9, 1.0)}, r"betas: \(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps, step: 0.0"),
        ({"step": -1}, "eps, step"),
        ({"rows": torch.tensor([0, 1, 2, 3, 3])}, "rows: must be"),
        ({"rows": torch.tensor([0, 1])}, "rows: must be"),
    ):
        with pytest.raises(ValueError, match=said):
            lg.AdamState(**({"exp_avg": zero, "exp_avg_sq": zero, "step": 1} | changed))
    spoiled = torch.zeros(3, 5)
    spoiled[1, 0] = float("nan")
    with pytest.raises(ValueError, match="logits: token 1"):
        rule(spoiled, batch, layer=lg.LastLayer(hidden, 0.1))
    with pytest.raises(ValueError, match="one row per token"):
        rule(torch.zeros(2, 5), batch, layer=lg.LastLayer(hidden, 0.1))
