"""Tasks: what is held out is never drawn, answers are right, draws are what their seed says."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcogeom.models import load_model
from lcogeom.training import Problem, Task, hard_answers, load_task, score
from lcogeom.training.rollout import generate
from lcogeom.training.tasks import NAMES

GYM = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is of the extra `reasoning-gym`"
)
HERE = [pytest.param(name, id=name) for name in NAMES]
EVERY = [*HERE, pytest.param("reasoning-gym:chain_sum", marks=GYM), pytest.param("reasoning-gym:gcd", marks=GYM)]


def spelled(problem: Problem) -> tuple[int, int, str, int]:
    """(a, b, operation, the right answer) as the prompt has them, worked out again."""
    line = problem.prompt.splitlines()[-1].rstrip(" =")
    operation = "+" if "+" in line else "*"
    a, b = map(int, line.split(operation))
    return a, b, operation, a + b if operation == "+" else a * b


@pytest.mark.parametrize("name", EVERY)
def test_nothing_held_out_is_ever_drawn(name: str) -> None:
    """Of every seed of the split and many draws; of a task made here, all training problems are seen."""
    for split in range(3):
        task = load_task(name, held_out=30, seed=split)
        prompts = {problem.prompt for problem in task.held_out}
        assert 10 < len(prompts) == len(task.held_out) <= 30
        for seed in range(4):
            drawn = task.draw(100, seed)
            assert len(drawn) == 100
            assert not prompts & {problem.prompt for problem in drawn}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 2**40), st.integers(1, 10**4), st.integers(0, 300), st.integers(0, 2**40))
def test_the_split_whatever_the_numbers(name: str, split: int, held_out: int, count: int, seed: int) -> None:
    task = load_task(name, held_out=held_out, seed=split)
    prompts = {problem.prompt for problem in task.held_out}
    drawn = task.draw(count, seed)
    assert len(drawn) == count
    assert len(prompts) == len(task.held_out) <= held_out
    assert not prompts & {problem.prompt for problem in drawn}


@pytest.mark.parametrize("name", HERE)
def test_the_order_of_two_numbers_is_no_loophole(name: str) -> None:
    """b + a is held out with a + b, and no product that the prompt itself shows."""
    task = load_task(name)
    pairs = {spelled(problem)[:2] for problem in task.held_out}
    assert pairs == {(b, a) for a, b in pairs}
    for problem in task.held_out:
        assert not any(
            line == f"{problem.prompt.splitlines()[-1]} {problem.answer}" for line in problem.prompt.split("\n")
        )
    if name == "products":
        assert not pairs & {(2, 9), (9, 2), (3, 7), (7, 3)}


def everything(task: Task, count: int) -> Counter[tuple[int, int]]:
    return Counter(spelled(problem)[:2] for problem in task.draw(count, 0))


def test_draws_go_through_all_problems_before_any_comes_again() -> None:
    for name, total, low, high in (("addition-1", 81, 1, 9), ("products", 64, 2, 9), ("addition-2", 8100, 10, 99)):
        task = load_task(name)
        rest = total - len(task.held_out)
        assert len(task.held_out) == min(200, total // 4)
        once, more = everything(task, rest), everything(task, 2 * rest + 1)
        assert len(once) == rest
        assert set(once.values()) == {1}
        assert {a for a, _ in once} == set(range(low, high + 1))
        assert sorted(set(more.values())) == [2, 3]


@pytest.mark.parametrize("name", EVERY)
def test_a_draw_is_its_seed(name: str) -> None:
    """Neighbouring seeds share no more than chance would have them share: a reasoning-gym seed is the first of many."""
    task = load_task(name)
    assert task.draw(8, 5) == task.draw(8, 5) == load_task(name).draw(8, 5)
    assert load_task(name).held_out == task.held_out != load_task(name, seed=1).held_out
    draws = [tuple(problem.prompt for problem in task.draw(8, seed)) for seed in range(20)]
    assert len(set(draws)) == 20
    if name in ("addition-2", "reasoning-gym:chain_sum"):
        assert len({prompt for draw in draws for prompt in draw}) > 140


@pytest.mark.parametrize("name", HERE)
def test_answers_and_solutions_are_right(name: str) -> None:
    task = load_task(name)
    for problem in (*task.held_out, *task.draw(100, 0)):
        *_, operation, result = spelled(problem)
        text = str(result)[::-1] if operation == "+" else str(result)
        assert problem.answer == text
        assert problem.solution.strip() == text
        assert problem.solution.endswith("\n")
        assert score(problem.solution, problem) == 1
        assert score(str(result + 1), problem) == 0


def test_a_missing_zero_is_wrong() -> None:
    """9 + 1 = 10 is written "01"; a bare "1" is another sum."""
    (problem,) = (p for p in load_task("addition-1").draw(61, 0) if p.answer == "01" and p.prompt == "9+1=")
    assert score("01", problem) == 1
    assert score("1", problem) == 0


def test_arithmetic_is_what_replay_draws() -> None:
    assert {spelled(p)[2] for p in load_task("arithmetic", characters=True).held_out} == {"+"}
    assert {spelled(p)[2] for p in load_task("arithmetic").held_out} == {"*"}


def test_the_tiny_model_knows_the_form() -> None:
    """It was trained on sums up to 99 + 99; at random it would be right in 1 of 100 or so."""
    tiny = load_model("tiny", device="cpu")
    for name, least in (("addition-1", 0.15), ("addition-2", 0.4)):
        problems = load_task(name).draw(300, 0)
        samples = generate(tiny.model, tiny.tokenizer, problems, max_new_tokens=5, seed=0, stop="\n")
        assert sum(sample.reward for sample in samples) / 300 > least


@GYM
@pytest.mark.parametrize(
    "name", ["chain_sum", "gcd", "countdown", "graph_color", "letter_counting", "simple_equations"]
)
def test_reasoning_gym_scores_its_own_answers(name: str) -> None:
    """The metadata reach the scorer as they were, tuples and whole-number keys included (graph_color has those)."""
    import reasoning_gym

    task = load_task(f"reasoning-gym:{name}", held_out=8)
    scorer = reasoning_gym.get_score_answer_fn(name)
    for problem in task.held_out:
        entry = {
            "question": problem.prompt,
            "answer": problem.answer,
            "metadata": eval(str(problem.details["metadata"])),
        }
        for answer in (problem.answer, "", "17", "nothing of the kind"):
            assert score(answer, problem) == pytest.approx(min(1, max(0, scorer(answer, entry))))
    if name == "chain_sum":
        assert score(f"Thus <answer> {problem.answer} </answer>.", problem) == 1


@GYM
def test_reasoning_gym_with_a_template() -> None:
    plain = load_task("reasoning-gym:chain_sum", held_out=5)
    asked = load_task("reasoning-gym:chain_sum", held_out=5, template="Q: {question}\nA:")
    assert [p.prompt for p in asked.held_out] == [f"Q: {p.prompt}\nA:" for p in plain.held_out]
    assert score(asked.held_out[0].answer, asked.held_out[0]) == 1


@GYM
def test_reasoning_gym_completions_that_hang_or_act(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The countdown scorer evaluates what it is given: as reasoning-gym has it, each of these would do what it says."""
    hard_answers._WORKER.stop()
    monkeypatch.setattr(hard_answers, "SECONDS", 1)
    (problem,) = load_task("reasoning-gym:countdown", held_out=1).held_out
    touched = tmp_path / "touched"
    for completion in (
        "9**9**9**9",
        "exit()",
        "print(1.0)",
        f"__import__('os').system('touch {touched}')",
        f"__import__('subprocess').run(['touch', '{touched}'])",
        f"open('{touched}', 'w')",
    ):
        assert score(completion, problem) < 1
        assert score(problem.answer, problem) == 1
    assert not touched.exists()
    hard_answers._WORKER.stop()
    monkeypatch.setattr(hard_answers, "CLOCK_SECONDS", 2)
    assert score("__import__('time').sleep(10**6)", problem) < 1
    hard_answers._WORKER.stop()


@GYM
def test_an_unknown_reasoning_gym_task() -> None:
    with pytest.raises(ValueError, match="Did you mean 'chain_sum'"):
        load_task("reasoning-gym:chainsum")


def test_reasoning_gym_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hard_answers.LIBRARIES, "reasoning-gym", ("no_such_module", "reasoning-gym"))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lcogeom\[reasoning-gym\]'"):
        load_task("reasoning-gym:chain_sum")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("additions", {}, "no task 'additions'. There are: addition-1"),
        ("products", {"held_out": 0}, "held_out: 0"),
        ("products", {"template": "{question}"}, "take none"),
        ("a.jsonl", {"template": "question"}, "must hold {question}"),
    ],
)
def test_bad_input(name: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_task(name, **options)
