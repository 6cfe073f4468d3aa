"""m_H and m_F against brute force: the head's whole gradient by autograd, a real step of torch's optimiser, and two
derivatives along it of -L and of the KL. Losses are those written a second time in tests/oracles.py; float64.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

import lcogeom as lg
from tests.objectives.head_oracle import SEQUENCES, Head, N, layer_of, make_head, real_step, warm_adam
from tests.oracles import PAIRS, Together

UNCOUPLED = ["sft", "reinforce", "ppo", "grpo", "lco-kld", "lco-mse", "entropy", "sum-of-everything"]
COUPLED = ["gspo-unclipped", "dpo", "simpo"]
RATES = {"sgd": 0.3, "adam": 0.05, "first-adam": 0.05}
FOUND = ("m_H", "m_F_empirical", "m_F_exact")


def full_head(mask: str, vocab: int) -> Head:
    """`make_head` with every field that an objective may ask for; pairs cross completions."""
    head = make_head(mask, vocab)
    rng = torch.Generator().manual_seed(1)
    reference = head.logits + 0.4 * torch.randn(N, vocab, generator=rng, dtype=torch.float64)
    pairs = torch.tensor([0, 0, 1, 1, 1, 1, 1])
    chosen = torch.tensor([True, False, True, True, False, True, False])
    return replace(head, batch=replace(head.batch, ref_logits=reference, pairs=pairs, chosen=chosen))


def optimizer_of(kind: str, head: Head) -> tuple[torch.optim.Adam | None, lg.LastLayer]:
    """(torch's optimiser, None for SGD; the layer as the package is told of it)."""
    rate = RATES[kind]
    if kind == "first-adam":
        zero = torch.zeros_like(head.weight)
        layer = lg.LastLayer(head.hidden, rate, lg.AdamState(zero, zero, 0))
        return torch.optim.Adam([head.weight.clone().requires_grad_()], lr=rate), layer
    adam = warm_adam(head, rate) if kind == "adam" else None
    return adam, layer_of(head, rate, adam)


def total_loss(name: str, logits: Tensor, batch: lg.TokenBatch) -> Tensor:
    """Sum of the losses of a batch without masked tokens."""
    loss = PAIRS[name][1]
    if isinstance(loss, Together):
        return loss.per_token(logits, batch).sum()
    return torch.stack([loss(logits[n], batch, n) for n in range(len(batch))]).sum()


def brute(
    name: str, head: Head, group: list[int], kind: str, adam: torch.optim.Adam | None
) -> tuple[dict[str, float], Tensor]:
    """(rise of -L and both KLs to second order, means over the tokens of a group that move together; each token's)."""
    kept = list(range(N)) if head.batch.mask is None else head.batch.mask.nonzero().flatten().tolist()
    batch = replace(head.batch, mask=None)[torch.tensor(kept)]
    moving = torch.tensor([n in group for n in kept])[:, None]

    def loss(weight: Tensor) -> Tensor:
        """Mean over the group of what its tokens add to the batch's loss; the others stand still."""
        logits = torch.where(moving, head.hidden[kept] @ weight.T, head.logits[kept])
        return total_loss(name, logits, batch) / len(group)

    weight = head.weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(weight), weight)
    step = real_step(head, gradient, RATES[kind], adam)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def two_slopes(value: Tensor) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad(value, t, create_graph=True)
        (second,) = torch.autograd.grad(first, t, retain_graph=True)
        return first.detach(), second.detach()

    first, second = two_slopes(-loss(head.weight + t * step))
    own = []
    for n in group:
        z = (head.weight + t * step) @ head.hidden[n]
        rise = torch.tensor(torch.nan)
        if name in UNCOUPLED:
            rise_slopes = two_slopes(-total_loss(name, z[None], replace(head.batch, mask=None)[[n]]))
            rise = rise_slopes[0] + rise_slopes[1] / 2
        logp = torch.log_softmax(z, 0)
        (slope, _) = two_slopes(logp[head.batch.actions[n]])
        kl = (logp.exp().detach() * (logp.detach() - logp)).sum()
        own.append([rise, slope.square() / 2, two_slopes(kl)[1] / 2])
    each = torch.tensor(own)
    values = [(first + second / 2).item(), *each[:, 1:].mean(0).tolist()]
    return dict(zip(FOUND, values, strict=True)), each


def close(found: Tensor, expected: float) -> None:
    """1e-9 of the value, and 1e-12 for the sums where it is 0."""
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("mask", ["all", "some"])
@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("vocab", [7, 30])
@pytest.mark.parametrize("name", [*UNCOUPLED, *COUPLED])
def test_three_levels_are_the_second_order_of_a_real_step(name: str, vocab: int, kind: str, mask: str) -> None:
    head = full_head(mask, vocab)
    adam, layer = optimizer_of(kind, head)
    live = [n for n in range(N) if mask == "all" or head.batch.mask[n]]
    found = lg.last_layer_curvature(PAIRS[name][0], head.logits, head.batch, layer=layer)

    assert found.sentence_ids.tolist() == sorted(set(SEQUENCES.tolist()))
    groups = {"token": [[n] for n in range(N)], "update": [live]}
    groups["sentence"] = [[n for n in live if SEQUENCES[n] == s] for s in found.sentence_ids]
    for level, members in groups.items():
        for place, group in enumerate(members):
            some = [n for n in group if n in live]
            wanted = brute(name, head, some, kind, adam)[0] if some else dict.fromkeys(FOUND, 0.0)
            for key, value in wanted.items():
                one = getattr(getattr(found, level), key)
                close(one if level == "update" else one[place], value)

    inside = found.token_in_update
    _, each = brute(name, head, live, kind, adam)
    for column, key in enumerate(FOUND):
        if key != "m_H" or name in UNCOUPLED:
            torch.testing.assert_close(getattr(inside, key)[live], each[:, column], rtol=1e-9, atol=1e-12)
    close(inside.m_H[live].mean(), found.update.m_H.item())
    for key in FOUND:
        masked = [n for n in range(N) if n not in live]
        assert (getattr(inside, key)[masked] == 0).all()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["sft", "reinforce", "lco-kld", "gspo-unclipped"])
def test_the_real_step_of_the_head_does_what_they_predict(name: str, kind: str) -> None:
    """True KL and true fall of the loss after a real step: m_F_exact and m_H miss by the third order, 8 times less
    at half the learning rate. The empirical m_F does not come near at any rate."""
    head = full_head("all", 30)
    objective, _ = PAIRS[name]
    misses, empirical = [], []
    for rate in (2e-3, 1e-3):
        adam = None
        state = None
        if kind == "adam":
            adam = warm_adam(head, rate)
            state = layer_of(head, rate, adam).adam
        found = lg.last_layer_curvature(
            objective, head.logits, head.batch, layer=lg.LastLayer(head.hidden, rate, state), levels=["global"]
        )
        weight = head.weight.clone().requires_grad_()
        (total_loss(name, head.hidden @ weight.T, head.batch) / N).backward()
        after = head.hidden @ (head.weight + real_step(head, weight.grad, rate, adam)).T
        kl = lg.update_kl(head.logits, after).mean
        rise = (total_loss(name, head.logits, head.batch) - total_loss(name, after, head.batch)) / N
        misses.append([(kl - found.update.m_F_exact).abs(), (rise - found.update.m_H).abs()])
        empirical.append((found.update.m_F_empirical / kl - 1).abs())
    ratio = torch.tensor(misses[0]) / torch.tensor(misses[1])
    assert ((ratio > 6) & (ratio < 10)).all(), ratio
    assert min(empirical) > 0.1


def test_the_rule_judges_by_the_same_numbers() -> None:
    head = full_head("some", 9)
    _, layer = optimizer_of("adam", head)
    objective = lg.objective("grpo")
    found = lg.last_layer_curvature(objective, head.logits, head.batch, layer=layer)
    rule = lg.intervention("capo", level=["token", "sentence", "global"])
    scores = rule(head.logits, head.batch, objective=objective, layer=layer).scores
    place = torch.searchsorted(found.sentence_ids, SEQUENCES)
    for key in FOUND:
        torch.testing.assert_close(scores[f"token.{key}"], getattr(found.token, key), rtol=0, atol=0)
        torch.testing.assert_close(scores[f"sentence.{key}"], getattr(found.sentence, key)[place])
        torch.testing.assert_close(scores[f"global.{key}"], getattr(found.update, key).expand(N))


def test_a_loss_that_only_autograd_knows() -> None:
    head = full_head("some", 7)
    _, layer = optimizer_of("sgd", head)
    unknown = lg.autograd_objective(
        lambda z, b: -b.advantages * torch.log_softmax(z, 1).gather(1, b.actions[:, None])[:, 0]
    )
    found, expected = (
        lg.last_layer_curvature(one, head.logits, head.batch, layer=layer)
        for one in (unknown, lg.objective("reinforce"))
    )
    for level in ("token", "sentence", "update", "token_in_update"):
        for key in FOUND:
            a, b = getattr(getattr(found, level), key), getattr(getattr(expected, level), key)
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_levels_asked_for_and_bad_input() -> None:
    head = full_head("all", 7)
    layer = lg.LastLayer(head.hidden, 0.1)
    sft = lg.objective("sft")
    only = lg.last_layer_curvature(sft, head.logits, replace(head.batch, sequences=None), layer=layer, levels=["token"])
    assert [field.name for field in fields(only) if getattr(only, field.name) is not None] == ["token"]
    for options, message in (
        ({"levels": ["word"]}, "levels: .*'word'.*token, sentence, global"),
        ({"levels": "token"}, "levels: 'token'; must be a list"),
        ({"levels": []}, "levels: "),
        ({"batch": replace(head.batch, sequences=None)}, "sequences: .*TokenBatch"),
        ({"logits": head.logits.log()}, "logits: token 0"),
        ({"layer": lg.LastLayer(head.hidden[:3], 0.1)}, "hidden: 3 rows, but the batch has 7"),
    ):
        given = {"logits": head.logits, "batch": head.batch, "layer": layer} | options
        with pytest.raises(ValueError, match=message):
            lg.last_layer_curvature(sft, given.pop("logits"), given.pop("batch"), **given)


@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_on_the_device(name: str, device: torch.device) -> None:
    """The same numbers wherever it runs; on a machine without a GPU this compares the CPU with itself."""
    head = full_head("some", 9)
    _, layer = optimizer_of("adam", head)
    objective = PAIRS[name][0]
    expected = lg.last_layer_curvature(objective, head.logits, head.batch, layer=layer)
    given = {key: value.to(device) for key, value in vars(head.batch).items() if value is not None}
    state = lg.AdamState(layer.adam.exp_avg.to(device), layer.adam.exp_avg_sq.to(device), 3)
    there = lg.LastLayer(head.hidden.to(device), RATES["adam"], state)
    found = lg.last_layer_curvature(objective, head.logits.to(device), lg.TokenBatch(**given), layer=there)
    for level in ("token", "sentence", "update", "token_in_update"):
        for key in FOUND:
            one = getattr(getattr(found, level), key)
            assert one.device.type == device.type
            torch.testing.assert_close(one.cpu(), getattr(getattr(expected, level), key), rtol=1e-9, atol=1e-12)
