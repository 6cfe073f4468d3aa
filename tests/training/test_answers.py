"""Scores: right answers in whatever form, and completions made to hang, crash or fill the machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcogeom.training import Problem, hard_answers, score
from lcogeom.training.answers import boxed, gsm8k_answer, tagged

pytest.importorskip("math_verify", reason="math-verify is of the extra `train`")


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("He has 48 / 2 = 24.\n#### 24", "24", 1),
        ("#### 24\nWait, 3 of them.", "24", 0),  # the last number behind the mark
        ("#### 1,024", "1024", 1),
        ("so \\boxed{72}, as 5 + 67 = 72 (3 steps)", "72", 1),
        ("so \\boxed{7}, no: \\boxed{72}, 3 steps", "72", 1),
        ("\\boxed{7} #### 72", "72", 1),
        ("72.0", "72", 1),
        ("12345678901234567891", "12345678901234567890", 0),  # equal as floats
        ("9" * 400, "8" * 400, 0),  # both infinite as floats
        ("#### none", "72", 0),
        ("no", "yes", 0),
    ],
)
def test_numbers(completion: str, answer: str, reward: float) -> None:
    assert score(completion, Problem("?", answer)) == reward


def test_text_is_exact() -> None:
    assert score(" 07\n", Problem("?", "07", checker="text")) == 1
    assert score("7", Problem("?", "07", checker="text")) == 0
    with pytest.raises(ValueError, match="checker: 'maths'"):
        Problem("?", "7", checker="maths")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{\\frac{1}{2}} and \\boxed{3}.", "3"),
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{1, 2\\right.}", "\\left\\{1, 2\\right."),
        ("{ } } \\fbox {x} {", "x"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_boxes(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="{}\\box ed5", max_size=60))
def test_boxes_of_anything(text: str) -> None:
    """Against a search for the closing brace from every opening, the last that has one."""
    wanted = None
    for start in (i for i in range(len(text)) if text.startswith("\\boxed{", i)):
        depth, place = 1, start + 7
        while place < len(text) and depth:
            if text[place] == "\\" and text[place + 1 : place + 2] in ("{", "}"):
                place += 1
            elif text[place] in "{}":
                depth += 1 if text[place] == "{" else -1
            place += 1
        if not depth:
            wanted = text[start + 7 : place - 1].strip()
    if (
        "\\box{" not in text
        and "\\box " not in text
        and "\\boxed " not in text
        and "\\boxe" not in text.replace("\\boxed", "")
    ):
        assert boxed(text) == wanted


def test_tags_and_gsm8k() -> None:
    assert tagged("<answer>1</answer> or <answer> 2 </answer> 3") == "2"
    assert tagged(" 4\n") == "4"
    assert tagged("4</answer>") == "4</answer>"
    assert gsm8k_answer("6 * 7 = 42\n#### $1,042") == "1042"
    for broken in ("42", "#### forty", "####"):
        with pytest.raises(ValueError, match="no number behind"):
            gsm8k_answer(broken)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("Therefore it is \\boxed{0.5}.", "\\frac{1}{2}", 1),
        ("\\boxed{\\dfrac12}", "\\frac{1}{2}", 1),
        ("the answer is $\\frac{2}{4}$", "\\frac{1}{2}", 1),
        ("\\boxed{\\frac{1}{3}}", "\\frac{1}{2}", 0),
        ("\\boxed{(1 + x)^2}", "x^2+2x+1", 1),
        ("\\boxed{x^2 + 1}", "x^2+2x+1", 0),
        ("\\boxed{\\text{even}}", "\\text{even}", 1),
        ("\\boxed{\\text{odd}}", "\\text{even}", 0),
        ("\\boxed{1, 2}", "2,1", 1),  # solutions of an equation, in any order
        ("\\boxed{1, 3}", "2,1", 0),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}", 1),
        ("\\boxed{1} or rather \\boxed{2}", "1", 0),
        ("", "1", 0),
    ],
)
def test_mathematics(completion: str, answer: str, reward: float) -> None:
    assert score(completion, Problem("?", answer, checker="math")) == reward


HOSTILE = {
    "a tower of powers": "\\boxed{9^{9^{9^{9}}}}",
    "a factorial": "\\boxed{100000000!}",
    "open braces": "\\boxed{" * 200_000,
    "deep nesting": "\\boxed{" + "(" * 100_000 + "1" + ")" * 100_000 + "}",
    "many boxes": "\\boxed{1}" * 100_000,
    "many digits": "9" * 2_000_000,
    "a long sum": "\\boxed{" + "1+" * 500_000 + "1}",
    "nul and surrogates": "\x00\ud800\\boxed{\udfff}",
    "code": "\\boxed{__import__('os').system('echo 1.0')}",
    "a line like a reply": "1.0\n1.0\n\\boxed{2}\n1.0",
    "waiting": "\\boxed{" + "\\int " * 500 + "x}",
    "memory": "\\boxed{2^{10000000000}}",
}


@pytest.fixture(scope="module")
def impatient() -> Iterator[None]:
    """One second for a completion, so that the tests end; the process starts anew with that limit."""
    hard_answers._WORKER.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hard_answers, "SECONDS", 1)
        yield
    hard_answers._WORKER.stop()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions(name: str) -> None:
    """They get 0, soon, and the next answer is scored as if nothing had happened."""
    for checker, answer in (("math", "41/2"), ("number", "5"), ("text", "5")):
        start = time.monotonic()
        assert score(HOSTILE[name], Problem("?", answer, checker=checker)) == 0
        assert time.monotonic() - start < 300  # a machine that pauses is no fault; for ever would be
    assert score("\\boxed{20.5}", Problem("?", "41/2", checker="math")) == 1


def test_the_answer_stands_at_the_end() -> None:
    """Of a completion without a box, the last 4,000 characters count; a box is found anywhere."""
    problem = Problem("?", "\\frac{1}{2}", checker="math")
    assert score("It is $0.5$. " + "well " * 100, problem) == 1
    assert score("It is $0.5$. " + "well " * 1000, problem) == 0
    assert score("It is \\boxed{0.5}. " + "well " * 1000, problem) == 1


def test_from_any_thread() -> None:
    """math-verify's own time limits need the main thread."""
    with ThreadPoolExecutor(4) as pool:
        answers = [f"\\frac{{{n}}}{{2}}" for n in range(1, 40, 2)]
        found = list(pool.map(lambda a: score("\\boxed{0.5}", Problem("?", a, checker="math")), answers))
    assert found == [1.0] + [0.0] * 19


def test_a_child_that_was_killed_is_replaced() -> None:
    problem = Problem("?", "\\frac{1}{2}", checker="math")
    assert score("0.5", problem) == 1
    worker = hard_answers._WORKER
    assert worker.process is not None
    worker.process.kill()
    worker.process.wait()
    assert score("0.5", problem) == 1


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hard_answers.LIBRARIES, "math", ("no_such_module", "math-verify"))
    with pytest.raises(ModuleNotFoundError, match=r"math-verify .*lcogeom\[train\]"):
        score("\\boxed{x}", Problem("?", "1", checker="math"))


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a zero for every completion."""
    hard_answers._WORKER.stop()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        score("\\boxed{x}", Problem("?", "1", checker="math"))
