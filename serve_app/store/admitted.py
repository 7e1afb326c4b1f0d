"""The admitted adapters of a node: canonical files on local disk, shared by its replicas.

Owns one folder: names, publication, eviction, and the removal of files of crashed processes. Must not know what a
canonical file contains, where it came from, or the event loop: every call may block on the disk, so call it from a
thread.

    <folder>/.lock                          held while files are published or evicted
    <folder>/<base>/<adapter>.canonical     always a whole file; its modification time is its last use
    <folder>/.drafts-<random>/              unfinished files of one process, with a lock that it holds while it runs

A reader holds a shared lock on its file; eviction removes only files that it can lock exclusively. The kernel releases
the locks of a process that dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from serve_app.file_locks import exclusive, is_disk_full, open_shared, remove_if_unlocked, unlocking
from serve_app.store.budget import Entry, plan_eviction

log = logging.getLogger(__name__)

_SUFFIX = ".canonical"
_DRAFTS = ".drafts-"
_START_BYTES = 1024**2


class AdmittedFiles:
    """The files of one base, reader and limits, in a folder and a byte budget that all bases of the node share.

    Invariants: a published file is whole. A file in use by any process is never evicted. After a publication the files
    fit the budget, or only files in use are left. Thread-safe.
    """

    def __init__(
        self,
        folder: Path,
        budget_bytes: int,
        *,
        depends_on: Sequence[str],
        clock: Callable[[], float],
    ) -> None:
        """Open or create the folder, and remove the files of dead processes.

        Args:
            folder: The folder of all bases of this node.
            budget_bytes: For all bases together; drafts do not count.
            depends_on: The inputs of a canonical form besides the adapter's own bytes: the base's structure and
                dtype, the limits and the reader. Files that were admitted under others are not seen.
            clock: Unix seconds, comparable between the processes of the node.
        """
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._base_folder = folder / _digest("\0".join(depends_on))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._base_folder.mkdir(mode=0o700, exist_ok=True)
        with self._exclusive():
            self._clear_abandoned_drafts()
            self._drafts = self._make_drafts()
            self._alive = (self._drafts / ".lock").open("wb")
            fcntl.flock(self._alive, fcntl.LOCK_EX)

    def _make_drafts(self) -> Path:
        try:
            return Path(tempfile.mkdtemp(prefix=_DRAFTS, dir=self._folder))
        except OSError as error:
            # A replica must be able to start on a full disk.
            if not is_disk_full(error) or not self._drop(_START_BYTES):
                raise
            return Path(tempfile.mkdtemp(prefix=_DRAFTS, dir=self._folder))

    def close(self) -> None:
        """Remove this process's unfinished files; the published ones stay."""
        shutil.rmtree(self._drafts, ignore_errors=True)
        self._alive.close()

    def path(self, key: str) -> Path:
        """Where the file of this adapter is, or would be."""
        return self._base_folder / f"{_digest(key)}{_SUFFIX}"

    def new_draft(self) -> Path:
        """Return a path to write to, alone in its folder; pass it to `publish` or `drop_draft`."""
        return Path(tempfile.mkdtemp(dir=self._drafts)) / "draft"

    def drop_draft(self, draft: Path) -> None:
        """Remove the draft's folder with all its files."""
        shutil.rmtree(draft.parent, ignore_errors=True)

    @contextmanager
    def reading(self, key: str) -> Generator[Path | None]:
        """Lock the file against eviction in every process, and record a use; None if it does not exist."""
        path = self.path(key)
        file = open_shared(path)
        if file is None:
            yield None
            return
        with file, unlocking(file):
            self._touch(file)
            yield path

    @contextmanager
    def publish(self, key: str, draft: Path) -> Generator[Path]:
        """Make a finished draft the file of this adapter, locked as by `reading`; older files are evicted.

        A file larger than the whole budget exists only while it is locked.

        Raises:
            OSError: The draft was never written, or the disk failed.
        """
        path = self.path(key)
        excess_bytes = 0
        try:
            with draft.open("rb") as file, unlocking(file):
                fcntl.flock(file, fcntl.LOCK_SH)
                # After a power cut, the name must not exist without its bytes.
                os.fsync(file.fileno())
                self._touch(file)
                with self._exclusive():
                    draft.replace(path)
                    excess_bytes = self._evict()
                    self._clear_abandoned_drafts()
                yield path
        finally:
            if excess_bytes:
                with self._exclusive():
                    self._evict()

    def free_space(self, needed_bytes: int) -> int:
        """Evict the least recently read files until so many bytes are free; return how many bytes became free."""
        with self._exclusive():
            return self._drop(needed_bytes)

    def _drop(self, needed_bytes: int) -> int:
        freed = 0
        for name, entry in self._entries().items():
            if freed >= needed_bytes:
                break
            if remove_if_unlocked(Path(name)):
                log.info("evicted %s (%d bytes) from a full disk", Path(name).name, entry.size_bytes)
                freed += entry.size_bytes
        return freed

    def _touch(self, file: BinaryIO) -> None:
        now = self._clock()
        os.utime(file.fileno(), (now, now))

    def _exclusive(self) -> AbstractContextManager[None]:
        return exclusive(self._folder / ".lock")

    def _evict(self) -> int:
        entries = self._entries()
        while True:
            plan = plan_eviction(entries.values(), 0, self._budget_bytes)
            if not plan.evict:
                return plan.excess_bytes
            for name in plan.evict:
                if remove_if_unlocked(Path(name)):
                    log.info("evicted %s (%d bytes) from disk", Path(name).name, entries[name].size_bytes)
                    del entries[name]
                else:
                    entries[name] = replace(entries[name], is_pinned=True)

    def _entries(self) -> dict[str, Entry]:
        found: list[tuple[int, Entry]] = []
        # Not hidden folders: a glob fails if another process removes its drafts meanwhile.
        for path in self._folder.glob(f"[!.]*/*{_SUFFIX}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, Entry(str(path), status.st_size)))
        found.sort(key=lambda aged: (aged[0], aged[1].key))
        return {entry.key: entry for _, entry in found}

    def _clear_abandoned_drafts(self) -> None:
        for folder in self._folder.glob(f"{_DRAFTS}*"):
            lock = folder / ".lock"
            if not lock.exists() or remove_if_unlocked(lock):
                log.warning("removing unfinished files of a process that died")
                shutil.rmtree(folder, ignore_errors=True)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]
