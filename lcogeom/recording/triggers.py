"""What counts as an event: a value that is not finite, or a norm far above what it has been."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

HISTORY = 100
"""Updates in the running medians."""
SETTLED = 5
"""No spike is called before so many norms are known."""


class Triggers:
    """Judges the numbers of one update after another. An event that goes on is told once."""

    def __init__(self, spike: float, apart: int) -> None:
        """spike: times the running median; apart: updates of quiet after which an event is a new one."""
        self._spike, self._apart = spike, apart
        self._norms = {"gradient": deque[float](maxlen=HISTORY), "step": deque[float](maxlen=HISTORY)}
        self._last: dict[str, int] = {}  # kind of event -> its latest update
        self._gradient = -1, 0.0  # the latest update with a spike of the gradient, and its height

    def before_step(self, step: int, losses: Sequence[float], norm: float) -> str | None:
        """Why the losses or the norm of the gradient are an event; None if they are not."""
        bad = next((loss for loss in losses if not math.isfinite(loss)), None)
        if bad is not None:
            return self._new("non-finite", step, f"the loss is {bad}")
        if not math.isfinite(norm):
            return self._new("non-finite", step, f"the norm of the gradient is {norm}")
        return self._spikes("gradient", step, norm)

    def after_step(self, step: int, norm: float) -> str | None:
        """Why the norm of the step is an event; None if it is not."""
        if not math.isfinite(norm):
            return self._new("non-finite", step, f"the norm of the step is {norm}, though the gradient's is finite")
        return self._spikes("step", step, norm)

    def _spikes(self, what: str, step: int, norm: float) -> str | None:
        known = self._norms[what]
        usual = statistics.median(known) if len(known) >= SETTLED else math.inf  # of positive numbers
        if norm > 0:  # an update without advantages has no gradient; it says nothing of what is usual
            known.append(norm)
        ratio = norm / usual
        if ratio <= self._spike:
            return None
        if what == "gradient":
            self._gradient = step, ratio
        elif self._gradient[0] == step and ratio < 2 * self._gradient[1]:
            return None  # a large gradient makes a large step: one event
        return self._new(what, step, f"the norm of the {what} is {norm:.3g}, {ratio:.3g} times its median")

    def _new(self, kind: str, step: int, reason: str) -> str | None:
        last, self._last[kind] = self._last.get(kind), step
        return reason if last is None or step - last > self._apart else None
