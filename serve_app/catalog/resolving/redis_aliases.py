"""The aliases in Redis, where they outlive the head node and its disk.

Owns two hashes of one Redis database. Every call may block on the network, so call it from a thread.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager

from pydantic import TypeAdapter
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError

from serve_app.catalog.resolving.aliases import Alias, AliasTable, TableVersion
from serve_app.core import AdapterRef
from serve_app.errors import NotReady

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
ALIASES, STATE = "loraplex:aliases", "loraplex:aliases:state"
_TARGET = TypeAdapter(AdapterRef)


class RedisAliasStore:
    """The aliases of a service in a Redis database that it shares with no other service.

    Invariants: those of `AliasStore`, as far as Redis keeps what it has answered for. An emptied database is another
    epoch.
    """

    def __init__(self, url: str) -> None:
        """Connect to nothing yet."""
        self._redis = Redis.from_url(
            url, decode_responses=True, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
        )

    def table(self) -> AliasTable:
        """Return all aliases.

        Raises:
            NotReady: Redis does not answer.
        """
        with _telling():
            return self._table()

    def put(self, alias: Alias, *, may_replace: bool = False) -> AliasTable:
        """Add an alias; adding what is there already changes nothing.

        Raises:
            NotReady: Redis does not answer.
            NameTaken, OutOfBounds: as `AliasTable.is_changed_by` does.
        """

        def change(watched: Pipeline) -> None:
            is_new = self._table().is_changed_by(alias, may_replace=may_replace)
            watched.multi()
            if is_new:
                watched.hset(ALIASES, alias.name, _TARGET.dump_json(alias.target).decode())
                watched.hincrby(STATE, "version", 1)

        return self._changed(change)

    def remove(self, name: str) -> AliasTable:
        """Remove an alias, if it is there.

        Raises:
            NotReady: Redis does not answer.
        """

        def change(watched: Pipeline) -> None:
            is_there = watched.hexists(ALIASES, name)
            watched.multi()
            if is_there:
                watched.hdel(ALIASES, name)
                watched.hincrby(STATE, "version", 1)

        return self._changed(change)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _changed(self, change: Callable[[Pipeline], None]) -> AliasTable:
        with _telling():
            # Again, where somebody else changed them meanwhile.
            self._redis.transaction(change, ALIASES, STATE)
            return self._table()

    def _table(self) -> AliasTable:
        with self._redis.pipeline(transaction=True) as reading:
            reading.hsetnx(STATE, "epoch", uuid.uuid4().hex)
            reading.hgetall(STATE)
            reading.hgetall(ALIASES)
            _, state, targets = reading.execute()
        aliases = {name: Alias(name, _TARGET.validate_json(target)) for name, target in targets.items()}
        return AliasTable(TableVersion(state["epoch"], int(state.get("version", 0))), aliases)


@contextmanager
def _telling() -> Generator[None]:
    try:
        yield
    except RedisError as error:
        log.error("Redis, which keeps the aliases, does not answer: %s", type(error).__name__)
        raise NotReady("the registry") from None
