"""The ingress deployment: HTTP in, a request to the right base's replicas, images out.

Owns the way to the replicas: multiplexed ids, retries after a lost replica, and the errors of both sides.
Must not know torch: an ingress replica runs on a CPU node.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve_app.api.app import create_app
from serve_app.api.http.auth import Access
from serve_app.api.http.limits import LocalRateLimiter, RateLimiter, UnknownIdLimit
from serve_app.catalog.catalog import Catalog, build_sources
from serve_app.catalog.pictures import AdapterPictures
from serve_app.config import AppConfig, Environment
from serve_app.core import GenerationEvent, GenerationRequest, GenerationResult, GivenBack, Progress
from serve_app.demo.embedded import embedded_root
from serve_app.deployments.front.load_shedding import CapacityHeaderMiddleware
from serve_app.deployments.ingress.adapter_defaults import check_defaults
from serve_app.deployments.ingress.backpressure import Backpressure, most_held
from serve_app.deployments.ingress.dispatch import ServiceGateway
from serve_app.deployments.ingress.fan_out import FanOut
from serve_app.deployments.ingress.keys import Keys
from serve_app.deployments.ingress.middleware import FrontCheckMiddleware, MetricsMiddleware, TracingMiddleware
from serve_app.deployments.ingress.process_state import has_ended
from serve_app.deployments.ingress.redis_limits import RedisRateLimiter
from serve_app.deployments.ingress.start_failures import StartFailures
from serve_app.deployments.registry.fleet import Fleet
from serve_app.deployments.registry.keeper_client import KeeperClient
from serve_app.deployments.registry.registry import ServiceRegistry
from serve_app.deployments.registry.replica_counts import ReplicaCount, ReplicaCounts, count_replicas
from serve_app.deployments.shared.logs import set_up_logging
from serve_app.deployments.shared.sharing import on_this_node
from serve_app.deployments.shared.watchdog import start_watchdog
from serve_app.errors import BaseUnusable, LoraplexError, QueueFull, ReplicaLost
from serve_app.observability.metrics import AdapterMetrics, IngressMetrics, TracingMetrics
from serve_app.observability.tracing import answered, set_up_tracing
from serve_app.routing.known import known_replicas, on_joined, replicas_known
from serve_app.routing.spread import parts_of, work_to_keep_s
from serve_app.store.quarantine import Quarantine
from serve_app.work import work_units

log = logging.getLogger(__name__)

SEED_BITS = 32
# A request whose process died on so many replicas is not sent to another.
MAX_DEATHS = 2
# Of the places that a base has for the requests of an ingress replica, what one key may have.
MOST_OF_PLACES = 0.75
# An accepted request that lost its place to others asks for one so often.
RESEND_AFTER_S = 0.5
# So long after a replica has joined, the others give back once more.
LEVEL_AGAIN_S = 3.0
# A new ingress waits this long for the aliases before it serves without them.
ALIASES_PATIENCE_S = 5.0


def deployment_name(base_id: str) -> str:
    """Return the Serve deployment that serves a base; Serve forbids slashes in names."""
    return "base-" + base_id.replace("/", "--")


async def _no_counts() -> Mapping[str, ReplicaCount]:
    return {}


class Dispatcher:
    """Sends settled requests to replicas through Serve handles.

    A request whose replica dies is sent again, at most `max_retries` times: its seed is fixed, so it gives the same
    image. A stream is sent again while no picture of it has been passed on, and then tells its progress from the start.
    One that two replicas died of is sent no more, and its adapters are quarantined. Cancelling a call stops the work.
    Of the parts of one request that lost their replicas, one at a time is sent again: it may be what ended them.
    """

    def __init__(
        self,
        config: AppConfig,
        handles: dict[str, DeploymentHandle],
        *,
        on_retry: Callable[[str, str], None],
        counts: Callable[[], Awaitable[Mapping[str, ReplicaCount]]] = _no_counts,
        resend_after_s: float = RESEND_AFTER_S,
    ) -> None:
        """Send nothing yet; `counts` returns the replicas of each base, by default of none."""
        self._on_retry = on_retry
        self._resend_after_s = resend_after_s
        self._attempts = config.ingress.max_retries + 1
        self._quarantine = Quarantine(clock=time.monotonic)
        self._replica_settings = {base.id: base.replica for base in config.bases}
        self._pressures = {base.id: Backpressure(time.monotonic) for base in config.bases}
        self._handles = handles
        self._starts = StartFailures(counts, clock=time.monotonic)
        self._levelling: set[asyncio.Future[None]] = set()
        self._resending: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def count_parts(self, request: GenerationRequest) -> tuple[int, ...]:
        """Return how many images each part of a request is to have, by what is known of the replicas now."""
        if not self._replica_settings[request.base_id].step_sharing or self._pressures[request.base_id].was_full_lately:
            return (request.num_images,)
        return parts_of(request, await known_replicas(request.base_id))

    def watch_replicas(self) -> None:
        """Have replicas give back what they have not begun whenever another joins; on the event loop."""
        for base_id in self._handles:
            on_joined(base_id, partial(self._start_levelling, base_id))

    def _start_levelling(self, base_id: str) -> None:
        task = asyncio.ensure_future(self._level_twice(base_id))
        self._levelling.add(task)
        task.add_done_callback(self._levelling.discard)

    async def _level_twice(self, base_id: str) -> None:
        await self._level(base_id)
        # Requests that were fetching adapters could not be given back, and others may have joined.
        await asyncio.sleep(LEVEL_AGAIN_S)
        await self._level(base_id)

    async def _level(self, base_id: str) -> None:
        keep_s = work_to_keep_s(await known_replicas(base_id))
        if keep_s is None:
            return
        try:
            given = await self._handles[base_id].broadcast("give_back", keep_s).results_async()
        except RayError as error:
            log.warning("not all replicas of %s could be asked to give back: %s", base_id, type(error).__name__)
        else:
            log.info("a replica of %s has joined: the others gave back %d requests", base_id, sum(given))

    async def __call__(self, request: GenerationRequest) -> GenerationResult:
        """Return the result of one request.

        Raises:
            QueueFull: the base has as much waiting as it accepts.
            BaseUnusable: no replica of the base can start.
            ReplicaLost: every attempt lost its replica.
        """
        self._quarantine.check(request)
        self._check_share(request)
        losses: list[Exception] = []
        while len(losses) < self._attempts:
            async with self._turn_to_send(request, losses):
                response = self._handle(request).generate.remote(request)
                try:
                    with self._sending(request), self._errors_of(request):
                        return await self._starts.unless_unusable(request.base_id, response)
                except GivenBack as given:
                    request = replace(request, waited_s=given.waited_s)
                except QueueFull as full:
                    await self._wait_for_place(request, losses, full)
                except (RayActorError, ReplicaLost) as error:
                    response.cancel()
                    losses.append(error)
                    await self._check_losses(request, losses)
                except (asyncio.CancelledError, BaseUnusable):
                    response.cancel()
                    raise
        raise ReplicaLost(base=request.base_id, attempts=self._attempts)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """Yield the events of one request.

        Raises:
            QueueFull: the base has as much waiting as it accepts.
            BaseUnusable: no replica of the base can start.
            ReplicaLost: the replica died after a picture was shown, or every attempt lost its replica.
        """
        has_shown = False
        self._quarantine.check(request)
        self._check_share(request)
        losses: list[Exception] = []
        while len(losses) < self._attempts:
            async with self._turn_to_send(request, losses):
                # With this option a call is an asynchronous generator, which Ray's types do not say.
                response: Any = self._handle(request).options(stream=True).generate_stream.remote(request)
                try:
                    with self._sending(request), self._errors_of(request):
                        async with aclosing(self._starts.watched(request.base_id, response)) as events:
                            async for event in events:
                                has_shown |= not isinstance(event, Progress)
                                yield event
                    return
                except GivenBack as given:
                    request = replace(request, waited_s=given.waited_s)
                except QueueFull as full:
                    await self._wait_for_place(request, losses, full)
                except (RayActorError, ReplicaLost) as error:
                    response.cancel()
                    losses.append(error)
                    if has_shown:
                        raise ReplicaLost(base=request.base_id, attempts=len(losses)) from None
                    await self._check_losses(request, losses)
                except (asyncio.CancelledError, GeneratorExit, BaseUnusable):
                    response.cancel()
                    raise
        raise ReplicaLost(base=request.base_id, attempts=self._attempts)

    @property
    def held(self) -> int | None:
        """How many requests wait for the bases, where one of these has lately refused another; else None."""
        pressures = self._pressures.values()
        is_at_limit = any(pressure.was_full_lately for pressure in pressures)
        return sum(pressure.in_flight for pressure in pressures) if is_at_limit else None

    def _check_share(self, request: GenerationRequest) -> None:
        """Refuse a key that has most of a base's places, so that there are some for others.

        Raises:
            QueueFull: it has.
        """
        replica = self._replica_settings[request.base_id]
        count = max(replicas_known(request.base_id), 1)
        places = replica.max_queued_requests + replica.max_ongoing_requests * count
        if request.share and self._pressures[request.base_id].held_by(request.share) >= MOST_OF_PLACES * places:
            raise self._queue_full(request)

    def _queue_full(self, request: GenerationRequest) -> QueueFull:
        limit = self._replica_settings[request.base_id].max_queued_requests
        retry_after_s = self._pressures[request.base_id].retry_after_s()
        return QueueFull(base=request.base_id, limit=limit, retry_after_s=retry_after_s)

    def _handle(self, request: GenerationRequest) -> DeploymentHandle:
        # A base-only request names no model: with an id it would stick to one replica.
        model_id = request.adapters[0].spec.key if request.adapters else ""
        return self._handles[request.base_id].options(multiplexed_model_id=model_id)

    async def _wait_for_place(self, request: GenerationRequest, losses: list[Exception], full: QueueFull) -> None:
        """Wait where a request was accepted before and others have taken its place.

        Raises:
            QueueFull: it was not.
        """
        if not losses and not request.waited_s:
            raise full
        await asyncio.sleep(self._resend_after_s)

    async def _check_losses(self, request: GenerationRequest, losses: list[Exception]) -> None:
        """Return where a request that lost its replica may be sent to another.

        Raises:
            Quarantined: it ended the processes of two replicas, and has adapters.
            ReplicaLost: it ended those of two, or it may still run on one that could not be reached.
        """
        error = losses[-1]
        log.warning(
            "request %s lost its replica of %s (attempt %d of %d): %s",
            request.request_id, request.base_id, len(losses), self._attempts, type(error).__name__,
        )  # fmt: skip
        self._on_retry(request.base_id, error.reason if isinstance(error, ReplicaLost) else "died")
        lost = ReplicaLost(base=request.base_id, attempts=len(losses))
        if isinstance(error, ActorUnavailableError) and not await has_ended(error.actor_id):
            raise lost from None
        # A replica that is lost may be found dead a second time before Serve has another.
        died = {loss.actor_id for loss in losses if isinstance(loss, RayActorError) and not loss.preempted}
        if len(died) >= MAX_DEATHS:
            log.error("request %s is not sent again: %d processes ended on it", request.request_id, len(died))
            self._quarantine.hold(request, f"{len(died)} replicas ended while they drew with it")
            raise lost from None

    @asynccontextmanager
    async def _turn_to_send(self, request: GenerationRequest, losses: list[Exception]) -> AsyncGenerator[None]:
        if not losses:
            yield
            return
        lock = self._resending.setdefault(request.request_id, asyncio.Lock())
        async with lock:
            self._quarantine.check(request)
            yield

    def _sending(self, request: GenerationRequest) -> AbstractContextManager[None]:
        return self._pressures[request.base_id].track(work_units(request), request.share)

    @contextmanager
    def _errors_of(self, request: GenerationRequest) -> Iterator[None]:
        try:
            yield
        except BackPressureError:
            self._pressures[request.base_id].record_rejection()
            raise self._queue_full(request) from None
        except LoraplexError as error:
            # Ray wraps our error in one whose text is a remote traceback.
            cause = getattr(error, "cause", error)
            raise cause from None
        except RayTaskError as error:
            raise error.cause from None


@serve.deployment
@serve.ingress()
class Ingress:
    """One replica of the HTTP face."""

    def __init__(
        self,
        config: AppConfig,
        environment: Environment,
        handles: dict[str, DeploymentHandle],
        keeper: DeploymentHandle,
    ) -> None:
        set_up_logging(config.log_level)
        set_up_tracing(config.tracing, part="ingress", on_sent=TracingMetrics().sent)
        environment = on_this_node(environment)
        self._config = config
        self._metrics = IngressMetrics()
        repositories = build_sources(config, environment, embedded_root=embedded_root())
        self._keeper = KeeperClient(keeper, on_change=self._metrics.aliases_known)
        unknown_ids = UnknownIdLimit(config.ingress.unknown_ids_per_minute, clock=time.monotonic)
        catalog = Catalog(
            config,
            repositories,
            clock=time.monotonic,
            resolve_alias=self._keeper.resolve_alias,
            on_access_check=self._metrics.access_checked,
            counting_unknown=unknown_ids.counting,
        )

        deployments = {base.id: deployment_name(base.id) for base in config.bases}
        app_name = serve.get_replica_context().app_name
        counts = ReplicaCounts(lambda: count_replicas(app_name, deployments), clock=time.monotonic)
        scales_to_zero = any(base.autoscaling.min_replicas == 0 for base in config.bases)

        async def can_serve() -> bool:
            return scales_to_zero or any(count.running for count in (await counts()).values())

        replicas = Fleet(handles, counts, clock=time.monotonic)
        self._adapter_metrics = AdapterMetrics(config.metrics.top_adapters, clock=time.monotonic)
        keys = Keys(config.auth, clock=time.monotonic)
        self._access = Access(
            keys=keys,
            takes_hub_tokens=config.adapters.hub.forward_tokens,
            meter=_rate_limiter(config),
            on_refusal=self._metrics.refused,
        )
        self._dispatcher = Dispatcher(config, handles, on_retry=self._metrics.retried, counts=counts)
        self._gateway = ServiceGateway(
            catalog,
            FanOut(self._dispatcher, self._dispatcher.count_parts),
            registry=ServiceRegistry(
                catalog,
                self._keeper,
                replicas,
                pictures=AdapterPictures(catalog, environment.cache_dir / "pictures"),
                check_defaults=check_defaults,
            ),
            draw_seed=lambda: secrets.randbits(SEED_BITS),
            can_serve=can_serve,
            on_refusal=self._metrics.refused,
            on_drawn=self._note_drawn,
            weight_of=keys.weight_of,
            prompt_syntax_of=keys.prompt_syntax_of,
        )

    def _note_drawn(self, request: GenerationRequest, result: GenerationResult) -> None:
        self._adapter_metrics.drawn(request, result)
        for use in request.adapters:
            self._keeper.note_use(use.spec)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the HTTP application; called by Serve once this replica is made."""
        self._watchdog = start_watchdog(self._config.ingress)
        self._dispatcher.watch_replicas()
        await self._keeper.begin(patience_s=ALIASES_PATIENCE_S)
        # The proxy in front adds `x-request-id`, the very id that we are given, to every reply.
        app = create_app(self._gateway, self._config.ingress, access=self._access, echo_request_id=False)

        def count(route: str, status: int, base_id: str | None) -> None:
            self._metrics.answered(route=route, status=status, base_id=base_id)
            answered(route=route, status=status, base_id=base_id)

        own_id = serve.get_replica_context().replica_id.unique_id
        measured, most = MetricsMiddleware(FrontCheckMiddleware(app), count), most_held(self._config)
        return TracingMiddleware(
            CapacityHeaderMiddleware(measured, replica=own_id, most=most, held=lambda: self._dispatcher.held)
        )


def _rate_limiter(config: AppConfig) -> RateLimiter:
    """Return what counts for keys with limits: Redis where it is configured, else this replica, for its share."""
    share = 1 / config.ingress.max_replicas
    redis = config.auth.limits_redis
    if redis is None:
        return LocalRateLimiter(clock=time.monotonic, share=share)
    return RedisRateLimiter(redis.get_secret_value(), share=share)
