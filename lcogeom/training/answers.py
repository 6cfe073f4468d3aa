"""Finding the answer in a text, and comparing it: what needs no library and takes time linear in the text."""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
BRACE = re.compile(r"\\f?box(?:ed)?\s*\{|\\[{}]|[{}]")


def same_text(completion: str, answer: str) -> bool:
    """Whether the two are equal but for spaces around them."""
    return completion.strip() == answer.strip()


def same_number(completion: str, answer: str) -> bool:
    """Whether the completion's number equals the answer; of an answer that is no number, `same_text`.

    The number is the last one behind "####" (GSM8K), else in the last \\boxed{}, else in the completion. Commas
    in the completion are taken for thousands separators.
    """
    wanted = answer.strip()
    if not NUMBER.fullmatch(wanted):
        return same_text(completion, answer)
    _, mark, behind = completion.rpartition("####")
    found = NUMBER.findall((behind if mark else boxed(completion) or completion).replace(",", ""))
    return bool(found) and Decimal(found[-1]) == Decimal(wanted)


def boxed(text: str) -> str | None:
    """What stands in the complete \\boxed{...} (or \\fbox) that opens last in a text; None without one."""
    open_braces: list[tuple[int, bool]] = []  # (where its inside starts, whether it is a box)
    last: tuple[int, int] | None = None
    for brace in BRACE.finditer(text):
        if brace[0] == "}":
            start, box = open_braces.pop() if open_braces else (0, False)
            if box and (last is None or start > last[0]):
                last = start, brace.start()
        elif brace[0].endswith("{") and brace[0] != "\\{":
            open_braces.append((brace.end(), brace[0] != "{"))
    return None if last is None else text[slice(*last)].strip()


def tagged(text: str) -> str:
    """What stands between the last <answer> and </answer>; the whole text without them. No spaces around it."""
    before, end, _ = text.rpartition("</answer>")
    _, start, inside = before.rpartition("<answer>")
    return (inside if end and start else text).strip()


def gsm8k_answer(solution: str) -> str:
    """The number behind the last "####" of a GSM8K solution.

    Raises:
        ValueError: no such number.
    """
    number = solution.rpartition("####")[2].strip().replace(",", "").removeprefix("$")
    if "####" not in solution or not NUMBER.fullmatch(number):
        raise ValueError("the answer has no number behind '####'")
    return number
