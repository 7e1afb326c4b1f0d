"""The cache of downloaded adapter files on this node's disk.

Owns one folder, shared by every process of the node, and its byte budget. A file appears there only when it is
complete; its name contains the digest of its bytes, which is checked at each use. Every call may block on the disk.
Must not know how files are downloaded.

    <folder>/.lock                           held while files are added or removed
    <folder>/<key>-<sha256>.safetensors      a whole file; its modification time is its last use
    <folder>/.<key>-<random>.draft           a partial download, locked by its writer
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO

from serve_app.file_locks import exclusive, is_disk_full, open_shared, remove_if_unlocked

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
DRAFT_SUFFIX = ".draft"


class LockedFile:
    """One file, locked against eviction in every process until it is released."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file

    def release(self) -> None:
        """Unlock the file; it may be evicted from now on."""
        if not self._file.closed:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()


class LockedFiles:
    """Locked files by adapter key; the files of an adapter are released together."""

    def __init__(self) -> None:
        self._files: dict[str, list[LockedFile]] = {}

    def add(self, adapter: str, file: LockedFile) -> Path:
        """Add a file of an adapter; return its path."""
        self._files.setdefault(adapter, []).append(file)
        return file.path

    def release(self, adapter: str) -> None:
        """Release all files of an adapter."""
        for file in self._files.pop(adapter, ()):
            file.release()


class PartialDownload:
    """A partly downloaded file and the digest of its bytes so far."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file
        self.restart()

    def restart(self) -> None:
        """Discard the bytes so far."""
        self._cut(0)
        self.size_bytes = 0
        self._digest = hashlib.sha256()

    def add(self, piece: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: not all could be written; the bytes before them stay.
        """
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._cut(self.size_bytes)
            raise
        self._digest.update(piece)
        self.size_bytes += len(piece)

    def _cut(self, size_bytes: int) -> None:
        self._file.truncate(size_bytes)
        self._file.seek(size_bytes)

    def sha256(self) -> str:
        """Return the digest of the bytes so far, in hex."""
        return self._digest.hexdigest()

    def md5(self) -> str:
        """Return the MD5 of the bytes so far, in hex, which object stores name."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()

    def git_id(self) -> str:
        """Return the git blob id of these bytes, which the Hub uses for files outside LFS."""
        digest = hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)
        digest.update(self.path.read_bytes())
        return digest.hexdigest()

    def share(self) -> None:
        """Change the writer's lock to a shared one."""
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def close(self) -> None:
        """Stop writing; a file that was not committed is removed."""
        self.path.unlink(missing_ok=True)
        self._file.close()


class DownloadCache:
    """The files of a folder and a byte budget.

    Invariants: a locked file is never removed. After a commit, the files fit the budget or are locked. Thread-safe.
    """

    def __init__(self, folder: Path, budget_bytes: int, *, clock: Callable[[], float]) -> None:
        """Open nothing yet; `clock` returns Unix seconds, comparable between the processes of the node."""
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._clock = clock

    def find(self, key: str) -> LockedFile | None:
        """Return a file, locked, after checking its digest; a file that was altered is removed."""
        return self._find(key, self._changing)

    def _find(self, key: str, changing: Callable[[], AbstractContextManager[None]]) -> LockedFile | None:
        for path in self._folder.glob(f"{_digest(key)}-*{SUFFIX}"):
            file = open_shared(path)
            if file is None:
                continue
            found = LockedFile(path, file)
            if hashlib.file_digest(file, "sha256").hexdigest() == path.stem.partition("-")[2]:
                self._touch(file)
                return found
            log.warning("a file of %s was altered on disk; it is downloaded again", key)
            with changing(), suppress(FileNotFoundError):
                # Another process may have replaced it with a good one.
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    path.unlink()
            found.release()
        return None

    @contextmanager
    def draft(self, key: str) -> Generator[PartialDownload]:
        """Open a file to write; it is removed at the end of the block unless it was committed.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f".{_digest(key)}-{uuid.uuid4().hex}{DRAFT_SUFFIX}"
        with self._changing():
            self._clear_abandoned_drafts()
            file = path.open("w+b", buffering=0)
            fcntl.flock(file, fcntl.LOCK_EX)
        made = PartialDownload(path, file)
        try:
            yield made
        finally:
            made.close()

    def commit(self, key: str, draft: PartialDownload) -> LockedFile:
        """Make a complete draft the file of this key, and return it locked; the least recently used files are evicted.

        Raises:
            OSError: the disk failed.
        """
        path = self._folder / f"{_digest(key)}-{draft.sha256()}{SUFFIX}"
        with self._changing():
            # Another process may have downloaded it meanwhile. If its file were replaced, the locks of its users
            # would no longer protect the name.
            found = self._find(key, nullcontext)
            if found is not None and found.path == path:
                return found
            draft.share()
            draft.path.replace(path)
            file = _opened(path)
            self._touch(file)
            self._evict(self._size_bytes() - self._budget_bytes)
        return LockedFile(path, file)

    def free_space(self, needed_bytes: int) -> int:
        """Remove the least recently used files until so many bytes are free; return how many became free."""
        if not self._folder.is_dir():
            return 0
        with self._changing():
            return self._evict(needed_bytes)

    def with_room(self, write: Callable[[], None], needed_bytes: int) -> None:
        """Call `write`; if the disk is full, remove the least recently used files and call it once more.

        Raises:
            OSError: the disk is still full, or failed otherwise.
        """
        try:
            write()
        except OSError as error:
            if not is_disk_full(error) or not self.free_space(max(needed_bytes, 1)):
                raise
            log.warning("the disk is full; older downloaded files were removed")
            write()

    def downloaded_bytes(self, key: str) -> int:
        """Return how many bytes of a file have arrived, in any process."""
        arrived = 0
        for path in self._folder.glob(f".{_digest(key)}-*{DRAFT_SUFFIX}"):
            with suppress(OSError):  # committed at this moment
                arrived += path.stat().st_size
        return arrived

    def _changing(self) -> AbstractContextManager[None]:
        return exclusive(self._folder / ".lock")

    def _touch(self, file: BinaryIO) -> None:
        now = self._clock()
        os.utime(file.fileno(), (now, now))

    def _files(self) -> list[tuple[int, int, Path]]:
        found: list[tuple[int, int, Path]] = []
        for path in self._folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _size_bytes(self) -> int:
        return sum(size_bytes for _, size_bytes, _ in self._files())

    def _evict(self, excess_bytes: int) -> int:
        freed = 0
        for _, size_bytes, path in self._files() if excess_bytes > 0 else ():
            if freed >= excess_bytes:
                break
            if remove_if_unlocked(path):
                log.info("removed a downloaded file (%d bytes) from disk", size_bytes)
                freed += size_bytes
        return freed

    def _clear_abandoned_drafts(self) -> None:
        for path in self._folder.glob(f".*{DRAFT_SUFFIX}"):
            remove_if_unlocked(path)


def _opened(path: Path) -> BufferedReader:
    """Open and lock a file that existed a moment ago."""
    file = open_shared(path)
    if file is None:
        raise FileNotFoundError("a file was removed from the cache by somebody else")
    return file


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]
