"""Values of options as they are written on a command line."""

from __future__ import annotations


def option_value(text: str) -> object:
    """none, true, false or a number; anything else is text."""
    words: dict[str, object] = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
