"""Tasks: problems to train on, drawn with a seed, and problems that are never trained on.

`load_task` knows sums and products made here, every task of reasoning-gym, and files and data sets in the forms of
`task_files`. The two halves of a task never share a prompt.
"""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcogeom.training.hard_answers import require_checker
from lcogeom.training.problems import Problem, score
from lcogeom.training.task_files import dataset_records, problems_of, read_problems, records

__all__ = ["NAMES", "Problem", "Task", "arithmetic", "load_task", "read_problems", "score"]

NAMES = ("addition-1", "addition-2", "products", "arithmetic")
GYM = "reasoning-gym:"
SHOTS = "2 * 9 = 18\n7 * 3 = 21\n"  # compact prompts matter: small models fail in chat format
SHOWN = ((2, 9), (3, 7))
HELD_OUT_SHARE = 4
"""At most one in so many problems of a finite task is held out."""
GYM_ATTEMPTS = 50


@dataclass(frozen=True)
class Task:
    """Problems to train on and to evaluate on."""

    name: str
    held_out: tuple[Problem, ...]
    """Never drawn."""
    draw: Callable[[int, int], list[Problem]]
    """(count, seed) -> training problems; the same two give the same problems. A finite task repeats none before all
    have been drawn."""


def load_task(
    name: str, *, characters: bool = False, held_out: int = 200, seed: int = 0, template: str | None = None
) -> Task:
    """A task by name.

    Args:
        name:
            addition-1, addition-2: sums of two one-digit (1 to 9) or two-digit (10 to 99) numbers in the form that the
            `tiny` model knows, "27+45=" answered by "27" and a line break: last digit first.
            products: of two numbers from 2 to 9, after two worked examples; answered in one line.
            arithmetic: what `lcogeom replay` draws: sums up to 99 + 99 in tiny's form if `characters`, else products.
            reasoning-gym:NAME: any of its tasks, such as reasoning-gym:chain_sum.
            a .jsonl or .parquet file, a folder or an id that `datasets` reads: see `task_files.problems_of`. Its split
            `test` is held out where there is one.
        characters: of `arithmetic` alone.
        held_out: the most problems to hold out; of a finite task without a `test` split a quarter at most. a + b and
            b + a are held out together, and no product that the prompt shows.
        seed: of the split. Training draws have seeds of their own.
        template: the prompt of a file's or data set's problem, with {question} in it; None: the form's own.

    Raises:
        ValueError: an unknown name; a file or data set that cannot be used; fewer than 4 problems; held_out < 1; a
            template where there is nothing to put into it.
        FileNotFoundError: no such file.
        ModuleNotFoundError: reasoning-gym, math-verify or datasets is needed and not installed.
    """
    if held_out < 1:
        raise ValueError(f"held_out: {held_out}; must be at least 1.")
    kind = Path(name).suffix
    if template is not None and (name in NAMES or "{question}" not in template):
        raise ValueError(
            f"template: {template!r} must hold {{question}}; tasks made here ({', '.join(NAMES)}) take none."
        )
    if name in NAMES:
        return _split(name, *_made_here(name, characters), held_out, seed)
    if name.startswith(GYM):
        return _gym(name, held_out, seed, template)
    if kind in (".jsonl", ".json", ".parquet"):
        train, test = problems_of(records(Path(name), "task"), "task", template), []
    elif "/" in name or Path(name.partition(":")[0]).is_dir():
        train, test = (problems_of(part, "task", template) for part in dataset_records(name, "task"))
    else:
        known = ", ".join((*NAMES, GYM + "NAME"))
        raise ValueError(f"task: no task {name!r}. There are: {known}, a .jsonl or .parquet file, a data set's id.")
    for checker in {problem.checker for problem in (*train, *test)}:
        require_checker(checker)
    if not test:
        return _split(name, [(problem,) for problem in train], [], held_out, seed)
    random.Random(seed).shuffle(test)
    return _task(name, train, test[:held_out])


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


def _sum(a: int, b: int) -> Problem:
    answer = str(a + b)[::-1]
    return Problem(f"{a}+{b}=", answer, checker="text", solution=answer + "\n")  # "07" is not "7" here


def _product(a: int, b: int) -> Problem:
    return Problem(f"{SHOTS}{a} * {b} =", str(a * b), first_line=True, solution=f" {a * b}\n")


def _made_here(name: str, characters: bool) -> tuple[list[tuple[Problem, ...]], list[Problem]]:
    """(problems that may be held out, a o b beside b o a; problems that the prompt shows, and that are trained on)."""
    sums = name.startswith("addition") or (name == "arithmetic" and characters)
    if sums:
        numbers = {"addition-1": range(1, 10), "addition-2": range(10, 100)}.get(name, range(1, 100))
    else:
        numbers = range(2, 10)
    make = _sum if sums else _product
    families = [
        (make(a, b), make(b, a))[: 1 + (a < b)]
        for a in numbers
        for b in numbers
        if a <= b and (sums or (a, b) not in SHOWN)
    ]
    return families, [] if sums else [make(*pair) for a, b in SHOWN for pair in ((a, b), (b, a))]


def _split(
    name: str, families: Sequence[tuple[Problem, ...]], others: Sequence[Problem], held_out: int, seed: int
) -> Task:
    """Hold out whole families at random, as many as fit; the rest and `others` are trained on."""
    count = sum(map(len, families)) + len(others)
    if count < HELD_OUT_SHARE:
        raise ValueError(f"task: {name!r} has {count} problems; at least {HELD_OUT_SHARE} are needed to hold some out.")
    room = min(held_out, count // HELD_OUT_SHARE)
    kept_out: list[Problem] = []
    train = list(others)
    for family in random.Random(seed).sample(families, len(families)):
        (kept_out if len(kept_out) + len(family) <= room else train).extend(family)
    return _task(name, train, kept_out)


def _gym(name: str, held_out: int, seed: int, template: str | None) -> Task:
    require_checker("reasoning-gym")
    import reasoning_gym

    base = name.removeprefix(GYM)
    if base not in reasoning_gym.factory.DATASETS:
        near = difflib.get_close_matches(base, reasoning_gym.factory.DATASETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"task: reasoning-gym has no {base!r}.{hint}")

    def fresh(count: int, purpose: str) -> list[Problem]:
        # Entry i of a data set with seed s is entry 0 of that with seed s + i: neighbouring seeds would repeat them.
        start = random.Random(purpose).randrange(2**31)
        entries = reasoning_gym.create_dataset(base, seed=start, size=count)
        return [_gym_problem(entries[place], name, template) for place in range(count)]

    kept_out = {_key(problem): problem for problem in fresh(held_out, f"{name} held out {seed}")}

    def draw(count: int, seed: int) -> list[Problem]:
        drawn: list[Problem] = []
        for attempt in range(GYM_ATTEMPTS):
            if len(drawn) == count:
                return drawn
            more = fresh(count - len(drawn), f"{name} train {seed} {attempt}")
            drawn += [problem for problem in more if _key(problem) not in kept_out]
        raise ValueError(f"task: nearly all problems of {name!r} are held out; hold out fewer than {held_out}.")

    return Task(name, tuple(kept_out.values()), draw)


def _gym_problem(entry: Mapping[str, object], name: str, template: str | None) -> Problem:
    answer = "" if entry["answer"] is None else str(entry["answer"])
    written = repr(entry["metadata"])  # JSON would turn tuples into lists and the keys of dictionaries into texts
    try:
        same = ast.literal_eval(written) == entry["metadata"]
    except (SyntaxError, ValueError):
        same = False
    if not same:
        raise ValueError(f"task: the problems of {name!r} cannot be handed to the process that scores them.")
    details = {"question": entry["question"], "metadata": written}
    prompt = (template or "{question}").replace("{question}", str(entry["question"]))
    return Problem(prompt, answer, checker="reasoning-gym", solution=answer, details=details)


def _task(name: str, train: Sequence[Problem], held_out: Sequence[Problem]) -> Task:
    kept_out = {_key(problem) for problem in held_out}
    pool = [problem for problem in train if _key(problem) not in kept_out]
    if not pool:
        raise ValueError(f"task: {name!r} has no problem to train on that is not held out.")

    def draw(count: int, seed: int) -> list[Problem]:
        source = random.Random(seed)
        drawn: list[Problem] = []
        while len(drawn) < count:
            drawn += source.sample(pool, min(count - len(drawn), len(pool)))
        return drawn

    return Task(name, tuple(held_out), draw)


def _key(problem: Problem) -> str:
    """What makes two prompts the same: the text, however it is spaced."""
    return " ".join(problem.prompt.split())
