"""Kernel locks on files that several processes of a node share.

A reader holds a shared lock; removal needs an exclusive one. The kernel releases the locks of a process that dies. Also
tells whether an error means a full disk. Every call may block on the disk.
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
    """Release a file's lock at the end of the block."""
    try:
        yield
    finally:
        # Closing alone would leave the lock with a child that was forked meanwhile.
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def exclusive(lock: Path) -> Generator[None]:
    """Hold an exclusive lock on a lock file."""
    with lock.open("wb") as file, unlocking(file):
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_shared(path: Path) -> BufferedReader | None:
    """Open a file with a shared lock; None if it does not exist."""
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        # Between opening and locking, the file may have been evicted or replaced.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def remove_if_unlocked(path: Path) -> bool:
    """Remove a file that no process has locked; return whether it is gone."""
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
    """Whether the disk, or the user's quota, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
