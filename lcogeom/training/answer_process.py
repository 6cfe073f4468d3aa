"""The child process of `hard_answers`: a question per line in, a score per line out. Imports nothing of the package."""

from __future__ import annotations

import ast
import faulthandler
import functools
import importlib
import json
import os
import signal
import sys

MEMORY = 4 << 30  # bytes of address space: a completion must not be able to fill the machine
FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "webbrowser.")
READ_ONLY = ("os.listdir", "os.scandir", "os.walk")
CHECKING: list[bool] = []  # not empty while a completion is being looked at


def check(question: dict) -> float:
    """The score of one completion; 0.0 where the library fails on it."""
    try:
        if question["checker"] == "math":
            return check_math(question["answer"], question["completion"])
        return check_reasoning_gym(question["answer"], question["completion"], question["details"])
    except (Exception, RecursionError, MemoryError):  # whatever a completion makes a library raise, it is not right
        return 0.0


@functools.lru_cache(maxsize=4096)
def gold(answer: str) -> list:
    """The answer as math-verify reads it; eight completions or more share one."""
    from math_verify import parse

    return parse(f"\\boxed{{{answer}}}", parsing_timeout=None)


def check_math(answer: str, completion: str) -> float:
    """1.0 where math-verify finds the completion equal to the answer. The watchdog is the time limit."""
    from math_verify import parse, verify

    return float(verify(gold(answer), parse(completion, parsing_timeout=None), timeout_seconds=None))


def check_reasoning_gym(answer: str, completion: str, details: dict) -> float:
    """The task's own score. details: the entry's `question`, and its `metadata` as Python writes it."""
    import reasoning_gym

    metadata = ast.literal_eval(details["metadata"])
    scorer = reasoning_gym.get_score_answer_fn(metadata["source_dataset"])
    entry = {"question": details["question"], "answer": answer, "metadata": metadata}
    return min(1.0, max(0.0, float(scorer(completion, entry))))


def main(seconds: float, by_the_clock: float) -> None:
    """Serve until the pipe is closed."""
    limit_memory()
    sys.dont_write_bytecode = True
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not be taken for a score
    sys.addaudithook(forbid)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin.buffer:
        question = json.loads(line)
        failure = preload(question["checker"])
        if failure:
            replies.write(failure + "\n")
            replies.flush()
            continue
        watch(seconds, by_the_clock)
        CHECKING.append(True)
        result = check(question)
        CHECKING.clear()
        watch(0, 0)
        replies.write(f"{result!r}\n")
        replies.flush()


def watch(seconds: float, by_the_clock: float) -> None:
    """Let the system end this process after so many seconds of work, whatever it is doing; 0 and 0 call it off.

    Seconds of the processor: a busy machine must not change a score. Those by the clock, many more, end what waits.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # the default action of either signal ends the process
        signal.setitimer(signal.ITIMER_REAL, by_the_clock)
    elif seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def preload(checker: str) -> str:
    """Import outside the time limit: a slow disk is not the completion's fault. What went wrong; "" for nothing."""
    try:
        importlib.import_module({"math": "math_verify", "reasoning-gym": "reasoning_gym"}[checker])
    except ImportError as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    return ""


def forbid(event: str, arguments: tuple) -> None:
    """Audit hook. Some scorers evaluate what they are given as Python: it may compute, but not act on the machine.

    A precaution against what a policy stumbles upon, not a sandbox.
    """
    if not CHECKING:
        return
    acts = event.startswith(FORBIDDEN) and not event.startswith(READ_ONLY)
    if event == "open":
        _, mode, flags = arguments
        acts = any(letter in (mode or "") for letter in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
    if acts:
        raise PermissionError(f"{event}: an answer may not do this.")


def limit_memory() -> None:
    """Bound the address space, where the system can."""
    try:
        import resource
    except ImportError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most), most))


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]))
