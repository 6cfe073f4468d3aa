"""Advantages of each token of a rollout, read from a second model: DPO's log-ratio, Q-RM's verifier, ADPA's teacher."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lcogeom.training.buffer import Rollout
from lcogeom.training.dense import adpa, dpo_log_ratio, q_rm
from lcogeom.training.learner import Learner
from lcogeom.training.replay import completion_logits


@torch.no_grad()
def dense_advantages(learner: Learner, rollout: Rollout) -> Rollout:
    """The rollout with advantages (B, T, K) of the ids in advantage_ids (B, T, K); 0 and 0, 1, ... elsewhere.

    [systems.md 1.2, 14, 15]
    """
    settings, mask = learner.settings, rollout.sequences.action_mask
    size = settings.mini_batches * settings.micro_batches
    advantages = torch.zeros((*mask.shape, settings.advantage_k), device=learner.device)
    ids = torch.arange(settings.advantage_k, device=learner.device).expand(advantages.shape).clone()
    for rows in torch.arange(len(mask), device=learner.device).chunk(size):
        found, found_ids = _of_rows(learner, rollout, rows)
        part, part_ids = advantages[rows], ids[rows]
        part[mask[rows]], part_ids[mask[rows]] = found.to(part), found_ids
        advantages[rows], ids[rows] = part, part_ids
    return replace(rollout, advantages=advantages, advantage_ids=ids)


def _of_rows(learner: Learner, rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(advantages (M, K), ids (M, K)) of some rows' completion tokens."""
    sequences, k = rollout.sequences[rows], learner.settings.advantage_k
    assert learner.advantage_model is not None

    def logits(model: torch.nn.Module) -> Tensor:
        with learner.precision():
            return completion_logits(model, sequences).float()

    scored = logits(learner.advantage_model)
    if learner.settings.advantages == "q-rm":
        return q_rm(scored, logits(learner.policy), k=k, version="v1")
    with learner.reference_policy() as reference:
        ref_logits = logits(reference)
    if learner.settings.advantages == "adpa":
        return adpa(scored, ref_logits, k=k)
    return dpo_log_ratio(scored, ref_logits, logits(learner.policy), k=k)
