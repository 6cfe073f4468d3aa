"""One writer to a run folder. The operating system lets go of the lock when the process dies, however it dies."""

from __future__ import annotations

import errno
import io
import os
import socket
import uuid
import warnings
import weakref
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = "writer.lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
HELD = {errno.EWOULDBLOCK, errno.EACCES}


class FolderLock:
    """Held from its making until `release`. The file stays, and says who held it last."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            BlockingIOError: another writer holds it, of this process or any other.
            OSError: the folder cannot be written.
        """
        self._path = folder / FILE
        self._owner = f"process {os.getpid()} on {socket.gethostname()} ({uuid.uuid4().hex})"
        self._file = self._take()
        _locks.add(self)

    def confirm(self) -> None:
        """Make sure that the folder is still there and still ours.

        Raises:
            OSError: it is not, or this process is a fork of the one that took the lock.
        """
        if self._file.closed:
            raise OSError(errno.EBADF, "this process is a fork of the one that records")
        try:
            owner = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # someone tidied it away, or removed the whole folder
            taken = self._take()
            self._file.close()
            self._file = taken
            return
        if owner != self._owner:
            raise OSError(errno.EBUSY, f"the folder was taken over by {_name(owner)}")

    def release(self) -> None:
        """Let the next writer in. May be called again."""
        self._file.close()

    def _take(self) -> io.FileIO:
        file = self._path.open("a+b", buffering=0)
        try:
            _lock(file.fileno(), self._path)
        except OSError as error:
            owner = self._path.read_text(encoding="utf-8", errors="replace")
            file.close()
            if error.errno not in HELD:
                raise
            raise BlockingIOError(
                f"run: {str(self._path.parent)!r} is being recorded by {_name(owner)}. A run folder has one writer: "
                "close() that recorder or end that process, or give another folder."
            ) from None
        file.truncate(0)
        file.write(self._owner.encode())
        return file


def _lock(handle: int, path: Path) -> None:
    if fcntl is None:
        return _say_that_nothing_guards("this operating system")
    try:
        # flock, not lockf: that one does not keep out a second writer of this very process.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _say_that_nothing_guards(f"the filesystem of {str(path.parent)!r}")
    return None


@cache
def _say_that_nothing_guards(where: str) -> None:
    warnings.warn(
        f"{where} has no file locks: nothing keeps a second process from recording into the same run folder. "
        "Make sure that only one does.",
        stacklevel=5,
    )


def _name(owner: str) -> str:
    """process 17 on host, without what makes it unique."""
    return owner.partition(" (")[0] or "another writer"


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forked() -> None:
    # A worker forked from the trainer shares the open file: alive, it would keep the lock of a trainer that was killed.
    for lock in list(_locks):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
