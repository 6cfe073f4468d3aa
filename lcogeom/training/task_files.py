"""Problems from files and data sets: JSONL, parquet, or whatever `datasets.load_dataset` reads; their forms by keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lcogeom.training.answers import boxed, gsm8k_answer
from lcogeom.training.problems import Problem

Record = tuple[str, object]
"""(where it stands, for an error; what stands there)."""

REASONED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
"""How a question in GSM8K or MATH form is put, unless the task is given another template."""


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
    for place, record in json_lines(path, "problems"):
        try:
            problems.append(Problem(text(record, "prompt"), text(record, "answer")))
        except ValueError as error:
            raise ValueError(
                f'problems: {place}: {error}. Each line must be {{"prompt": "...", "answer": "..."}}.'
            ) from error
    if not problems:
        raise ValueError(f"problems: {path.name} holds no problem.")
    return problems


def records(path: Path, what: str) -> Iterator[Record]:
    """The records of a .jsonl, .json (lines) or .parquet file. what: the argument that an error names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or one that cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no file {str(path)!r}.")
    if path.suffix in (".jsonl", ".json"):
        yield from json_lines(path, what)
    elif path.suffix == ".parquet":
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{what}: {path.name} is no parquet file: {error}") from error
        yield from ((f"{path.name} row {number}", row) for number, row in enumerate(rows, start=1))
    else:
        raise ValueError(f"{what}: {path.name!r} must end in .jsonl or .parquet.")


def json_lines(path: Path, what: str) -> Iterator[Record]:
    """One JSON value a line; empty lines are skipped. Raises ValueError that names a broken line."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                yield f"{path.name} line {number}", json.loads(line.decode("utf-8"))
            except ValueError as error:  # of decoding, too
                raise ValueError(f"{what}: {path.name} line {number}: {error}. It must be a JSON object.") from error


def dataset_records(name: str, what: str) -> tuple[list[Record], list[Record]]:
    """(records to train on, records of the split `test`, empty without one) of a data set by id or folder.

    name: of a hub data set or a local folder; a configuration may follow a colon: "openai/gsm8k:main".

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
        ValueError: it cannot be loaded, or has no split `train`.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what}: {name!r} is read by `datasets`. Run: pip install 'lcogeom[train]', or give a .jsonl file."
        ) from error
    base, _, configuration = name.partition(":")
    try:
        try:
            loaded = datasets.load_dataset(base, configuration or None)
        except ValueError as error:
            if configuration or "main" not in datasets.get_dataset_config_names(base):
                raise
            del error  # several configurations, of which hub sets call the usual one "main"
            loaded = datasets.load_dataset(base, "main")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: cannot load the data set {name!r}: {reason}") from error
    if "train" not in loaded:
        raise ValueError(f"{what}: {name!r} has no split 'train', only {', '.join(map(str, loaded))}.")

    def rows(split: str) -> list[Record]:
        return [(f"{name} {split} {number}", row) for number, row in enumerate(loaded[split], start=1)]

    return rows("train"), rows("test") if "test" in loaded else []


def problems_of(found: Iterable[Record], what: str, template: str | None) -> list[Problem]:
    """The problems in records of any of three forms, each prompt once.

        question, answer ending in "#### 42"       GSM8K, compared as a number
        problem, answer or solution with \\boxed{}  MATH, compared by math-verify
        prompt (or question), answer               as a number, or as a text where it is none

    template: the prompt, with {question} for the problem's text; None: `REASONED` for the first two, else "{question}".

    Raises:
        ValueError: a record of no such form, named by its place; a template without {question}.
    """
    if template is not None and "{question}" not in template:
        raise ValueError(f"template: {template!r} has no {{question}} in it.")
    unique: dict[str, Problem] = {}
    for place, record in found:
        try:
            problem = _problem(record, template)
        except ValueError as error:
            raise ValueError(
                f"{what}: {place}: {error}. It needs prompt and answer; or question and answer ('... #### 42'); "
                "or problem and solution ('... \\boxed{42}')."
            ) from error
        unique.setdefault(problem.prompt, problem)
    return list(unique.values())


def _problem(record: object, template: str | None) -> Problem:
    keys = record if isinstance(record, Mapping) else {}
    if "problem" in keys:
        solution = text(record, "solution") if keys.get("solution") is not None else ""
        answer = text(record, "answer") if keys.get("answer") is not None else boxed(solution)
        if not answer:
            raise ValueError("no 'answer', and no \\boxed{} in 'solution'")
        asked = (template or REASONED).replace("{question}", text(record, "problem"))
        return Problem(asked, boxed(answer) or answer, checker="math", solution=solution)
    question = text(record, "question" if "prompt" not in keys and "question" in keys else "prompt")
    answer = text(record, "answer")
    if "####" in answer:
        asked = (template or REASONED).replace("{question}", question)
        return Problem(asked, gsm8k_answer(answer), solution=answer)
    return Problem((template or "{question}").replace("{question}", question), answer)


def text(record: object, key: str) -> str:
    """A text or number of a record, as a text. Raises ValueError where there is none."""
    if not isinstance(record, Mapping) or key not in record:
        raise ValueError(f"no {key!r}")
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value):
        raise ValueError(f"{key!r} is not a text")
    return str(value)
