"""The paper's dynamics experiment, small, on the real tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

import lcogeom as lg
from lcogeom.models import load_model
from lcogeom.training import DEFAULT_OBJECTIVES, Problem, ReplaySettings, arithmetic, read_problems, replay, score
from lcogeom.training.replay import variant_objective


@pytest.fixture(scope="module")
def recorded(tiny_replay: Path) -> lg.Run:
    return lg.load_run(tiny_replay)


def test_everything_is_there(recorded: lg.Run) -> None:
    counts = recorded.updates.groupby(["variant", "seed"]).size()
    assert set(counts.index) == {(name, seed) for name in DEFAULT_OBJECTIVES for seed in (0, 1)}
    assert (counts == 12).all()
    assert recorded.updates["loss"].notna().all()
    listed = recorded.columns[recorded.columns["table"] == "updates"]["name"]
    assert set(listed) | {"model", "variant", "seed"} == set(recorded.updates.columns)
    tokens = recorded.tokens.groupby(["variant", "seed", "step"]).size()
    updates = recorded.updates.set_index(["variant", "seed", "step"])["tokens"]
    assert (tokens == updates.reindex(tokens.index)).all()
    assert recorded.tokens["text"].notna().all()


def test_all_start_from_the_same_weights_on_the_same_batch(recorded: lg.Run) -> None:
    first = recorded.tokens[recorded.tokens["step"] == 0]
    for _, same in first.groupby(["seed", "sequence", "position"]):
        assert len(same) == len(DEFAULT_OBJECTIVES)
        assert same["token_id"].nunique() == 1
        assert same["logprob"].nunique() == 1
        np.testing.assert_allclose(same["ratio"], 1.0, atol=1e-5)
    assert first.groupby("seed")["logprob"].sum().nunique() == 2  # another seed is another batch


def test_convex_objectives_are_convex_at_every_token(recorded: lg.Run) -> None:
    for name in ("sft", "lco-kld", "lco-mse", "lco-lch"):
        tokens = recorded.tokens[recorded.tokens["variant"] == name]
        assert len(tokens) > 100
        assert tokens["convex"].eq(True).all()
        assert (recorded.updates.loc[recorded.updates["variant"] == name, "convex_share"] == 1).all()


def test_unclipped_ppo_is_convex_exactly_where_the_criterion_says(recorded: lg.Run) -> None:
    tokens = recorded.tokens[recorded.tokens["variant"].str.startswith("ppo-unclipped")]
    wanted = (tokens["advantage"] == 0) | ((tokens["advantage"] > 0) & (tokens["prob"] >= 0.5))
    assert 0 < wanted.sum() < len(tokens)
    assert (tokens["convex"] == wanted).all()
    vocab = 18
    negative = tokens["advantage"] < 0
    assert (tokens.loc[negative, "negative_count"] == vocab - 2 + (tokens.loc[negative, "prob"] >= 0.5)).all()


def test_the_gradient_is_that_of_the_objective(recorded: lg.Run) -> None:
    """f' as recovered from the back-propagated logits equals the table of method.md 2.1, at every token and update.

    Tolerance: the trained gradient is float32, whose p - e_a has an absolute error of 1e-7 or so.
    """
    for name, slope in {
        "sft": lambda t: -1.0 + 0 * t["advantage"],
        "reinforce:negative": lambda t: -t["advantage"],
        "ppo-unclipped:positive": lambda t: -t["advantage"] * t["ratio"],
        "ppo-unclipped:negative": lambda t: -t["advantage"] * t["ratio"],
    }.items():
        tokens = recorded.tokens[recorded.tokens["variant"] == name]
        sizes = tokens.groupby(["seed", "step"])["d1"].transform("size")
        np.testing.assert_allclose(tokens["d1"] * sizes, slope(tokens), rtol=2e-3, atol=1e-5)
        assert tokens["misfit"].max() < 0.01


def test_samples_are_kept_and_selected(tiny_replay: Path, tmp_path: Path) -> None:
    samples = json.loads((tiny_replay / "samples-seed-0.json").read_text())
    assert [sample["reward"] for sample in samples] == [1.0] * 4 + [0.0] * 4
    for sample in samples:
        assert score(sample["completion"], Problem(sample["prompt"], sample["answer"])) == sample["reward"]
    tokens = lg.load_run(tiny_replay).tokens.query("seed == 0 and step == 0 and variant == 'sft'")
    spoken = tokens.groupby("sequence")["text"].agg("".join).tolist()
    assert spoken == [sample["completion"] + "\n" for sample in samples]  # the token that ends it is an action too
    for select, reward in (("positive", 1.0), ("negative", 0.0)):
        run = replay(ReplaySettings(objectives=("reinforce",), select=select, updates=1), tmp_path / select)
        samples = json.loads((run / "samples-seed-0.json").read_text())
        assert [sample["reward"] for sample in samples] == [reward] * 6
        assert (lg.load_run(run).tokens["advantage"] == 2 * reward - 1).all()


def test_the_same_settings_give_the_same_bits(tiny_replay: Path, tmp_path: Path) -> None:
    again = replay(ReplaySettings(model="tiny", objectives=("ppo",), sequences=8, updates=12, seeds=2), tmp_path / "b")
    before, after = (lg.load_run(path).updates.query("variant == 'ppo'") for path in (tiny_replay, again))
    for column in ("loss", "grad_norm", "entropy", "update_norm"):
        assert before[column].tolist() == after[column].tolist()


def test_a_file_of_problems(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in arithmetic(40, 1, characters=True))
    )
    settings = ReplaySettings(objectives=("sft",), problems=str(file), updates=2, stop="\n")
    assert len(lg.load_run(replay(settings, tmp_path / "run")).updates) == 2


def test_a_model_of_your_own_from_a_folder(tmp_path: Path) -> None:
    """GPT-2 (fused qkv, learned positions) with the character tokenizer, random weights, by path."""
    tokenizer = load_model("tiny").tokenizer
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=64, eos_token_id=17, bos_token_id=17
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    settings = ReplaySettings(
        model=str(tmp_path / "gpt2"), problems="arithmetic-characters", select="negative", updates=3, tap="hidden"
    )
    run = lg.load_run(replay(settings, tmp_path / "run"))
    assert len(run.updates) == 3 * len(DEFAULT_OBJECTIVES)
    assert run.updates["qkv_mean_frobenius"].notna().all()
    assert run.tokens["misfit"].max() < 0.05


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "1+1=", "answer": }', "line 3"),
        ('{"prompt": "1+1="}', "line 3: no 'answer'"),
        ('["1+1=", "2"]', "line 3: no 'prompt'"),
        ('{"prompt": "", "answer": "2"}', "line 3: 'prompt' is not a text"),
        ('{"prompt": "1+1=", "answer": null}', "line 3: 'answer' is not a text"),
    ],
)
def test_a_broken_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": 2}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=said):
        read_problems(file)


def test_problems_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        read_problems(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no problem"):
        read_problems(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9", "answer": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_problems(tmp_path / "latin.jsonl")


def test_too_few_completions_of_a_kind(tmp_path: Path) -> None:
    file = tmp_path / "impossible.jsonl"
    file.write_text('{"prompt": "1+1=", "answer": "never"}\n')
    settings = ReplaySettings(problems=str(file), select="positive", sampling_rounds=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="0 of 6 with reward 1"):
        replay(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objectives": ("ppo:up",)}, "objectives"),
        ({"objectives": ("grpoo",)}, "no objective 'grpoo'"),
        ({"objectives": ("ppo", "ppo")}, "none twice"),
        ({"updates": 0}, "updates: 0"),
        ({"select": "best"}, "select"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"beta": -1.0}, "beta"),
        ({"sequences": 1}, "cannot be mixed"),
    ],
)
def test_settings_out_of_range(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ReplaySettings(**wrong)


def test_variants() -> None:
    unclipped, advantage = variant_objective("ppo-unclipped:negative")
    assert (unclipped.options["clip_low"], unclipped.options["clip_high"], advantage) == (None, None, -1.0)
    lco, advantage = variant_objective("lco-mse", beta=0.5)
    assert (lco.options["beta"], advantage) == (0.5, None)


def test_arithmetic_answers_are_right() -> None:
    for problem in arithmetic(200, 3, characters=True):
        a, b = map(int, problem.prompt.rstrip("=").split("+"))
        assert int(problem.answer[::-1]) == a + b
    for problem in arithmetic(200, 3):
        a, b = problem.prompt.splitlines()[-1].rstrip(" =").split(" * ")
        assert int(a) * int(b) == int(problem.answer)
    assert arithmetic(5, 1) == arithmetic(5, 1) != arithmetic(5, 2)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (" 13 + 3 = 16\n", "16", 1),
        (" 16, or 17", "16", 0),
        (" 16\n2 * 3 = 6", "6", 1),
        ("1,234", "1234", 1),
        ("-5", "5", 0),
        ("", "5", 0),
        ("yes \n", "yes", 1),
    ],
)
def test_score(completion: str, answer: str, reward: float) -> None:
    assert score(completion, Problem("?", answer)) == reward


def test_score_of_the_first_line() -> None:
    assert score(" 16\n2 * 3 = 6", Problem("?", "16", first_line=True)) == 1
    assert score(" 16\n2 * 3 = 6", Problem("?", "6", first_line=True)) == 0
