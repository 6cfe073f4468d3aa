"""The trainer's losses against plain float64 loops (PPO, its critic) and against the registry on full logits (LCO)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lcogeom as lg
from lcogeom.training.buffer import Rollout
from lcogeom.training.learner import Learner, build_learner
from lcogeom.training.tasks import load_task
from lcogeom.training.trainer import make_rollout, with_advantages, with_policies
from lcogeom.training.update import critic_loss, policy_loss
from tests.training.runs import small


def learner_and_rollout(name: str, **changes: Any) -> tuple[Learner, Rollout]:
    """A learner that has moved since its rollout."""
    learner = build_learner(small(name, **changes), lg.load_model("tiny", device="cpu"))
    if learner.critic is not None:
        shake(learner.critic, 0.1)
    task = load_task("addition-2", held_out=4)
    return learner, with_policies(learner, with_advantages(learner, make_rollout(learner, task, 0)))


def shake(model: torch.nn.Module, size: float) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * (parameter.std(correction=0) + 0.01) * size)


def in_parts(learner: Learner, rollout: Rollout) -> Tensor:
    """Loss of an update in two micro-batches, its gradient left in the parameters."""
    rows = torch.arange(len(rollout.sequences.input_ids))
    tokens = rollout.sequences.action_mask.sum()
    total = torch.zeros(())
    for part in rows.chunk(2):
        loss, _ = policy_loss(learner, rollout, part, tokens=tokens, completions=len(rows))
        loss.backward()
        total = total + loss.detach()
    return total


def gradient(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float(expected.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_ppo_and_its_critic_are_those_of_a_plain_float64_loop() -> None:
    gamma, lam, clip = 0.9, 0.8, 0.2
    learner, rollout = learner_and_rollout("tiny-ppo", gamma=gamma, lam=lam, critic_clip=0.05, max_new_tokens=6)
    policy, critic = copy.deepcopy(learner.policy).double(), copy.deepcopy(learner.critic).double()
    moved, moved_critic = learner.policy, learner.critic
    shake(moved, 0.06)
    shake(moved_critic, 0.06)
    found = in_parts(learner, rollout)
    rows = torch.arange(16)
    tokens = rollout.sequences.action_mask.sum()
    found_critic = sum((critic_loss(learner, rollout, part, tokens) for part in rows.chunk(2)), torch.zeros(()))
    found_critic.backward()

    # From here on nothing of the trainer's: old and new models in float64, token by token.
    new, new_critic = copy.deepcopy(moved).double(), copy.deepcopy(moved_critic).double()
    new.zero_grad()
    new_critic.zero_grad()
    steps, losses, value_losses, all_advantages = [], [], [], []
    for row in range(16):
        sample = rollout.samples[row]
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        start, end = len(sample.prompt_ids), ids.shape[1]
        ones = torch.ones_like(ids)
        logps = [
            m(ids).logits[0].log_softmax(1)[torch.arange(start - 1, end - 1), ids[0, start:]] for m in (policy, new)
        ]
        bodies = [(m.body(ids, ones).last_hidden_state @ m.head.weight.T + m.head.bias) for m in (critic, new_critic)]
        values = [body[0, start - 1 : end - 1, 0] for body in bodies]
        old = [*values[0].tolist(), 0.0]
        count = end - start
        rewards = [0.0] * (count - 1) + [sample.reward]
        deltas = [rewards[t] + gamma * old[t + 1] - old[t] for t in range(count)]
        advantages = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, count)) for t in range(count)]
        all_advantages += advantages
        steps.append((logps, values, old, advantages))
    mean = sum(all_advantages) / len(all_advantages)
    std = (sum((a - mean) ** 2 for a in all_advantages) / (len(all_advantages) - 1)) ** 0.5
    ratios = []
    for logps, values, old, advantages in steps:
        for t, advantage in enumerate(advantages):
            ratio = (logps[1][t] - logps[0][t].detach()).exp()
            ratios.append(float(ratio.detach()))
            white = (advantage - mean) / std
            losses.append(-torch.minimum(ratio * white, ratio.clamp(1 - clip, 1 + clip) * white))
            target = advantage + old[t]
            near = old[t] + (values[1][t] - old[t]).clamp(-0.05, 0.05)
            value_losses.append(torch.maximum((values[1][t] - target) ** 2, (near - target) ** 2) / 2)
    assert min(ratios) < 1 - clip
    assert max(ratios) > 1 + clip
    expected, expected_critic = torch.stack(losses).mean(), torch.stack(value_losses).mean()
    expected.backward()
    expected_critic.backward()
    terms = torch.stack(losses).detach().abs().mean()  # whitened advantages: the terms all but cancel
    assert float((found - expected.detach()).abs() / terms) < 1e-5
    close(found_critic.detach().double(), expected_critic.detach())
    close(gradient(moved), gradient(new))
    close(gradient(moved_critic), gradient(new_critic))


DENSE = {"sparse": 0, "top-k": 5, "full": 18}


@pytest.mark.parametrize("form", ["kld", "mse", "lch"])
@pytest.mark.parametrize("advantages", DENSE)
@pytest.mark.parametrize("epoch", ["first", "later"])
def test_lco_is_the_registry_on_full_logits(form: str, advantages: str, epoch: str) -> None:
    """Old logits come back from hidden states and the old head; here they are kept whole."""
    learner, rollout = learner_and_rollout(f"tiny-lco-{form}", temperature=0.7)
    mask = rollout.sequences.action_mask
    if k := DENSE[advantages]:
        draw = torch.Generator().manual_seed(1)
        ids = torch.stack([torch.randperm(18, generator=draw)[:k] for _ in range(mask.numel())]).view(*mask.shape, k)
        values = torch.randn(ids.shape, generator=draw)
        rollout = replace(rollout, advantages=values, advantage_ids=ids)
    old_logits = logits_at(learner.policy, rollout) / 0.7
    if epoch == "later":
        shake(learner.policy, 0.05)
    found = in_parts(learner, rollout)

    new = copy.deepcopy(learner.policy)
    new.zero_grad()
    batch = lg.TokenBatch(
        actions=rollout.sequences.input_ids[mask],
        advantages=rollout.advantages[mask],
        advantage_ids=None if rollout.advantage_ids is None else rollout.advantage_ids[mask],
        old_logits=old_logits.detach(),
    )
    expected = lg.objective(f"lco-{form}", beta=2.0).loss(logits_at(new, rollout) / 0.7, batch).mean()
    expected.backward()
    close(found.double(), expected.detach().double())
    close(gradient(learner.policy), gradient(new))


def logits_at(model: torch.nn.Module, rollout: Rollout) -> Tensor:
    """(M, V), by a plain forward pass over all positions."""
    logits = model(rollout.sequences.input_ids, attention_mask=rollout.sequences.attention_mask).logits
    return logits[:, :-1][rollout.sequences.action_mask[:, 1:]]


def test_the_authors_old_policy_is_cut_from_the_first_update_on() -> None:
    """Their fp16 top-5 logits, -100 elsewhere, although the policy has not moved yet."""
    settings = {"old_policy": "topk", "inner_epochs": 1}
    learner, rollout = learner_and_rollout("tiny-lco-kld", **settings)
    found = in_parts(learner, rollout)
    mask = rollout.sequences.action_mask
    logits = logits_at(learner.policy, rollout).detach()
    top = logits.topk(5, dim=1)
    cut = torch.full_like(logits, -100.0).scatter(1, top.indices, top.values.half().float())
    batch = lg.TokenBatch(rollout.sequences.input_ids[mask], rollout.advantages[mask], old_logits=cut)
    expected = lg.objective("lco-kld", beta=2.0).loss(logits, batch).mean()
    close(found.double(), expected.double())
    whole = lg.objective("lco-kld", beta=2.0).loss(logits, replace(batch, old_logits=logits)).mean()
    assert abs(float(whole - expected)) > 1e-3 * float(whole)


def test_an_entropy_bonus_and_an_intervention_reach_the_loss() -> None:
    options = {"intervention": "capo", "intervention_options": {"tau_h": 0.002, "tau_f": None}, "entropy_bonus": 0.1}
    learner, rollout = learner_and_rollout("tiny-grpo", **options, inner_epochs=1)
    mask = rollout.sequences.action_mask
    loss, kept = policy_loss(learner, rollout, torch.arange(16), tokens=mask.sum(), completions=16)
    seen: list[Tensor] = []
    hook = learner.policy.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = logits_at(learner.policy, rollout)
    hook.remove()
    hidden = seen[0][:, :-1][mask[:, 1:]].detach()
    batch = lg.TokenBatch(
        rollout.sequences.input_ids[mask],
        rollout.advantages[mask],
        old_logprobs=logits.detach().log_softmax(1).gather(1, rollout.sequences.input_ids[mask][:, None]).squeeze(1),
        sequences=mask.nonzero()[:, 0],
    )
    objective = lg.objective("grpo", beta=0.0) - 0.1 * lg.objective("entropy")
    rule = lg.intervention("capo", tau_h=0.002, tau_f=None)
    choice = rule(logits, batch, objective=objective, layer=lg.LastLayer(hidden, learning_rate=3e-4))
    assert 0 < int(choice.keep.sum()) < len(choice.keep)
    assert int(kept) == int(choice.keep.sum())
    per_token = objective.loss(logits, choice.batch)
    lengths = torch.zeros(16).index_add_(0, batch.sequences, choice.keep.float()).clamp(min=1)
    expected = (per_token / lengths[batch.sequences]).sum() / 16
    close(loss.detach(), expected.detach())
