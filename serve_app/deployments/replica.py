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
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ray import serve

from serve_app.catalog.catalog import build_repositories
from serve_app.catalog.files import AdapterFiles
from serve_app.config import AppConfig, BaseModelConfig, Environment
from serve_app.core import AdapterSpec, GenerationRequest, GenerationResult, Preview, Progress, Timings
from serve_app.demo.embedded import embedded_root
from serve_app.deployments.health import ailment
from serve_app.deployments.logs import set_up_logging
from serve_app.errors import InternalError, LoraplexError
from serve_app.store.admitted import AdmittedFiles
from serve_app.store.store import AdapterStore, Lease
from serve_app.telemetry import ReplicaMetrics

if TYPE_CHECKING:
    from serve_app.engine.adapter import ParsedAdapter
    from serve_app.engine.job import Job
    from serve_app.engine.pipeline import BasePipeline
    from serve_app.engine.residence import Residence
    from serve_app.engine.worker import WorkerState

log = logging.getLogger(__name__)


class ReplicaUnhealthy(Exception):
    """Raised by the health check: Serve replaces this replica."""


def multiplexer(max_adapters: int) -> Callable[[str], Awaitable[str]]:
    """Return the function through which Ray learns which adapters this replica holds.

    What it holds is a key: the adapter itself is in the store, pinned by whoever uses it, so that Ray's eviction, by
    count and blind to use, can never take an adapter from a running request. The store does the slow part before this
    is called, because Ray's wrapper loads one model at a time.
    """

    @serve.multiplexed(max_num_models_per_replica=max_adapters)
    async def held_adapter(key: str) -> str:
        return key

    return cast("Callable[[str], Awaitable[str]]", held_adapter)


@serve.deployment
class BaseModelReplica:
    """One replica: a base kept warm, its adapters changed in place.

    Every adapter of a request is leased, and so pinned, from before the request enters the queue until its images are
    out.
    """

    def __init__(self, base: BaseModelConfig, config: AppConfig, environment: Environment) -> None:
        # The engine brings torch; neither the ingress nor the process that builds the application ever loads it.
        from serve_app.engine.admission import AdmissionProcess
        from serve_app.engine.integrity import PacedCheck, SelfCheck
        from serve_app.engine.weights import AdapterWeights
        from serve_app.engine.worker import EngineWorker

        set_up_logging(config.log_level)
        started = time.monotonic()
        self._base = base
        pipeline = _load(base, environment)
        self._admission = AdmissionProcess(pipeline.manifest, base.adapter_limits)
        residence = _residence(base, pipeline)
        self._weights = AdapterWeights(
            pipeline.components,
            device_cache_bytes=base.replica.device_cache,
            pristine_in=residence.pristine_in,
        )
        self._worker = EngineWorker(
            pipeline,
            self._weights,
            max_batch_images=base.replica.max_batch_images,
            torch_threads=base.replica.torch_threads or max(1, int(base.replica.num_cpus)),
            prepares_ahead=residence.prepares_ahead,
            self_check=PacedCheck(SelfCheck(self._weights.watched, is_written=self._weights.is_written)),
        )
        self._store = self._make_store(pipeline, config, environment)
        self._metrics = ReplicaMetrics(base.id)
        self._hold = multiplexer(base.replica.adapters_per_replica)
        log.info("%s is ready on %s in %.1f s", base.id, pipeline.device_name, time.monotonic() - started)

    def _make_store(
        self, pipeline: BasePipeline, config: AppConfig, environment: Environment
    ) -> AdapterStore[ParsedAdapter]:
        import torch

        from serve_app.engine.canonical import read_canonical

        is_on_gpu = pipeline.device.type == "cuda"
        token = environment.hub_token.get_secret_value() if environment.hub_token else None
        files = AdapterFiles(
            build_repositories(
                config,
                token=token,
                embedded_root=embedded_root(),
                cache_dir=environment.cache_dir,
                endpoint=environment.hub_endpoint,
            )
        )

        async def admit(spec: AdapterSpec, source: Path, target: Path) -> None:
            await self._admission.admit(source, spec.id, target, await files.embeddings(spec))

        return AdapterStore(
            admitted=AdmittedFiles(
                environment.cache_dir / "admitted",
                config.cache_size,
                base_fingerprint=pipeline.manifest.fingerprint,
                dtype=pipeline.manifest.dtype,
                clock=time.time,
            ),
            fetch=files.path,
            admit=admit,
            load=lambda spec, path: read_canonical(path, pinned=is_on_gpu and torch.cuda.is_available()),
            size_of=lambda adapter: adapter.size_bytes,
            host_budget_bytes=self._base.replica.host_cache,
            clock=time.monotonic,
        )

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Return the images of one request; whoever cancels stops it at the next step.

        Raises:
            LoraplexError: any refusal or failure.
        """
        return await self._generate(request, on_event=None)

    async def generate_stream(
        self, request: GenerationRequest
    ) -> AsyncGenerator[Progress | Preview | GenerationResult]:
        """Yield how far one request is and what it looks like, last its result; whoever leaves stops it.

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
        job: Job | None = None
        try:
            async with contextlib.AsyncExitStack() as pins:
                leases = await self._lease_all(request, pins)
                adapters = [(lease.adapter, use.scale) for lease, use in zip(leases, request.adapters, strict=True)]
                job = self._worker.submit(request, adapters, on_event=on_event)
                result = await asyncio.wrap_future(job.future)
        except LoraplexError as error:
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
            "request %s on %s: adapters %s, fetch %.1f ms, queue %.1f ms, swap %.1f ms, denoise %.1f ms, batch %d",
            request.request_id, self._base.id, [lease.spec.key for lease in leases] or "none", fetch_ms,
            result.timings.queue_ms, result.timings.swap_ms, result.timings.denoise_ms, result.batch_size,
        )  # fmt: skip
        return self._measured(dataclasses.replace(result.timings, fetch_ms=fetch_ms), leases, result)

    def _measured(
        self, timings: Timings, leases: list[Lease[ParsedAdapter]], result: GenerationResult
    ) -> GenerationResult:
        self._metrics.served(timings, batch_size=result.batch_size)
        for lease in leases:
            self._metrics.adapter_found(lease.tier)
        host = self._store.state()
        self._metrics.host_tier(used_bytes=host.used_bytes, evictions=host.evictions)
        return dataclasses.replace(result, timings=timings)

    async def _lease_all(
        self, request: GenerationRequest, pins: contextlib.AsyncExitStack
    ) -> list[Lease[ParsedAdapter]]:
        """Pin every adapter of a request, all fetched at the same time, and tell Ray that they are here."""
        pinning = [
            asyncio.ensure_future(pins.enter_async_context(self._store.lease(use.spec))) for use in request.adapters
        ]
        try:
            leases = await asyncio.gather(*pinning)
        except BaseException:
            # One was refused, or the caller left: none may be pinned after `pins` has let go.
            for pin in pinning:
                pin.cancel()
            await asyncio.gather(*pinning, return_exceptions=True)
            raise
        for lease in leases:
            # Shielded: a caller who leaves in the middle would have Ray advertise an adapter that never came.
            await asyncio.shield(self._hold(lease.spec.key))
        return leases

    async def state(self) -> WorkerState:
        """Return what the device is doing, and how many steps it has run."""
        return self._worker.snapshot()

    async def checksum(self) -> str:
        """Return the sha256 of the base's loaded weights, in hex."""
        return await asyncio.to_thread(self._weights.checksum)

    async def check_health(self) -> None:
        """Tell Serve whether this replica can go on.

        Raises:
            ReplicaUnhealthy: the loaded weights are damaged, the device thread died, or batch after batch fails.
        """
        state = self._worker.snapshot()
        self._metrics.self_checked(sound=state.self_checks, is_corrupt=state.is_corrupt)
        if (reason := ailment(state, self._base.id)) is not None:
            raise ReplicaUnhealthy(reason)

    async def __del__(self) -> None:
        """Finish what was accepted, then end the device thread and the admission process; called by Serve."""
        if not hasattr(self, "_store"):
            return
        await asyncio.to_thread(self._worker.close, is_draining=True)
        await self._store.close()
        self._admission.close()


def _load(base: BaseModelConfig, environment: Environment) -> BasePipeline:
    from serve_app.engine.loading import HubAccess, resolve_source
    from serve_app.engine.pipeline import BasePipeline

    return BasePipeline.load(
        base,
        resolve_source(base.source, embedded_root()),
        vae_source=resolve_source(base.vae_source, embedded_root()) if base.vae_source else None,
        hub=HubAccess(token=environment.hub_token.get_secret_value() if environment.hub_token else None),
    )


def _residence(base: BaseModelConfig, pipeline: BasePipeline) -> Residence:
    """Choose where the pristine weights live, once the base is loaded."""
    from serve_app.engine.manifest import bytes_of_layers
    from serve_app.engine.residence import free_bytes_of, residence_of

    asked = base.replica
    chosen = residence_of(
        asked.pristine_in,
        asked.prepare_ahead,
        layer_bytes=bytes_of_layers(pipeline.components),
        reserved_bytes=asked.device_cache,
        free_bytes=free_bytes_of(pipeline.device),
    )
    log.info("%s keeps its pristine weights on the %s", base.id, chosen.pristine_in)
    return chosen
