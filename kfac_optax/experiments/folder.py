"""A folder of results: one sweep at a time writes to it, and what is in it is never half of a file."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not on Windows, where nobody is kept out
    fcntl = None

_LOCK = ".in_use"


class Stopped(RuntimeError):
    """A sweep that cannot go on, in words for its user."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says what to do where a file cannot be written.

    Raises:
        Stopped: the disk is full, or the folder may not be written to.
    """
    try:
        yield
    except OSError as error:
        raise Stopped(
            f"{path}: cannot be written ({error.strerror or error}). What is finished is kept: make "
            "room, or give the right to write there, or pass another --config.out, and run the "
            "same command again."
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A file to write to, which takes the place of `path` in one move when it is whole.

    Raises:
        Stopped: it cannot be written; `path` holds what it held before.
    """
    draft = path.with_suffix(".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(draft, "w", newline="") as file:
                yield file
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps other sweeps out of a folder; the system lets go of it however this process ends.

    Raises:
        Stopped: another process has it, or it may not be written to.
    """
    path = folder / _LOCK
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # what is left there keeps nobody out
            path.unlink(missing_ok=True)  # before it is let go, so that nobody else has it yet
        file.close()


def _locked(path: Path) -> IO[str]:
    while True:
        file = open(path, "a+")  # noqa: SIM115  # it stays open as long as the lock is held
        if not _lock(file):
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise Stopped(
                f"{path.parent}: {owner} is writing there. Wait for it, or pass another "
                "--config.out."
            )
        # the one before may have removed the file between the two calls
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()


def _lock(file: Any) -> bool:
    """Whether this process has the lock of an open file now."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
