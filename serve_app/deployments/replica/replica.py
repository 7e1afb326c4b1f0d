"""The deployment of one base model: an engine on a device, and the adapters it holds.

Owns the life of one replica: loading the base, fetching adapters outside any lock, telling Ray what is held, and
handing requests to the device thread. The event loop never blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from ray import serve

from serve_app.autoscaling.policy import replica_report
from serve_app.catalog.replica_report import ReplicaReport
from serve_app.catalog.sources.token_context import use_hub_token
from serve_app.config import BaseModelConfig, Environment, SharedSettings
from serve_app.core import (
    AdapterSpec,
    GenerationRequest,
    GenerationResult,
    GivenBack,
    HubToken,
    Preview,
    Progress,
    Timings,
)
from serve_app.deployments.registry.keeper_client import keeper_of
from serve_app.deployments.replica.encoding import encode_result
from serve_app.deployments.replica.fail_fast import FailFast
from serve_app.deployments.replica.health import stall_timeout_s
from serve_app.deployments.replica.multiplexed_ids import MultiplexedIds
from serve_app.deployments.replica.parts import (
    bring_base,
    choose_residence,
    fuse_adapters,
    load_pipeline,
    make_store,
    typical_units,
    uncollected,
)
from serve_app.deployments.replica.prefetch import prefetch_adapters
from serve_app.deployments.replica.reporter import ReplicaReporter
from serve_app.deployments.replica.start_time import counted_start
from serve_app.deployments.shared.logs import set_up_logging
from serve_app.deployments.shared.sharing import on_this_node
from serve_app.deployments.shared.watchdog import start_watchdog
from serve_app.errors import InternalError, LoraplexError
from serve_app.observability.metrics import ReplicaMetrics, TracingMetrics
from serve_app.observability.tracing import close_tracing, set_up_tracing, span
from serve_app.routing.stats import DeviceLoad, RoutingStatsCollector
from serve_app.store.quarantine import Quarantine
from serve_app.store.store import Lease

if TYPE_CHECKING:
    from serve_app.engine.adapters.deltas import ParsedAdapter
    from serve_app.engine.worker.job import Job
    from serve_app.engine.worker.state import WorkerState

log = logging.getLogger(__name__)


class ReplicaUnhealthy(Exception):
    """Raised by the health check: Serve replaces this replica."""


@serve.deployment
class BaseModelReplica:
    """One replica: a base kept warm, its adapters changed in place.

    Every adapter of a request is leased, and so pinned, from before the request enters the queue until its images are
    out.
    """

    async def __init__(
        self,
        base: BaseModelConfig,
        shared: SharedSettings,
        environment: Environment,
    ) -> None:
        started = time.monotonic()
        # The engine brings torch; neither the ingress nor the process that builds the application ever loads it.
        with uncollected():
            from serve_app.engine.admission.process import AdmissionProcess
            from serve_app.engine.drawing.trial import try_tasks
            from serve_app.engine.drawing.warmup import warm_up
            from serve_app.engine.weights.fused import FusedWeights
            from serve_app.engine.weights.integrity import IntegrityChecker, ThrottledChecker
            from serve_app.engine.weights.made_up import warm_swaps
            from serve_app.engine.weights.shortage import is_out_of_memory
            from serve_app.engine.worker.scheduling import QueuePolicy
            from serve_app.engine.worker.turns import SharingPolicy
            from serve_app.engine.worker.worker import EngineWorker

        set_up_logging(shared.log_level)
        set_up_tracing(shared.tracing, part=f"replica of {base.id}", on_sent=TracingMetrics().sent)
        environment = on_this_node(environment)
        keeper = keeper_of(shared.service)
        self._metrics = ReplicaMetrics(base.id)
        self._base_files = await bring_base(
            base, shared, environment, keeper=keeper, on_brought=self._metrics.base_fetched
        )
        pipeline = load_pipeline(base, shared, environment)
        self._base_files.offer()
        self._base = base = pipeline.config
        try_tasks(pipeline, base)
        torch_threads = base.replica.torch_threads or max(1, int(base.replica.num_cpus))
        is_on_gpu, pass_bytes = pipeline.device.type == "cuda", 0
        if base.compile or is_on_gpu:
            warmth = warm_up(pipeline, base, torch_threads=torch_threads, is_out_of_memory=is_out_of_memory)
            pass_bytes = warmth.pass_bytes
            log.info("%s is warm after %.1f s, for %d images", base.id, warmth.seconds, warmth.images)
        self._admission = AdmissionProcess(pipeline.manifest, base.adapter_limits)
        self._store = make_store(
            base, shared, environment, pipeline=pipeline, admission=self._admission,
            keeper=keeper, on_brought=self._metrics.file_fetched,
        )  # fmt: skip
        if base.fused:
            await fuse_adapters(base, shared, environment, pipeline=pipeline, store=self._store)
        residence = choose_residence(base, pipeline, pass_bytes=pass_bytes)
        self._weights = FusedWeights(
            pipeline.components,
            device_cache_bytes=base.replica.device_cache,
            base_weights=residence.base_weights,
            fused_sets=residence.fused_sets,
        )
        if is_on_gpu:
            warm_swaps(self._weights, pipeline.manifest, residence)
        self._worker = EngineWorker(
            pipeline,
            self._weights,
            max_batch_images=base.replica.max_batch_images,
            torch_threads=torch_threads,
            prefetches_swap=residence.prefetches_swap,
            self_check=ThrottledChecker(
                IntegrityChecker(self._weights.checksummed_tensors, is_modified=self._weights.is_modified)
            ),
            policy=QueuePolicy(
                base.replica.max_overtakes, base.replica.max_overtaken_s, base.replica.batch_priority_delay_s
            ),
            sharing=SharingPolicy(
                base.replica.max_jobs_in_progress, base.replica.max_slowdown, base.replica.batch_priority_delay_s
            )
            if base.replica.step_sharing
            else None,
            max_backlog_s=base.replica.max_backlog_s or shared.request_timeout_s,
            typical_units=typical_units(base, pipeline.family),
        )
        self._writes_infotext, self._default_scheduler = shared.infotext, pipeline.default_scheduler
        self._fail_fast = FailFast(self._worker, base.id, stall_timeout_s=stall_timeout_s(base))
        self._watchdog = start_watchdog(base.replica)
        self._quarantine = Quarantine(clock=time.monotonic, on_change=self._metrics.quarantined)
        self._ids = MultiplexedIds(self._store.resident)
        self._recorder = RoutingStatsCollector(
            clock=time.monotonic, deprioritize_after_s=base.router.deprioritize_after_s
        )
        own_id = serve.get_replica_context().replica_id.unique_id
        self._residency = ReplicaReporter(
            own_id,
            base.id,
            pipeline.device_name,
            store=self._store,
            weights=self._weights,
            clock=time.time,
            abilities=pipeline.abilities(),
        )
        popular: Any = keeper.popular
        warmed = await prefetch_adapters(lambda: popular.remote(base.id), self._load_adapter, base.replica)
        self._start_s = await counted_start(base.id, time.monotonic() - started, keeper)
        self._metrics.started(start_s=self._start_s, warmed=warmed)
        log.info("%s is ready on %s in %.1f s", base.id, pipeline.device_name, self._start_s)

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Return the images of one request; cancelling stops it at the next step.

        Raises:
            LoraplexError: any refusal or failure.
        """
        return await self._generate(request, on_event=None)

    async def generate_stream(
        self, request: GenerationRequest
    ) -> AsyncGenerator[Progress | Preview | GenerationResult]:
        """Yield how far one request is and what it looks like, last its result; closing the stream stops it.

        Raises:
            LoraplexError: any refusal or failure.
        """
        events: asyncio.Queue[Progress | Preview | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Progress | Preview) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        work = asyncio.create_task(self._generate(request, on_event=tell))
        work.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield work.result()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _generate(
        self, request: GenerationRequest, *, on_event: Callable[[Progress | Preview], None] | None
    ) -> GenerationResult:
        with span("replica.generate", request.trace) as traced:
            traced.describe(request)
            return await self._generate_traced(traced.carried_by(request), on_event=on_event)

    async def _generate_traced(
        self, request: GenerationRequest, *, on_event: Callable[[Progress | Preview], None] | None
    ) -> GenerationResult:
        job: Job | None = None
        await self._fail_fast.block_if_exiting()
        try:
            async with contextlib.AsyncExitStack() as pins:
                pins.enter_context(self._recorder.accepted(request))
                with self._worker.expecting(request), use_hub_token(request.hub_token):
                    leases = await self._lease_all(request, pins)
                pins.enter_context(self._quarantine.guard(request))
                adapters = [(lease.adapter, use.scale) for lease, use in zip(leases, request.adapters, strict=True)]
                job = self._worker.submit(request, adapters, on_event=on_event)
                result = await asyncio.wrap_future(job.future)
        except GivenBack:
            log.info("request %s on %s has not begun and is given back", request.request_id, self._base.id)
            raise
        except LoraplexError as error:
            self._fail_fast.check_and_exit()
            log.info("request %s on %s: %s (%s)", request.request_id, self._base.id, error, error.code)
            raise
        except asyncio.CancelledError:
            stage = "fetching" if job is None else "running" if job.is_started else "queued"
            self._metrics.cancelled(stage)
            log.info("request %s on %s was given up while %s", request.request_id, self._base.id, stage)
            raise
        except Exception as error:
            log.exception("request %s on %s failed", request.request_id, self._base.id)
            raise InternalError(request_id=request.request_id) from error
        fetch_ms = max((lease.fetch_ms for lease in leases), default=0.0)
        log.info(
            "request %s on %s: adapters %s, fetch %.1f ms, queue %.1f ms, swap %.1f ms, suspended %.1f ms, "
            "denoise %.1f ms, batch %d, prompts %s",
            request.request_id, self._base.id, [lease.spec.key for lease in leases] or "none", fetch_ms,
            result.timings.queue_ms, result.timings.swap_ms, result.timings.suspended_ms, result.timings.denoise_ms,
            result.batch_size, request.prompt_syntax,
        )  # fmt: skip
        # Requests of one pass share its time.
        result = dataclasses.replace(result, device_s=result.compute_s * len(result.images) / result.batch_size)
        self._metrics.shared(request.share, result.device_s, images=len(result.images))
        scheduler = request.scheduler or self._default_scheduler
        digests = [lease.adapter.digest for lease in leases] if self._writes_infotext else None
        result = await encode_result(result, request, scheduler=scheduler, digests=digests)
        return self._measured(dataclasses.replace(result.timings, fetch_ms=fetch_ms), leases, result)

    def _measured(
        self, timings: Timings, leases: list[Lease[ParsedAdapter]], result: GenerationResult
    ) -> GenerationResult:
        self._metrics.served(timings, batch_size=result.batch_size)
        for lease in leases:
            self._metrics.adapter_found(lease.tier)
        self._tell_host_tier()
        return dataclasses.replace(result, timings=timings)

    def _tell_host_tier(self) -> None:
        host = self._store.state()
        self._metrics.host_tier(used_bytes=host.used_bytes, evictions=host.evictions)

    async def _lease_all(
        self, request: GenerationRequest, pins: contextlib.AsyncExitStack
    ) -> list[Lease[ParsedAdapter]]:
        """Pin every adapter of a request, all fetched at the same time, and tell Ray that they are here."""
        with span("fetch", request.trace) as fetching:
            leases = await pins.enter_async_context(self._store.lease_all([use.spec for use in request.adapters]))
            fetching.note(tiers=[lease.tier for lease in leases])
        for lease in leases:
            self._residency.note(lease, is_hit=True)
        await self._ids.update()
        return leases

    async def state(self) -> WorkerState:
        """Return what the device is doing, and how many steps it has run."""
        return self._worker.snapshot()

    async def give_back(self, keep_s: float) -> int:
        """Have what would run last, and has not begun, sent to another replica, until `keep_s` of work are left."""
        return self._worker.give_back(keep_s)

    async def checksum(self) -> str:
        """Return the sha256 of the base's loaded weights, in hex."""
        return await asyncio.to_thread(self._weights.checksum)

    async def record_routing_stats(self) -> dict[str, Any]:
        """Return what routers go by; called by Serve every `stats_period_s`."""
        await self._ids.update()
        state = self._worker.snapshot()
        progress, has_failed = state.steps + state.work.busy_s, self._fail_fast.check_failed()
        return self._recorder.snapshot(DeviceLoad(state.backlog_s, state.pace, progress, state.running > 0, has_failed))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the autoscaling policy goes by; called by Serve every `metrics_interval_s`."""
        state = self._worker.snapshot()
        work = state.work
        self._metrics.worked(backlog_s=work.backlog_s, predicted_s=work.predicted_s, busy_s=work.busy_s)
        self._metrics.changed(changes=state.changes, changing_s=state.changing_s)
        return replica_report(
            backlog_s=work.backlog_s,
            request_s=work.request_s,
            load=work.load,
            requests=state.waiting + state.running + work.pending_fetches,
            start_s=self._start_s,
        )

    async def _load_adapter(self, spec: AdapterSpec) -> None:
        async with self._store.lease(spec) as lease:
            self._residency.note(lease, is_hit=False)
            await self._ids.update()

    async def report(self) -> ReplicaReport:
        """Return what this replica is doing and holds."""
        return self._residency.report(self._worker.snapshot(), self._quarantine.holds())

    async def forget_adapter(self, model: str) -> str | None:
        """Drop an adapter from memory once no request uses it; return this replica's id if it held it."""
        return self._residency.replica_id if self._residency.forget(model) else None

    async def preload_adapter(self, spec: AdapterSpec, replicas: tuple[str, ...], token: HubToken | None) -> str | None:
        """Fetch an adapter into memory, where this replica is meant; return its id then.

        Raises:
            LoraplexError: it cannot be fetched or served.
        """
        if self._residency.replica_id not in replicas:
            return None
        with use_hub_token(token):
            await self._load_adapter(spec)
        return self._residency.replica_id

    async def check_health(self) -> None:
        """Tell Serve whether this replica can go on.

        Raises:
            ReplicaUnhealthy: the loaded weights are damaged, the device is lost or stands still, its thread died, or
                batch after batch fails.
        """
        state = self._worker.snapshot()
        self._metrics.quarantined(self._quarantine.held)
        # Ray forgets a level that is not told again, so it is told with every health check.
        self._tell_host_tier()
        self._metrics.started(start_s=self._start_s, warmed=0)
        self._metrics.self_checked(sound=state.self_checks, is_corrupt=state.is_corrupt)
        self._metrics.out_of_memory(recovered=state.shortages.recovered, refused=state.shortages.refused)
        if (found := self._fail_fast.check_and_exit()) is not None:
            raise ReplicaUnhealthy(found.message)

    async def __del__(self) -> None:
        """Finish what was accepted, then end the device thread and the admission process; called by Serve."""
        if not hasattr(self, "_residency"):
            return  # it never became ready
        self._fail_fast.stop()
        await asyncio.to_thread(self._worker.close, is_draining=True)
        await self._store.close()
        self._admission.close()
        await asyncio.to_thread(close_tracing)
