"""Further names for adapters: the values, and the file in which they outlive the service.

Owns the SQLite file and its change counter. Must not know Ray, HTTP, or whether a name leads anywhere. Every call of
the store may block on the disk, so call it from a thread.
"""

from __future__ import annotations

import copy
import sqlite3
import threading
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from serve_app.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from serve_app.catalog.resolving.sqlite_file import open_database
from serve_app.core import AdapterRef
from serve_app.errors import AccessDenied, HubUnavailable, ModelNotFound, NameTaken, OutOfBounds

# Errors that a caller without access to the adapter may get.
UNREADABLE = (ModelNotFound, AccessDenied, HubUnavailable)
MAX_ALIASES = 10_000
_DEFAULTS = TypeAdapter(AdapterDefaults)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS aliases (
    name TEXT PRIMARY KEY, id TEXT NOT NULL, revision TEXT, filename TEXT, changed_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (only INTEGER PRIMARY KEY CHECK (only = 0), epoch TEXT NOT NULL, version INTEGER);
"""


@dataclass(frozen=True, slots=True)
class Alias:
    """A further name of an adapter: requests that name it mean `target`, with the target's defaults."""

    name: str
    target: AdapterRef


@dataclass(frozen=True, slots=True)
class TableVersion:
    """Which aliases are known: `number` grows with each change of one file, `epoch` tells files apart."""

    epoch: str
    number: int


NOTHING_YET = TableVersion("", 0)


@dataclass(frozen=True, slots=True)
class AliasTable:
    """All aliases at one version, by name."""

    version: TableVersion = NOTHING_YET
    aliases: Mapping[str, Alias] = field(default_factory=dict[str, Alias])

    def resolve_alias(self, ref: AdapterRef) -> AdapterRef:
        """Return the adapter that a request means: an alias's target at the request's own scale, else `ref` itself.

        A revision or file that the request names goes before the alias's.
        """
        alias = self.aliases.get(ref.id)
        if alias is None:
            return ref
        target = alias.target
        return AdapterRef(
            target.id,
            ref.scale,
            ref.revision or target.revision,
            ref.filename or target.filename,
            target.defaults,
        )

    def is_changed_by(self, alias: Alias, *, may_replace: bool) -> bool:
        """Say whether adding an alias changes anything.

        Raises:
            NameTaken: the alias stands for something else, and may not be replaced.
            OutOfBounds: there are as many as are kept.
        """
        known = self.aliases.get(alias.name)
        if known is None and len(self.aliases) >= MAX_ALIASES:
            raise OutOfBounds("lora_name", f"one alias more than {MAX_ALIASES}", f"at most {MAX_ALIASES} in all")
        if known not in (None, alias) and not may_replace:
            # Not for which: an admin need not be able to read it.
            raise NameTaken(alias.name, "it is an alias of another adapter, or has other defaults")
        return known != alias

    def names_of(self, model: str) -> tuple[str, ...]:
        """Return the aliases of an adapter, sorted."""
        return tuple(sorted(alias.name for alias in self.aliases.values() if alias.target.id == model))


@contextmanager
def told_as(name: str, target: str) -> Generator[None]:
    """Refuse an alias's target under the alias's name, so that callers without access do not learn the target."""
    try:
        yield
    except UNREADABLE as error:
        if name == target:
            raise
        renamed = copy.copy(error)
        renamed.model = name
        raise renamed from None


class AliasStore:
    """The aliases on disk.

    Invariants: a change is on disk before the call returns, or it is not made; the version grows with each change and
    with nothing else. A damaged file is put aside under another name, and an empty one begun. Thread-safe.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float]) -> None:
        """Open or create the file; `clock` is in seconds since 1970."""
        self._clock = clock
        self._lock = threading.Lock()
        self._database = open_database(path, _prepare)

    def table(self) -> AliasTable:
        """Return all aliases."""
        with self._lock:
            return self._table()

    def put(self, alias: Alias, *, may_replace: bool = False) -> AliasTable:
        """Add an alias; adding what is there already changes nothing.

        Raises:
            NameTaken: the alias stands for something else, and may not be replaced.
            OutOfBounds: there are as many as are kept.
        """
        target = alias.target
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            table = self._table()
            if not table.is_changed_by(alias, may_replace=may_replace):
                return table
            defaults = _DEFAULTS.dump_json(target.defaults).decode()
            row = (alias.name, target.id, target.revision, target.filename, self._clock(), defaults)
            self._database.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?, ?, ?)", row)
            self._database.execute("UPDATE state SET version = version + 1")
            return self._table()

    def remove(self, name: str) -> AliasTable:
        """Remove an alias, if it is there."""
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            if self._database.execute("DELETE FROM aliases WHERE name = ?", (name,)).rowcount:
                self._database.execute("UPDATE state SET version = version + 1")
            return self._table()

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._database.close()

    def _table(self) -> AliasTable:
        with closing(self._database.execute("SELECT name, id, revision, filename, defaults FROM aliases")) as rows:
            aliases = {name: Alias(name, _target(*target)) for name, *target in rows}
        epoch, number = self._database.execute("SELECT epoch, version FROM state").fetchone()
        return AliasTable(TableVersion(epoch, number), aliases)


def _target(model: str, revision: str | None, filename: str | None, defaults: str | None) -> AdapterRef:
    stated = NO_DEFAULTS if defaults is None else _DEFAULTS.validate_json(defaults)
    return AdapterRef(model, None, revision, filename, stated)


def _prepare(database: sqlite3.Connection) -> None:
    database.executescript(_SCHEMA)
    if "defaults" not in {row[1] for row in database.execute("PRAGMA table_info(aliases)")}:
        database.execute("ALTER TABLE aliases ADD COLUMN defaults TEXT")  # a file of an older version
    database.execute("INSERT OR IGNORE INTO state VALUES (0, ?, 0)", (uuid.uuid4().hex,))
