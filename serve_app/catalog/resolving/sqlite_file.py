"""A SQLite file that outlives the service. Every call may block on the disk."""

from __future__ import annotations

import logging
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)


def open_database(path: Path, prepare: Callable[[sqlite3.Connection], object]) -> sqlite3.Connection:
    """Open or create a file, on which `prepare` makes the tables; a damaged one is put aside, and an empty one begun.

    Transactions are begun by hand. A change is on disk once it is committed.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return _opened(path, prepare)
    except sqlite3.DatabaseError as error:
        aside = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
        log.error("the file %s is damaged (%s); it is kept as %s", path.name, error, aside.name)
        for suffix in ("", "-wal", "-shm"):
            if (part := path.with_name(path.name + suffix)).exists():
                part.rename(aside.with_name(aside.name + suffix))
        return _opened(path, prepare)


def _opened(path: Path, prepare: Callable[[sqlite3.Connection], object]) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        prepare(database)
        (verdict,) = database.execute("PRAGMA quick_check").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database
