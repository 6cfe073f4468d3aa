"""A problem with a checkable answer, and the score of a completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lcogeom.training.answers import boxed, same_number, same_text, tagged
from lcogeom.training.hard_answers import check_elsewhere

CHECKERS = ("number", "text", "math", "reasoning-gym")


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str
    first_line: bool = False
    """Whether only the first line of a completion is scored; the model may well go on after it."""
    checker: str = "number"
    """How a completion is compared with the answer: see `score`."""
    solution: str = ""
    """A right completion to imitate, with what ends it where the task has such a text; "" if none is known."""
    details: Mapping[str, object] = field(default_factory=dict, repr=False, hash=False, compare=False)
    """What the checker "reasoning-gym" must know beside the answer."""

    def __post_init__(self) -> None:
        if self.checker not in CHECKERS:
            raise ValueError(f"checker: {self.checker!r}; must be one of {', '.join(CHECKERS)}.")


def score(completion: str, problem: Problem) -> float:
    """How right a completion is: 1.0 or 0.0, or between them where a reasoning-gym task gives part of the points.

    By `problem.checker`:

        number          the completion's last number is the answer, exactly; what follows the last "####" or stands in
                        the last \\boxed{} comes first; an answer that is no number is compared as by "text"
        text            the whole completion, without spaces around it, is the answer
        math            math-verify finds the two equal, whatever their form
        reasoning-gym   the task's own scorer; of what stands in <answer></answer>, else of the whole completion

    The last two run in a process of their own, which ends after `hard_answers.SECONDS`: whatever a completion holds, a
    score comes back, 0.0 for what could not be read in time.

    Raises:
        ModuleNotFoundError: math-verify or reasoning-gym is needed and missing.
    """
    text = completion.partition("\n")[0] if problem.first_line else completion
    if problem.checker == "math":
        answer = boxed(text)
        if same_text(text if answer is None else answer, problem.answer):
            return 1.0
        return check_elsewhere("math", problem.answer, text if answer is None else f"\\boxed{{{answer}}}", {})
    if problem.checker == "reasoning-gym":
        return check_elsewhere("reasoning-gym", problem.answer, tagged(text), problem.details)
    same = same_number if problem.checker == "number" else same_text
    return float(same(text, problem.answer))
