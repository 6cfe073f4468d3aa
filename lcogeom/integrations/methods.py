"""Methods of one object replaced for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class ReplacedMethods:
    """Replaces methods on one instance; its class and other instances stay as they are."""

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._before: list[tuple[str, Any]] = []

    def replace(self, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put make(original bound method) in its place."""
        original = getattr(self._owner, name)
        self._before.append((name, vars(self._owner).get(name)))
        setattr(self._owner, name, functools.wraps(original)(make(original)))

    def restore(self) -> None:
        """Undo all of it, the last one first."""
        while self._before:
            name, before = self._before.pop()
            if before is None:
                delattr(self._owner, name)
            else:
                setattr(self._owner, name, before)
