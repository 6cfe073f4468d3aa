"""Sampling over pages of a cache gives what sampling side by side gives."""

from __future__ import annotations

import pytest
import torch

from lcogeom.models import load_model
from lcogeom.training import TrainSettings, load_task
from lcogeom.training.rollout import generate


def test_the_likeliest_completions_are_the_same(device: torch.device) -> None:
    """At a temperature of almost 0 no random number matters. Prompts of several lengths, completions too."""
    tiny = load_model("tiny", device=device)
    problems = load_task("addition-1").draw(5, 0) + load_task("addition-2").draw(5, 0)
    state = torch.random.get_rng_state()
    found, wanted = (
        generate(
            tiny.model,
            tiny.tokenizer,
            problems,
            max_new_tokens=5,
            seed=0,
            stop="\n",
            temperature=1e-4,
            continuous=continuous,
        )
        for continuous in (True, False)
    )
    assert [sample.completion_ids for sample in found] == [sample.completion_ids for sample in wanted]
    assert len({len(sample.completion_ids) for sample in found}) > 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_seed_gives_its_completions_again(device: torch.device) -> None:
    tiny = load_model("tiny", device=device)
    problems = load_task("addition-2").draw(12, 0)
    first, again, other = (
        [
            sample.completion_ids
            for sample in generate(
                tiny.model, tiny.tokenizer, problems, max_new_tokens=5, seed=seed, stop="\n", continuous=True
            )
        ]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_not_with_shards() -> None:
    with pytest.raises(ValueError, match="continuous_batching: not with parameters that are sharded"):
        TrainSettings(continuous_batching=True, fsdp=True)
