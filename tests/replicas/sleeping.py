"""A replica whose generations are sleeps: production's queue, books, store and stats, without a base.

What stands in is the device alone. Adapter files are real files, fetched after a delay into the store's bounded host
tier. No replica finds an adapter on the disk: each is as if alone on a node that keeps nothing.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve_app.core import AdapterSpec, GenerationRequest
from serve_app.deployments.replica.multiplexed_ids import MultiplexedIds
from serve_app.engine.worker.pace import LoadTracker
from serve_app.engine.worker.scheduling import (
    AdapterSetKey,
    Batch,
    QueuedRequest,
    QueuePolicy,
    batch_key,
    next_batch,
    remaining_after,
)
from serve_app.routing import stats
from serve_app.routing.stats import DeviceLoad, RoutingStatsCollector
from serve_app.store.admitted import AdmittedFiles
from serve_app.store.store import AdapterStore
from serve_app.work import LatencyModel, work_units


@dataclass(frozen=True)
class Sleeps:
    """How long things take, in seconds, and what the host tier holds."""

    pace: LatencyModel
    swap_s: float
    fetch_s: float
    host_adapters: int
    file_bytes: int
    max_batch_images: int
    policy: QueuePolicy
    grain_s: float = stats.GRAIN_S  # to which a replica rounds the work that it reports
    is_fetching_late: bool = False  # the device waits for adapters that are fetched only when their turn comes


@dataclass(frozen=True)
class Slept:
    """Which replica answered, how many of the adapters it had to fetch, and whether it had to swap."""

    replica: str
    fetches: int
    is_swapped: bool


class SleepingDevice:
    """A thread that takes batches off production's queue and sleeps for as long as they would take."""

    def __init__(self, sleeps: Sleeps) -> None:
        self._sleeps = sleeps
        self._changed = threading.Condition()
        self._books = LoadTracker(sleeps.pace)
        self._waiting: list[QueuedRequest] = []
        self._futures: dict[int, Future[bool]] = {}
        self._tickets = 0
        self._running = 0
        self._passes = 0
        self._applied: AdapterSetKey = ()
        threading.Thread(target=self._work, daemon=True).start()

    def add_pending(self, units: float) -> None:
        with self._changed:
            self._books.add_pending(units)

    def submit(self, request: GenerationRequest) -> Future[bool]:
        """Queue an expected request; the future says whether it needed a swap."""
        composition = tuple((use.spec.key, use.scale) for use in request.adapters)
        with self._changed:
            units = work_units(request)
            self._books.remove_pending(units)
            self._books.arrived(units, time.monotonic())
            self._tickets += 1
            self._waiting.append(
                QueuedRequest(
                    self._tickets, batch_key(request, composition), request.num_images,
                    arrived_s=time.monotonic(), units=units,
                )
            )  # fmt: skip
            future = self._futures[self._tickets] = Future()
            self._changed.notify()
        return future

    def load(self) -> DeviceLoad:
        with self._changed:
            snapshot = self._books.snapshot((item.units for item in self._waiting), time.monotonic())
            return DeviceLoad(snapshot.backlog_s, snapshot.pace, progress=self._passes, is_busy=self._running > 0)

    def _work(self) -> None:
        while True:
            with self._changed:
                while (batch := self._next(now_s := time.monotonic())) is None:
                    self._changed.wait()
                units = sum(item.units for item in self._waiting if item.job_id in batch.tickets)
                self._waiting = remaining_after(self._waiting, batch, now_s=now_s, policy=self._sleeps.policy)
                self._books.begun(units, now_s)
                self._running = len(batch.tickets)
                is_swapped = batch.key.composition != self._applied
                self._applied = batch.key.composition
            time.sleep((self._sleeps.swap_s if is_swapped else 0.0) + self._sleeps.pace.seconds(units))
            with self._changed:
                self._books.ended(time.monotonic(), denoise_s=self._sleeps.pace.unit_s * units)
                self._running, self._passes = 0, self._passes + 1
                futures = [self._futures.pop(job_id) for job_id in batch.tickets]
            for future in futures:
                future.set_result(is_swapped)

    def _next(self, now_s: float) -> Batch | None:
        return next_batch(
            self._waiting,
            applied=self._applied,
            now_s=now_s,
            policy=self._sleeps.policy,
            max_images=self._sleeps.max_batch_images,
        )


@serve.deployment
class SleepingReplica:
    """One replica of a base that sleeps."""

    def __init__(self, sleeps: Sleeps, folder: Path) -> None:
        stats.GRAIN_S = sleeps.grain_s  # in this process, which has no other replica
        self._sleeps = sleeps
        self._folder = folder
        self._id = serve.get_replica_context().replica_id.unique_id
        self._device = SleepingDevice(self._sleeps)
        self._recorder = RoutingStatsCollector(clock=time.monotonic)
        self._turn = asyncio.Lock() if sleeps.is_fetching_late else nullcontext()
        self._store: AdapterStore[bytes] = AdapterStore(
            admitted=AdmittedFiles(
                Path(tempfile.mkdtemp(prefix="sleeping-", dir=folder.parent)),
                1,
                depends_on=("sleeping",),
                clock=time.time,
            ),
            fetch=self._fetch,
            admit=_admit,
            load=lambda spec, path: path.read_bytes(),
            size_of=len,
            host_budget_bytes=sleeps.host_adapters * sleeps.file_bytes,
            clock=time.monotonic,
        )
        self._ids = MultiplexedIds(self._store.resident)

    async def generate(self, request: GenerationRequest) -> Slept:
        self._device.add_pending(work_units(request))
        async with self._turn, AsyncExitStack() as pins:
            pins.enter_context(self._recorder.accepted(request))
            leases = await pins.enter_async_context(self._store.lease_all([use.spec for use in request.adapters]))
            await self._ids.update()
            is_swapped = await asyncio.wrap_future(self._device.submit(request))
        return Slept(self._id, sum(lease.tier == "remote" for lease in leases), is_swapped)

    async def record_routing_stats(self) -> dict[str, Any]:
        await self._ids.update()
        return self._recorder.snapshot(self._device.load())

    async def forget(self, key: str) -> None:
        """Drop an adapter, as a caller's DELETE does."""
        self._store.forget(key)

    async def held(self) -> tuple[str, frozenset[str]]:
        """Return this replica's id and the keys of the adapters that it has in memory."""
        return self._id, frozenset(self._store.resident())

    async def _fetch(self, spec: AdapterSpec) -> Path:
        await asyncio.sleep(self._sleeps.fetch_s)
        return self._folder / spec.filename


async def _admit(spec: AdapterSpec, source: Path, target: Path) -> None:
    await asyncio.to_thread(shutil.copyfile, source, target)


class LeastLoadedRouter(RequestRouter):
    """The replica with the fewest requests, any of several; Serve compares their numbers within a rank."""

    def initialize_state(self, **kwargs: Any) -> None:
        from random import Random

        self._rng = Random()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        return [self._rng.sample(candidate_replicas, len(candidate_replicas))]
