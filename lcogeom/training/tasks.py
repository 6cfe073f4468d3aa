"""Problems whose answers can be checked: arithmetic by default, or a JSONL file of prompts and answers."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
SHOTS = "2 * 9 = 18\n7 * 3 = 21\n"  # compact prompts matter: small models fail in chat format


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str
    first_line: bool = False
    """Whether only the first line of a completion is scored; the model may well go on after it."""


def arithmetic(count: int, seed: int, *, characters: bool = False) -> list[Problem]:
    """Random arithmetic.

    Args:
        count: how many.
        seed: of the draw; the same seed gives the same problems.
        characters: the form the `tiny` model knows, "27+45=" answered by "27": two numbers up to 99, the sum written
            with its last digit first. Otherwise products of one-digit numbers after two worked examples: "6 * 8 =".
    """
    draw = random.Random(seed)
    if characters:
        pairs = [(draw.randint(1, 99), draw.randint(1, 99)) for _ in range(count)]
        return [Problem(f"{a}+{b}=", str(a + b)[::-1]) for a, b in pairs]
    pairs = [(draw.randint(2, 9), draw.randint(2, 9)) for _ in range(count)]
    return [Problem(f"{SHOTS}{a} * {b} =", str(a * b), first_line=True) for a, b in pairs]


def score(completion: str, problem: Problem) -> float:
    """1.0 if the completion's last number is the answer, else 0.0; for an answer that is no number, the whole text."""
    answer = problem.answer.strip()
    text = completion.partition("\n")[0] if problem.first_line else completion
    if not NUMBER.fullmatch(answer):
        return float(text.strip() == answer)
    found = NUMBER.findall(text.replace(",", ""))
    return float(bool(found) and float(found[-1]) == float(answer))


def read_problems(path: str | Path) -> list[Problem]:
    """Problems from a JSONL file, one object with the texts `prompt` and `answer` a line; empty lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not such an object (named by its number), or no problem at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"problems: no file {str(path)!r}. Give 'arithmetic' or a JSONL file.")
    problems = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
            problems.append(Problem(_text(record, "prompt"), _text(record, "answer")))
        except (UnicodeDecodeError, json.JSONDecodeError, ValueError) as error:
            raise ValueError(
                f'problems: {path.name} line {number}: {error}. Each line must be {{"prompt": "...", "answer": "..."}}.'
            ) from error
    if not problems:
        raise ValueError(f"problems: {path.name} holds no problem.")
    return problems


def _text(record: object, key: str) -> str:
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"no {key!r}")
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value):
        raise ValueError(f"{key!r} is not a text")
    return str(value)
