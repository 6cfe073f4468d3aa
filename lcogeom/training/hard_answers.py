"""Answers whose comparison runs a symbolic library on the completion: done in a process of its own.

A completion such as \\boxed{9^{9^{9^9}}} keeps sympy busy for ever inside one call, where no signal is handled, and
math-verify's own time limits need the main thread. So a child process checks, with a watchdog that ends it, and a new
one takes its place. It starts with the first answer that needs it (half a second) and ends with this process.

Some scorers of reasoning-gym (countdown) evaluate the completion as Python. There it may not open files for writing, or
start processes; that is a precaution, no sandbox.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

SECONDS = 8
"""The most that one completion may take, of the processor's time."""
CLOCK_SECONDS = 300
"""The most by the clock: what ends a completion that waits without working."""
LONGEST = 4000
"""Characters of a completion that are looked at, from its end, where the answer stands."""
LIBRARIES = {"math": ("math_verify", "math-verify"), "reasoning-gym": ("reasoning_gym", "reasoning-gym")}
EXTRAS = {"math": "train", "reasoning-gym": "reasoning-gym"}


def require_checker(checker: str) -> None:
    """Raise ModuleNotFoundError, saying what to install, unless the library behind a checker is there."""
    if checker in LIBRARIES and importlib.util.find_spec(LIBRARIES[checker][0]) is None:
        raise ModuleNotFoundError(
            f"task: {LIBRARIES[checker][1]} is needed and not installed. Run: pip install 'lcogeom[{EXTRAS[checker]}]'"
        )


def check_elsewhere(checker: str, answer: str, completion: str, details: Mapping[str, object]) -> float:
    """The score in [0, 1] that a library gives a completion; 0.0 where it fails or takes longer than `SECONDS`.

    Args:
        checker: "math" or "reasoning-gym".
        details: what the library needs beside the answer, as JSON can hold it.

    Raises:
        ModuleNotFoundError: the library is not installed.
        RuntimeError: the child process cannot start, or its library cannot be imported.
    """
    require_checker(checker)
    question = {"checker": checker, "answer": answer, "completion": completion[-LONGEST:], "details": dict(details)}
    return _WORKER.ask(json.dumps(question))


class Worker:
    """The child process; one question at a time, from any thread."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.owner = os.getpid()  # a fork of this process must not read its replies
        self.lock = threading.Lock()

    def ask(self, question: str) -> float:
        with self.lock:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self.process, self.owner = _start(), os.getpid()
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            try:
                self.process.stdin.write(question + "\n")
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
            except (BrokenPipeError, ConnectionResetError):
                reply = ""
            if not reply.endswith("\n"):  # the watchdog, or the memory limit, has ended it
                self.stop()
                return 0.0
            try:
                return float(reply)
            except ValueError:
                raise RuntimeError(f"score: {reply.strip()}. Install what the checker lacks.") from None

    def stop(self) -> None:
        """End the child process."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        self.process = None


def _start() -> subprocess.Popen[str]:
    script = Path(__file__).with_name("answer_process.py")
    process = subprocess.Popen(  # by path, with -P: neither torch nor the modules beside it are imported there
        [sys.executable, "-P", str(script), str(SECONDS), str(CLOCK_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        process.kill()
        raise RuntimeError(
            f"score: the process that checks answers did not start. Try: {sys.executable} -P {script} 8 300"
        )
    return process


_WORKER = Worker()
atexit.register(_WORKER.stop)
