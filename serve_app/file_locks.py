"""Files that several processes of a node share: held by whoever reads them, removed only while nobody does.

Owns the use of the kernel's locks for that, and the signs of a full disk. A reader has a shared lock, whoever removes
takes an exclusive one first; the kernel lets go of the locks of a process that dies, so nothing is ever left held.
Every call may block on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO


@contextmanager
def unlocking(file: BinaryIO) -> Generator[None]:
    """Let go of a file's lock at the end of the block."""
    try:
        yield
    finally:
        # Closing alone would leave the lock to a child that was forked meanwhile.
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def exclusive(lock: Path) -> Generator[None]:
    """Keep every other process out of what this lock file stands for."""
    with lock.open("wb") as file, unlocking(file):
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_shared(path: Path) -> BufferedReader | None:
    """Open a file and hold it, until it is closed; None where there is none."""
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        # Between opening and locking it may have been evicted or replaced: then the name means something
        # else.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def remove_if_unlocked(path: Path) -> bool:
    """Remove a file that nobody holds; tell whether it is gone."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return True
    with file, unlocking(file):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
        return True


def is_disk_full(error: OSError) -> bool:
    """Say whether the disk, or this user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
