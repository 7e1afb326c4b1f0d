"""The digests of local files: computed when first asked for, and kept while a file is unchanged.

Owns when a file counts as changed, and the file on this node's disk in which digests outlive a process. Calls block.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from serve_app.catalog.reading.repository import DIGEST_CHARACTERS, content_digest

log = logging.getLogger(__name__)

MAX_DIGESTS = 10_000


class FileDigests:
    """The first 40 hex digits of SHA-256 by file. Thread-safe.

    A file is unchanged while its inode, size, modification and change times are; the change time cannot be set.
    """

    def __init__(self, kept_in: Path | None = None) -> None:
        """Keep the digests in memory, and in the SQLite file `kept_in` for other processes and the next start."""
        self._kept_in = kept_in
        self._database: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self._digests: dict[Path, tuple[str, str]] = {}

    def of(self, paths: Sequence[Path]) -> str:
        """Return the digest of a file; of several, the digest of theirs.

        Raises:
            OSError: a file cannot be read.
        """
        return content_digest([self._of(path) for path in paths])

    def _of(self, path: Path) -> str:
        mark = mark_of(path)
        known = self._digests.get(path) or self._read(path)
        if known is None or known[0] != mark:
            with path.open("rb") as file:
                known = mark, hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_CHARACTERS]
            self._write(path, *known)
        if len(self._digests) >= MAX_DIGESTS:
            self._digests.clear()
        self._digests[path] = known
        return known[1]

    def _read(self, path: Path) -> tuple[str, str] | None:
        rows = self._execute("SELECT mark, digest FROM digests WHERE path = ?", str(path))
        return rows[0] if rows else None

    def _write(self, path: Path, mark: str, digest: str) -> None:
        self._execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", str(path), mark, digest)

    def _execute(self, statement: str, *values: str) -> list[tuple[str, str]]:
        if self._kept_in is None:
            return []
        try:
            with self._lock:
                self._database = self._database or _opened(self._kept_in)
                return self._database.execute(statement, values).fetchall()
        except (sqlite3.Error, OSError, UnicodeEncodeError) as error:
            log.warning("a digest of an adapter file is not kept on disk: %s", error)
            return []


def _opened(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    database.execute("PRAGMA journal_mode = WAL")
    # A digest lost in a crash is computed again.
    database.execute("PRAGMA synchronous = OFF")
    database.execute("CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, mark TEXT, digest TEXT)")
    return database


def mark_of(path: Path) -> str:
    """Return a text that changes whenever a file does."""
    stat = path.stat()
    return f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
