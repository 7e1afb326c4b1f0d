"""What was drawn, by day, key and base, and how long bases took to start, in a file that outlives the service.

Owns the SQLite file. Must not know Ray. Every call may block on the disk, so call it from a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path

from serve_app.catalog.replica_report import KEPT_USAGE_DAYS, DayUsage
from serve_app.catalog.resolving.sqlite_file import open_database

_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    day TEXT, key TEXT, base TEXT, images INTEGER NOT NULL, device_s REAL NOT NULL, PRIMARY KEY (day, key, base)
) WITHOUT ROWID;
DROP TABLE IF EXISTS starts; -- had no times
CREATE TABLE IF NOT EXISTS last_starts (base TEXT PRIMARY KEY, start_s REAL NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
"""
# A base that has not started for so long is forgotten: its id may be an adapter's then.
KEPT_STARTS_S = 90 * 86400.0
_ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?) ON CONFLICT (day, key, base)
DO UPDATE SET images = images + excluded.images, device_s = device_s + excluded.device_s
"""


class Ledger:
    """The file. Requests without a key are those of the key "". Thread-safe."""

    def __init__(self, path: Path, *, clock: Callable[[], float]) -> None:
        """Open or create the file; `clock` is in seconds since 1970."""
        self._clock = clock
        self._lock = threading.Lock()
        self._database = open_database(path, lambda database: database.executescript(_SCHEMA))

    def add(self, drawn: Sequence[DayUsage]) -> None:
        """Add what was drawn; all of it or, where the disk fails, nothing."""
        if not drawn:
            return
        oldest = date.fromisoformat(max(row.day for row in drawn)) - timedelta(KEPT_USAGE_DAYS)
        rows = [(row.day, row.key or "", row.base_id, row.images, row.device_s) for row in drawn]
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(_ADD, rows)
            self._database.execute("DELETE FROM usage WHERE day < ?", (oldest.isoformat(),))

    def usage(self, since: str) -> tuple[DayUsage, ...]:
        """Return what was drawn from a day on, by day, key and base."""
        with self._lock, closing(self._database.execute("SELECT * FROM usage WHERE day >= ?", (since,))) as rows:
            return tuple(DayUsage(day, key or None, *rest) for day, key, *rest in rows)

    def note_start(self, base_id: str, start_s: float) -> None:
        """Remember how long the last start of a base took."""
        with self._lock:
            self._database.execute("REPLACE INTO last_starts VALUES (?, ?, ?)", (base_id, start_s, self._clock()))

    def start_times_s(self) -> dict[str, float]:
        """Return how long the last start of each base took that is not long past."""
        since = (self._clock() - KEPT_STARTS_S,)
        with self._lock:
            return dict(self._database.execute("SELECT base, start_s FROM last_starts WHERE at >= ?", since))

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._database.close()
