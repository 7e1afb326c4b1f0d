"""Adapters on their way to a request: remote file -> admitted file on disk -> host memory.

Owns the host tier, its byte budget, and the order of the tiers. Must not know what a parsed adapter is, how a
file is fetched or checked, Ray or torch: those are handed in. Runs on one event loop; everything that blocks
runs in threads of its own, so that slow downloads elsewhere in the process never stand before a file that is
ready.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, ParamSpec, TypeVar

from serve_app.core import AdapterSpec
from serve_app.errors import DiskFull, LoraplexError, ReplicaLost
from serve_app.file_locks import is_disk_full
from serve_app.refusals import RefusedAdapter
from serve_app.store.admitted import AdmittedFiles
from serve_app.store.budget import ByteBudget, EvictionPlan

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

Tier = Literal["host", "disk", "remote"]

# What `load` may raise over a file that is damaged: it is made anew.
_DAMAGED = (OSError, ValueError, LookupError, LoraplexError)

_THREADS = 4
_MAX_REFUSED = 1024
# An adapter needs room twice, as it came and as it is admitted, and a little for what goes with it.
_ROOM_TO_SPARE_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Lease(Generic[T]):
    """An adapter in host memory, pinned there while the lease is held.

    `tier` is where it was found: "host", "disk" (its canonical file) or "remote" (it had to be fetched and
    admitted). `fetch_ms` is how long this asker waited for it.
    """

    spec: AdapterSpec
    adapter: T = field(repr=False)
    tier: Tier
    fetch_ms: float


@dataclass(frozen=True, slots=True)
class StoreState:
    """The host tier at one moment; `evictions` counts all that has left it since the start."""

    resident: int
    pinned: int
    in_flight: int
    used_bytes: int
    budget_bytes: int
    evictions: int


@dataclass(frozen=True, slots=True)
class _Loaded(Generic[T]):
    adapter: T
    tier: Tier


class AdapterStore(Generic[T]):
    """Adapters by key, each fetched and loaded once however many ask.

    Invariants: a leased adapter is never evicted. Whoever leaves takes nobody's fetch along. A fetch that
    fails fails all who wait for it, each with an error of its own, and is forgotten: the next asker tries
    again. A file that was refused for what it holds is not looked at again for `failure_ttl_s`. No key ever waits
    for another key's fetch.
    """

    def __init__(
        self,
        *,
        admitted: AdmittedFiles,
        fetch: Callable[[AdapterSpec], Awaitable[Path]],
        admit: Callable[[AdapterSpec, Path, Path], Awaitable[None]],
        load: Callable[[AdapterSpec, Path], T],
        size_of: Callable[[T], int],
        host_budget_bytes: int,
        clock: Callable[[], float],
        failure_ttl_s: float = 0.0,
        release: Callable[[AdapterSpec], None] = lambda _: None,
        free_space: Callable[[int], int] = lambda _: 0,
    ) -> None:
        """Start with an empty host tier over what is already on disk.

        Args:
            admitted: The canonical files of this base on this node; the store's own from now on.
            fetch: Give the local path of the adapter's original file, downloading it if need be.
            admit: Check the original (first path) and write its canonical form (second path), or raise.
            load: Read a canonical file into memory; runs in a thread. A damaged file is an OSError,
                ValueError, LookupError or LoraplexError.
            size_of: The bytes that a loaded adapter takes of the budget.
            host_budget_bytes: What unleased and leased adapters may take together, as long as leases allow.
            clock: Monotonic seconds.
            failure_ttl_s: How long a file's refusal is repeated without another look at it.
            release: Told when nobody here reads the adapter's original any more.
            free_space: Remove at least so many bytes of originals from a full disk, and tell how many went; runs in
                a thread.
        """
        self._admitted = admitted
        self._fetch = fetch
        self._admit = admit
        self._load = load
        self._size_of = size_of
        self._clock = clock
        self._budget = ByteBudget(host_budget_bytes)
        self._adapters: dict[str, T] = {}
        self._flights: dict[str, asyncio.Task[_Loaded[T]]] = {}
        self._evictions = 0
        self._failure_ttl_s = failure_ttl_s
        self._release = release
        self._make_room = free_space
        self._refused: dict[str, tuple[RefusedAdapter, float]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="adapter-store")

    @asynccontextmanager
    async def lease(self, spec: AdapterSpec) -> AsyncGenerator[Lease[T]]:
        """Hold the adapter in memory, getting it from wherever it is first.

        Raises:
            LoraplexError: Whatever fetching or admitting the file raised.
            DiskFull: There is no room for it, not even without the files that nobody holds.
            ReplicaLost: The store was closed meanwhile.
        """
        asked_at = self._clock()
        self._budget.pin(spec.key)
        try:
            found = await self._find(spec)
            yield Lease(spec, found.adapter, found.tier, (self._clock() - asked_at) * 1000)
        finally:
            self._evict(self._budget.unpin(spec.key))

    def resident(self) -> tuple[str, ...]:
        """The keys in host memory, least recently used first."""
        return self._budget.keys

    def is_resident(self, key: str) -> bool:
        """Tell whether a lease of this key would be given at once."""
        return key in self._adapters

    def forget(self, key: str) -> None:
        """Drop the adapter from host memory, if leased then once it is not; its file on disk stays."""
        self._evict(self._budget.forget(key))

    def state(self) -> StoreState:
        """What the host tier holds now."""
        return StoreState(
            resident=len(self._adapters),
            pinned=len(self._budget.pinned),
            in_flight=len(self._flights),
            used_bytes=self._budget.used_bytes,
            budget_bytes=self._budget.budget_bytes,
            evictions=self._evictions,
        )

    async def close(self) -> None:
        """Give up every fetch under way; what is leased stays with its holders."""
        flights = tuple(self._flights.values())
        for flight in flights:
            flight.cancel()
        if flights:
            await asyncio.wait(flights)
        self._threads.shutdown(wait=False)
        self._admitted.close()

    async def _find(self, spec: AdapterSpec) -> _Loaded[T]:
        if spec.key in self._adapters:
            return _Loaded(self._adapters[spec.key], "host")
        flight = self._flights.get(spec.key)
        if flight is None:
            flight = asyncio.create_task(self._bring(spec), name=f"adapter {spec.key}")
            flight.add_done_callback(_note_failure)
            self._flights[spec.key] = flight
        # Waiting beside the task, not on it: an asker that is cancelled leaves it running.
        await asyncio.wait((flight,))
        if flight.cancelled():
            raise ReplicaLost(spec.base_id, attempts=1)
        error = flight.exception()
        if isinstance(error, LoraplexError):
            # One instance raised in several requests would mix their tracebacks and notes.
            raise copy.copy(error) from error
        return flight.result()

    async def _bring(self, spec: AdapterSpec) -> _Loaded[T]:
        try:
            found = await self._in_thread(self._load_admitted, spec)
            if found is None:
                found = await self._load_remote(spec)
            self._adapters[spec.key] = found.adapter
            self._evict(self._budget.add(spec.key, self._size_of(found.adapter)))
            return found
        finally:
            del self._flights[spec.key]

    def _load_admitted(self, spec: AdapterSpec) -> _Loaded[T] | None:
        with self._admitted.reading(spec.key) as path:
            if path is None:
                return None
            try:
                return _Loaded(self._load(spec, path), "disk")
            except _DAMAGED:
                log.warning("the admitted file of %s is damaged; making it anew", spec.key, exc_info=True)
                return None

    async def _load_remote(self, spec: AdapterSpec) -> _Loaded[T]:
        self._check_refused(spec)
        try:
            try:
                return await self._make_ready(spec)
            except DiskFull:
                if not await self._in_thread(self._free, 2 * spec.size_bytes + _ROOM_TO_SPARE_BYTES):
                    log.error("the disk of this node is full, and nothing can be dropped for %s", spec.key)
                    raise
            return await self._make_ready(spec)
        finally:
            self._release(spec)

    async def _make_ready(self, spec: AdapterSpec) -> _Loaded[T]:
        source = await self._fetch(spec)
        with _naming_full_disk(spec):
            draft = await self._in_thread(self._admitted.new_draft)
        try:
            await self._admit(spec, source, draft)
            with _naming_full_disk(spec):
                return await self._in_thread(self._publish, spec, draft)
        except RefusedAdapter as error:
            self._note_refused(spec, error)
            raise
        finally:
            self._threads.submit(self._admitted.drop_draft, draft)

    def _free(self, needed_bytes: int) -> int:
        """Drop what can be had again, the originals first, since what is admitted is read from disk."""
        freed = self._make_room(needed_bytes)
        return freed + (self._admitted.free_space(needed_bytes - freed) if freed < needed_bytes else 0)

    def _check_refused(self, spec: AdapterSpec) -> None:
        error, until = self._refused.get(spec.key, (None, 0.0))
        if error is not None and self._clock() < until:
            raise copy.copy(error)
        self._refused.pop(spec.key, None)

    def _note_refused(self, spec: AdapterSpec, error: RefusedAdapter) -> None:
        if len(self._refused) >= _MAX_REFUSED:
            del self._refused[next(iter(self._refused))]
        self._refused[spec.key] = (copy.copy(error), self._clock() + self._failure_ttl_s)

    def _publish(self, spec: AdapterSpec, draft: Path) -> _Loaded[T]:
        with self._admitted.publish(spec.key, draft) as path:
            return _Loaded(self._load(spec, path), "remote")

    async def _in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _evict(self, plan: EvictionPlan) -> None:
        for key in plan.evict:
            del self._adapters[key]
            log.info("evicted %s from host memory", key)
        self._evictions += len(plan.evict)


@contextmanager
def _naming_full_disk(spec: AdapterSpec) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(spec.id) from error
        raise


def _note_failure(flight: asyncio.Task[_Loaded[T]]) -> None:
    # Asking for the error also keeps asyncio quiet where no asker is left to hear of it.
    if not flight.cancelled() and (error := flight.exception()) is not None:
        log.info("%s could not be made ready: %s", flight.get_name(), error)
