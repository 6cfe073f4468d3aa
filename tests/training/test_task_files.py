"""Problems from files and data sets, in the forms in which GSM8K and MATH are published."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from lcogeom.training import Problem, hard_answers, load_task, score
from lcogeom.training.preferences import Pair, read_pairs

GSM8K = [
    {
        "question": f"Natalia sold {n} clips in April, and half as many in May. How many altogether?",
        "answer": f"In May she sold {n}/2 = <<{n}/2={n // 2}>>{n // 2} clips.\n#### {n * 3 // 2:,}",
    }
    for n in range(20, 4020, 100)
]
MATH = [
    {
        "problem": f"Compute $\\frac{{{n}}}{{7}} + 1$.",
        "level": "Level 1",
        "solution": f"It is $\\frac{{{n}}}{{7}} + \\frac77 = \\boxed{{\\frac{{{n + 7}}}{{7}}}}$.",
    }
    for n in range(1, 13)
]
PLAIN = [{"prompt": f"{n}+{n}=", "answer": 2 * n} for n in range(10)]


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_gsm8k(kind: str, tmp_path: Path) -> None:
    task = load_task(write(tmp_path / f"gsm8k{kind}", GSM8K), held_out=200)
    assert len(task.held_out) == 10  # a quarter of 40
    assert len({problem.prompt for problem in (*task.held_out, *task.draw(30, 0))}) == 40
    for problem in task.held_out:
        number = int(problem.prompt.split()[2])
        assert problem.answer == str(number * 3 // 2)
        assert problem.checker == "number"
        assert problem.prompt.endswith("put your final answer within \\boxed{}.\n")
        assert score(problem.solution, problem) == score(f"\\boxed{{{problem.answer}}}", problem) == 1
        assert score("#### 7", problem) == 0


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_math(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="math-verify is of the extra `train`")
    task = load_task(write(tmp_path / f"math{kind}", MATH), held_out=3, template="{question} ")
    assert len(task.held_out) == 3
    for problem in task.held_out:
        n = int(problem.prompt.split("{")[1].split("}")[0])
        assert problem.answer == f"\\frac{{{n + 7}}}{{7}}"
        assert score(problem.solution, problem) == 1
        assert score(f"$1 + {n}/7$", problem) == 1
        assert score(f"\\boxed{{{n + 8}/7}}", problem) == 0


def test_an_answer_of_its_own_comes_before_the_solution(tmp_path: Path) -> None:
    """MATH-500 has both. In a box or not."""
    pytest.importorskip("math_verify", reason="math-verify is of the extra `train`")
    rows = [
        {"problem": f"{n}?", "answer": f"{n}" if n % 2 else f"\\boxed{{{n}}}", "solution": "By \\boxed{magic}."}
        for n in range(8)
    ]
    task = load_task(write(tmp_path / "math.jsonl", rows))
    assert {problem.answer for problem in task.draw(6, 0)} <= {str(n) for n in range(8)}


def test_prompt_and_answer(tmp_path: Path) -> None:
    task = load_task(write(tmp_path / "plain.jsonl", PLAIN + PLAIN[:3]), held_out=1)
    (problem,) = task.held_out
    assert problem == Problem(problem.prompt, str(2 * int(problem.prompt.split("+")[0])))
    drawn = task.draw(9, 0)
    assert len(set(drawn)) == 9  # the prompts that stand there twice count once
    assert problem not in drawn


def test_spaces_do_not_make_another_prompt(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", [*PLAIN, {"prompt": "a  b =\n", "answer": 1}])
    write(tmp_path / "data" / "test.jsonl", [{"prompt": "a b =", "answer": 1}])
    task = load_task(str(tmp_path / "data"))
    assert [problem.prompt for problem in task.held_out] == ["a b ="]
    assert len(set(task.draw(10, 0))) == 10
    assert not any(problem.prompt.startswith("a") for problem in task.draw(30, 0))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps a copy of what it reads: here, not in the home folder."""
    datasets = pytest.importorskip("datasets", reason="datasets is of the extra `train`")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def folder(path: Path, configurations: dict[str, dict[str, list[dict]]]) -> str:
    """A data set as the hub has it: a card that names configurations, and their files."""
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            (path / name).mkdir(parents=True, exist_ok=True)
            write(path / name / f"{split}.parquet", rows)
            lines += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (path / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(path)


def test_a_data_set_with_a_test_split(tmp_path: Path) -> None:
    """As openai/gsm8k: configurations main and socratic, of which main is meant; training never sees the test split."""
    other = [{**row, "question": "Step by step: " + row["question"]} for row in GSM8K]
    name = folder(
        tmp_path / "gsm8k",
        {"main": {"train": GSM8K[:30], "test": GSM8K[25:]}, "socratic": {"train": other[:30], "test": other[30:]}},
    )
    task = load_task(name, held_out=12)
    assert len(task.held_out) == 12
    assert {p.prompt for p in task.held_out} != {p.prompt for p in load_task(name, held_out=12, seed=1).held_out}
    whole = load_task(name)
    assert len(whole.held_out) == 15
    assert len(set(whole.draw(25, 0))) == 25  # the five that are in both are not drawn
    assert not {p.prompt for p in whole.draw(60, 0)} & {p.prompt for p in whole.held_out}
    assert load_task(f"{name}:socratic").held_out[0].prompt.startswith("Step by step")


def test_data_sets_that_cannot_be_used(tmp_path: Path) -> None:
    name = folder(tmp_path / "two", {"a": {"train": PLAIN}, "b": {"train": PLAIN}})
    with pytest.raises(ValueError, match="Config name is missing"):
        load_task(name)
    with pytest.raises(ValueError, match="has no split 'train', only validation"):
        load_task(folder(tmp_path / "none", {"main": {"validation": PLAIN}}))
    with pytest.raises(ValueError, match="cannot load the data set"):
        load_task("nobody/nothing-of-the-kind")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "?", "answer": "6 * 7 = 42 ####"}], "line 1: the answer has no number"),
        ([*PLAIN, {"problem": "?", "solution": "it is 5"}], r"line 11: no 'answer', and no \\boxed"),
        ([{"problem": "?"}], "line 1: no 'answer'"),
        ([{"prompt": [{"role": "user", "content": "?"}], "answer": "5"}], "'prompt' is not a text"),
        ([{"answer": "5"}], "line 1: no 'prompt'"),
        (PLAIN[:3], "has 3 problems"),
        ([PLAIN[0]] * 30, "has 1 problems"),
        ([], "has 0 problems"),
    ],
)
def test_records_that_cannot_be_used(rows: list[dict], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        load_task(write(tmp_path / "rows.jsonl", rows))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        load_task(str(tmp_path / "none.jsonl"))
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="no parquet file"):
        load_task(str(tmp_path / "broken.parquet"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "?", "answer": "5"}\n{"prompt\n')
    with pytest.raises(ValueError, match=r"broken.jsonl line 2"):
        load_task(str(tmp_path / "broken.jsonl"))


def test_math_without_math_verify_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hard_answers.LIBRARIES, "math", ("no_such_module", "math-verify"))
    with pytest.raises(ModuleNotFoundError, match="math-verify"):
        load_task(write(tmp_path / "math.jsonl", MATH))


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_pairs(kind: str, tmp_path: Path) -> None:
    pair = {"prompt": "1+1=", "chosen": "2\n", "rejected": "3\n", "margin": 1.5}
    assert read_pairs(write(tmp_path / f"pairs{kind}", [pair] * 2)) == [Pair("1+1=", "2\n", "3\n")] * 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "?", "chosen": "1"}, "line 1: no 'rejected'"),
        ({"prompt": "?", "chosen": "1", "rejected": "1"}, "line 1: 'chosen' and 'rejected' are the same"),
        ({"prompt": "?", "chosen": [{"role": "assistant"}], "rejected": "1"}, "'chosen' is not a text"),
    ],
)
def test_pairs_that_cannot_be_used(row: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        read_pairs(write(tmp_path / "pairs.jsonl", [row]))
    with pytest.raises(ValueError, match="holds no pair"):
        read_pairs(write(tmp_path / "empty.jsonl", []))
