"""A plain GRPO loop, two updates on each rollout, in which the learning rate is 1 once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import lcogeom as lg
from lcogeom.models import LoadedModel
from lcogeom.training.rollout import Sequences, generate, pad_id, side_by_side
from lcogeom.training.tasks import arithmetic

GROUP = 4


@dataclass(frozen=True)
class Seen:
    """What the loop had in its own hands, update by update."""

    losses: list[float]
    completions: list[list[list[str]]]
    """Texts of the tokens of each completion."""
    optimizer_state: dict
    """Before the step after `at`."""


def logprobs(model: torch.nn.Module, batch: Sequences) -> Tensor:
    """(B, T): of the tokens themselves, 0 for the first."""
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    picked = torch.log_softmax(logits, 2).gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    return torch.nn.functional.pad(picked, (1, 0))


def explode(
    loaded: LoadedModel, run: Path, *, at: int, updates: int, learning_rate: float, problems: int = 4, stop: str = "\n"
) -> Seen:
    """Record a loop whose update `at` has learning rate 1."""
    model, tokenizer = loaded.model, loaded.tokenizer
    reference = copy.deepcopy(model)
    objective = lg.objective("grpo")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    seen = Seen([], [], {})
    with lg.attach(
        model, optimizer, run=run, objective=objective, tokenizer=tokenizer, black_box_weights=True
    ) as probe:
        for update in range(updates):
            if update % 2 == 0:
                asked = arithmetic(problems, seed=update, characters=loaded.name == "tiny")
                repeated = [problem for problem in asked for _ in range(GROUP)]
                samples = generate(model, tokenizer, repeated, max_new_tokens=6, seed=update, stop=stop)
                batch = side_by_side(samples, pad_id(tokenizer), model.device)
                rewards = torch.tensor([sample.reward for sample in samples], device=model.device).view(-1, GROUP)
                group = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
                advantages = group.reshape(-1, 1).expand(batch.input_ids.shape)
                old, ref = logprobs(model, batch), logprobs(reference, batch)
            mask = batch.action_mask
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1][mask[:, 1:]]
            tokens = lg.TokenBatch(batch.input_ids[mask], advantages[mask], old[mask], ref[mask])
            loss = objective.loss(logits, tokens).mean()
            probe.batch(
                input_ids=batch.input_ids,
                action_mask=mask,
                advantages=advantages,
                old_logprobs=old,
                ref_logprobs=ref,
                loss=loss,
            )
            optimizer.zero_grad()
            loss.backward()
            for group_settings in optimizer.param_groups:
                group_settings["lr"] = 1.0 if update == at else learning_rate
            if update == at + 1:
                seen.optimizer_state.update(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
            seen.losses.append(float(loss.detach()))
            seen.completions.append([[tokenizer.decode([i]) for i in sample.completion_ids] for sample in samples])
    return seen
