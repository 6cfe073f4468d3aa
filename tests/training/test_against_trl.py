"""The trainer's GRPO against TRL's own GRPOTrainer: same batch, same weights, same loss and gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl

import lcogeom as lg
from lcogeom.training.buffer import Rollout
from lcogeom.training.learner import Learner, build_learner
from lcogeom.training.rollout import Sequences, side_by_side
from lcogeom.training.sampling import sample_all
from lcogeom.training.tasks import load_task
from lcogeom.training.update import policy_loss
from tests.training.runs import small

TRL_NAMES = {"sequence": "grpo", "token": "bnpo", "constant": "dr_grpo"}


def rollout_of(learner: Learner) -> Rollout:
    """16 completions of different lengths, advantages of both signs, an old policy that is not the policy's own."""
    settings = learner.settings
    problems = load_task("addition-2", held_out=4).draw(settings.prompts, 0)
    asked = [problem for problem in problems for _ in range(settings.samples)]
    sequences = side_by_side(sample_all(learner, asked, 1), learner.tokenizer.pad_token_id, learner.device)
    shape = sequences.input_ids.shape
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randn(shape, generator=draw) for _ in range(2)]
    advantages = torch.randn(shape[0], generator=draw)[:, None].expand(shape)
    with torch.no_grad():
        logits = learner.model(sequences.input_ids, attention_mask=sequences.attention_mask).logits
    logp = torch.zeros(shape)
    logp[:, 1:] = logits[:, :-1].log_softmax(2).gather(2, sequences.input_ids[:, 1:, None]).squeeze(2)
    old, ref = ((logp + 0.3 * each).clamp(max=-1e-3) for each in noise)
    return Rollout((), sequences, torch.zeros(shape[0]), advantages, None, old, None, ref)


def as_trl(sequences: Sequences, rollout: Rollout) -> dict[str, Any]:
    """The same batch in TRL's layout: prompts padded on the left, completions on the right."""
    mask = sequences.action_mask
    starts, lengths = mask.int().argmax(1), mask.sum(1)
    prompt, completion = int(starts.max()), int(lengths.max())
    shapes = (len(mask), prompt), (len(mask), completion)
    inputs: dict[str, Any] = {
        "prompt_ids": torch.zeros(shapes[0], dtype=torch.long),
        "prompt_mask": torch.zeros(shapes[0], dtype=torch.long),
        "completion_ids": torch.zeros(shapes[1], dtype=torch.long),
        "completion_mask": torch.zeros(shapes[1], dtype=torch.long),
        "old_per_token_logps": torch.zeros(shapes[1]),
        "ref_per_token_logps": torch.zeros(shapes[1]),
        "num_items_in_batch": mask.sum(),
    }
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        end = slice(start, start + length)
        inputs["prompt_ids"][row, prompt - start :] = sequences.input_ids[row, :start]
        inputs["prompt_mask"][row, prompt - start :] = 1
        inputs["completion_ids"][row, :length] = sequences.input_ids[row, end]
        inputs["completion_mask"][row, :length] = 1
        inputs["old_per_token_logps"][row, :length] = rollout.old_logprobs[row, end]
        inputs["ref_per_token_logps"][row, :length] = rollout.ref_logprobs[row, end]
    inputs["advantages"] = rollout.advantages[:, -1]
    return inputs


@pytest.mark.parametrize(("reduction", "beta"), [("sequence", 0.0), ("token", 0.04), ("constant", 0.04)])
def test_loss_and_gradient_are_those_of_trl(reduction: str, beta: float, tmp_path: Path) -> None:
    settings = small("tiny-grpo", reduction=reduction, objective_options={"beta": beta}, micro_batches=2)
    learner = build_learner(settings, lg.load_model("tiny", device="cpu"))
    rollout = rollout_of(learner)
    tokens = rollout.sequences.action_mask.sum()
    assert len(rollout.sequences.action_mask.sum(1).unique()) > 1
    ours = torch.zeros(())
    for rows in torch.arange(settings.rollout_size).chunk(settings.micro_batches):
        loss, _ = policy_loss(learner, rollout, rows, tokens=tokens, completions=settings.rollout_size)
        loss.backward()
        ours = ours + loss.detach()

    theirs = trl.GRPOTrainer(
        model=lg.load_model("tiny", device="cpu").model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            loss_type=TRL_NAMES[reduction],
            beta=beta,
            use_bias_correction_kl=False,  # the published penalty
            num_generations=settings.samples,
            per_device_train_batch_size=settings.rollout_size,
            max_completion_length=settings.max_new_tokens,
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1+1="]}),
        processing_class=learner.tokenizer,
    )
    theirs.current_gradient_accumulation_steps = 1
    model = theirs.model.train()
    loss = theirs._compute_loss(model, as_trl(rollout.sequences, rollout))
    loss.backward()

    torch.testing.assert_close(ours, loss.detach(), rtol=1e-5, atol=1e-7)
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    found = torch.cat([parameter.grad.flatten() for parameter in learner.policy.parameters()])
    assert float(expected.norm()) > 0.1
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_a_rollout_that_gives_one_update_has_ratios_of_one() -> None:
    """TRL takes the policy's own log-probabilities where it has not moved; so does a rollout without an old policy."""
    learner = build_learner(small("tiny-grpo"), lg.load_model("tiny", device="cpu"))
    rollout = replace(rollout_of(learner), old_logprobs=None)
    tokens = rollout.sequences.action_mask.sum()
    rows = torch.arange(16)
    loss, _ = policy_loss(learner, rollout, rows, tokens=tokens, completions=16)
    torch.testing.assert_close(loss.detach(), -rollout.advantages[:, 0].mean(), rtol=1e-5, atol=1e-6)
