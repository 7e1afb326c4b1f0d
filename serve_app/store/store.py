"""Loading adapters for requests: remote file -> admitted file on disk -> host memory.

Owns the host tier, its byte budget, and the order of the tiers. Must not know what a parsed adapter is, how a file is
downloaded or checked, Ray or torch: these are passed in. Runs on one event loop; blocking work runs in its own threads,
so that slow downloads elsewhere in the process never delay a file that is on disk.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Generator, Sequence
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
from serve_app.store.pins import Pins

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

Tier = Literal["host", "disk", "remote"]

# Errors of `load` for a damaged file, which is then made again.
_DAMAGED = (OSError, ValueError, LookupError, LoraplexError)

_THREADS = 4
PIN_WAIT_S = 60.0
_MAX_REFUSED = 1024
# The disk needs space for the downloaded and for the admitted file, and a little more for what goes with them.
_SPARE_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Lease(Generic[T]):
    """An adapter in host memory, pinned there while the lease is held.

    `tier` is where it was found: "host", "disk" (its canonical file) or "remote" (it had to be downloaded and
    admitted). `fetch_ms` is how long this request waited for it.
    """

    spec: AdapterSpec
    adapter: T = field(repr=False)
    tier: Tier
    fetch_ms: float


@dataclass(frozen=True, slots=True)
class StoreState:
    """A snapshot of the host tier; `evictions` counts from the start."""

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
    """Adapters by key; one fetch of a key serves all requests that wait for it.

    Invariants: a leased adapter is never evicted. Leased adapters fit the budget, or are those of one request. If one
    waiting request is cancelled, the download continues for the others. A failed fetch fails every request that waits
    for it, each with its own error, and is not cached: the next request tries again. A file that was refused is not
    read again for `failure_ttl_s`. No key waits for another key's fetch.
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
        pin_wait_s: float = PIN_WAIT_S,
        release: Callable[[AdapterSpec], None] = lambda _: None,
        free_space: Callable[[int], int] = lambda _: 0,
    ) -> None:
        """Start with an empty host tier; the files on disk stay.

        Args:
            admitted: The canonical files of this base on this node; the store closes them.
            fetch: Return the local path of the adapter's downloaded file.
            admit: Check the downloaded file (first path) and write its canonical form (second path), or raise.
            load: Read a canonical file into memory; runs in a thread. A damaged file is an OSError,
                ValueError, LookupError or LoraplexError.
            size_of: The bytes of a loaded adapter.
            host_budget_bytes: The limit of all adapters in host memory; only those of a single request may exceed it.
            clock: Monotonic seconds.
            failure_ttl_s: How long a file's refusal is repeated without reading it again.
            pin_wait_s: How long a request waits for the memory that the adapters of others fill.
            release: Called when the adapter's downloaded file is no longer read.
            free_space: Remove at least so many bytes of downloaded files from a full disk, and return how many; runs
                in a thread.
        """
        self._admitted = admitted
        self._fetch = fetch
        self._admit = admit
        self._load = load
        self._size_of = size_of
        self._clock = clock
        self._budget = ByteBudget(host_budget_bytes)
        self._pins = Pins(self._budget, wait_s=pin_wait_s)
        self._adapters: dict[str, T] = {}
        self._flights: dict[str, asyncio.Task[_Loaded[T]]] = {}
        self._evictions = 0
        self._failure_ttl_s = failure_ttl_s
        self._release = release
        self._free_downloads = free_space
        self._refused: dict[str, tuple[RefusedAdapter, float]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="adapter-store")

    @asynccontextmanager
    async def lease(self, spec: AdapterSpec) -> AsyncGenerator[Lease[T]]:
        """Load one adapter; as `lease_all`."""
        async with self.lease_all((spec,)) as (lease,):
            yield lease

    @asynccontextmanager
    async def lease_all(self, specs: Sequence[AdapterSpec]) -> AsyncGenerator[list[Lease[T]]]:
        """Load the adapters of a request into host memory and keep them there until the end of the block.

        While others hold the memory, it waits and holds nothing.

        Raises:
            LoraplexError: Raised by the download or the check of a file.
            HostMemoryFull: Others held the memory for too long.
            DiskFull: There is no space for a file, even after removing unused ones.
            ReplicaLost: The store was closed meanwhile.
        """
        if not specs:
            yield []  # a request of the base alone does not wait for memory
            return
        asked_at = self._clock()
        sizes = {spec.key: spec.size_bytes for spec in specs}
        await self._pins.pin(sizes)
        is_pinned = True
        try:
            found = await self._find_all(specs)
            while self._pins.exceeds(sizes):  # the files did not tell how large they would be
                self._unpin(sizes)
                is_pinned = False
                await self._pins.pin(sizes, is_again=True)
                is_pinned = True
                found = await self._find_all(specs)
            fetch_ms = (self._clock() - asked_at) * 1000
            yield [Lease(spec, one.adapter, one.tier, fetch_ms) for spec, one in zip(specs, found, strict=True)]
        finally:
            if is_pinned:
                self._unpin(sizes)

    def resident(self) -> tuple[str, ...]:
        """The keys in host memory, least recently used first."""
        return self._budget.keys

    def is_resident(self, key: str) -> bool:
        """Whether a lease of this key would not wait."""
        return key in self._adapters

    def forget(self, key: str) -> None:
        """Drop the adapter from host memory, or when its last lease ends; its file on disk stays."""
        self._evict(self._budget.forget(key))

    def state(self) -> StoreState:
        """Return a snapshot of the host tier."""
        return StoreState(
            resident=len(self._adapters),
            pinned=len(self._budget.pinned),
            in_flight=len(self._flights),
            used_bytes=self._budget.used_bytes,
            budget_bytes=self._budget.budget_bytes,
            evictions=self._evictions,
        )

    async def close(self) -> None:
        """Cancel every running fetch; leased adapters stay with their holders."""
        flights = tuple(self._flights.values())
        for flight in flights:
            flight.cancel()
        if flights:
            await asyncio.wait(flights)
        self._threads.shutdown(wait=False)
        self._admitted.close()

    async def _find_all(self, specs: Sequence[AdapterSpec]) -> list[_Loaded[T]]:
        """Load adapters at the same time; the first failure is raised once none of them is waited for."""
        finding = [asyncio.ensure_future(self._find(spec)) for spec in specs]
        try:
            return await asyncio.gather(*finding)
        finally:
            for one in finding:
                one.cancel()
            await asyncio.gather(*finding, return_exceptions=True)

    def _unpin(self, keys: Collection[str]) -> None:
        for plan in self._pins.unpin(keys):
            self._evict(plan)

    async def _find(self, spec: AdapterSpec) -> _Loaded[T]:
        if spec.key in self._adapters:
            return _Loaded(self._adapters[spec.key], "host")
        flight = self._flights.get(spec.key)
        if flight is None:
            flight = asyncio.create_task(self._load_tiers(spec), name=f"adapter {spec.key}")
            flight.add_done_callback(_note_failure)
            self._flights[spec.key] = flight
        # Not awaited directly, so that a cancelled request leaves the task running.
        await asyncio.wait((flight,))
        if flight.cancelled():
            raise ReplicaLost(spec.base_id, attempts=1)
        error = flight.exception()
        if isinstance(error, LoraplexError):
            # One instance raised in several requests would mix their tracebacks.
            raise copy.copy(error) from error
        return flight.result()

    async def _load_tiers(self, spec: AdapterSpec) -> _Loaded[T]:
        try:
            found = await self._in_thread(self._load_admitted, spec)
            if found is None:
                found = await self._load_remote(spec)
            self._adapters[spec.key] = found.adapter
            size_bytes = self._size_of(found.adapter)
            self._evict(self._budget.add(spec.key, size_bytes))
            self._pins.learn(spec.key, size_bytes)
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
                log.warning("the admitted file of %s is damaged; it is made again", spec.key, exc_info=True)
                return None

    async def _load_remote(self, spec: AdapterSpec) -> _Loaded[T]:
        self._check_refused(spec)
        try:
            try:
                return await self._fetch_and_admit(spec)
            except DiskFull:
                if not await self._in_thread(self._free, 2 * spec.size_bytes + _SPARE_BYTES):
                    log.error("the disk of this node is full, and nothing can be removed for %s", spec.key)
                    raise
            return await self._fetch_and_admit(spec)
        finally:
            self._release(spec)

    async def _fetch_and_admit(self, spec: AdapterSpec) -> _Loaded[T]:
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
        """Remove files that can be made again: downloaded files first, since only admitted ones are read."""
        freed = self._free_downloads(needed_bytes)
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
    # Reading the error also keeps asyncio from logging it if no request is left.
    if not flight.cancelled() and (error := flight.exception()) is not None:
        log.info("%s could not be loaded: %s", flight.get_name(), error)
