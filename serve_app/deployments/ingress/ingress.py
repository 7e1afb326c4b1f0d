"""The ingress deployment: HTTP in, a request to the right base's replicas, images out.

Owns how the parts of an ingress replica are put together, and anew when the bases change; `dispatcher` is the way to
the replicas. Must not know torch: an ingress replica runs on a CPU node.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api.app import create_app
from serve_app.api.http.auth import Access
from serve_app.api.http.limits import LocalRateLimiter, RateLimiter, UnknownIdLimit
from serve_app.catalog.catalog import Catalog, build_sources
from serve_app.catalog.pictures import AdapterPictures
from serve_app.config import AppConfig, Environment, IngressArguments
from serve_app.core import GenerationRequest, GenerationResult
from serve_app.demo.embedded import embedded_root
from serve_app.deployments.front.load_shedding import CapacityHeaderMiddleware
from serve_app.deployments.ingress.adapter_defaults import check_defaults
from serve_app.deployments.ingress.backpressure import most_held
from serve_app.deployments.ingress.base_handles import BaseHandles
from serve_app.deployments.ingress.canaries import Canaries
from serve_app.deployments.ingress.dispatch import ServiceGateway
from serve_app.deployments.ingress.dispatcher import Dispatcher
from serve_app.deployments.ingress.fan_out import FanOut
from serve_app.deployments.ingress.keys import KeyFileInvalid, Keys
from serve_app.deployments.ingress.middleware import FrontCheckMiddleware, MetricsMiddleware, TracingMiddleware
from serve_app.deployments.ingress.redis_limits import RedisRateLimiter
from serve_app.deployments.ingress.starts import Starts, Wishes
from serve_app.deployments.registry.base_states import BaseStates, is_service_ready
from serve_app.deployments.registry.fleet import Fleet
from serve_app.deployments.registry.keeper_client import KeeperClient
from serve_app.deployments.registry.registry import ServiceRegistry
from serve_app.deployments.registry.replica_counts import ReplicaCounts, count_replicas
from serve_app.deployments.shared.logs import set_up_logging
from serve_app.deployments.shared.sharing import on_this_node
from serve_app.deployments.shared.watchdog import start_watchdog
from serve_app.live_settings import BASES, with_live_settings
from serve_app.observability.metrics import AdapterMetrics, IngressMetrics, TracingMetrics
from serve_app.observability.tracing import answered, set_up_tracing

log = logging.getLogger(__name__)

SEED_BITS = 32
# A new ingress waits this long for the aliases before it serves without them.
ALIASES_PATIENCE_S = 5.0


@serve.deployment
@serve.ingress()
class Ingress:
    """One replica of the HTTP face."""

    def __init__(self, arguments: IngressArguments, environment: Environment, keeper: DeploymentHandle) -> None:
        """Start without bases: `reconfigure` brings them."""
        shared = arguments.shared
        set_up_logging(shared.log_level)
        set_up_tracing(shared.tracing, part="ingress", on_sent=TracingMetrics().sent)
        self._environment = on_this_node(environment)
        self._arguments = arguments
        self._is_serving = False
        self._metrics = IngressMetrics()
        self._sources = build_sources(shared, self._environment, embedded_root=embedded_root())
        self._keeper = KeeperClient(keeper, on_change=self._metrics.aliases_known)
        self._unknown_ids = UnknownIdLimit(arguments.ingress.unknown_ids_per_minute, clock=time.monotonic)
        self._adapter_metrics = AdapterMetrics(arguments.metrics.top_adapters, clock=time.monotonic)
        self._keys = Keys(arguments.auth, clock=time.monotonic)
        self._access = Access(
            keys=self._keys,
            takes_hub_tokens=shared.adapters.hub.forward_tokens,
            meter=_rate_limiter(arguments),
            on_refusal=self._metrics.refused,
        )
        self._handles = BaseHandles()
        counts = ReplicaCounts(lambda: count_replicas(self._handles.places()), clock=time.monotonic)
        self._states = BaseStates(counts, self._keeper.start_times_s, clock=time.time)
        self._counts = counts
        self._starts = Starts(self._states, Wishes(self._handles).wish, on_waited=self._metrics.start_waited)
        self._dispatcher = Dispatcher(
            arguments.ingress,
            self._handles,
            on_retry=self._metrics.retried,
            renew=self._handles.renew,
            starts=self._starts,
        )
        self._config: AppConfig | None = None
        self._named: set[str] = set()
        # For the start of an application, which comes before `reconfigure`; no request does.
        self._app: Any = Starlette()

    def _serve_bases(self, config: AppConfig) -> None:
        """Answer for the bases of a configuration from now on; what has been resolved goes to the bases it was for."""
        self._handles.add(config.bases)
        self._states.add(config.bases)
        self._dispatcher.serve(config.bases)
        self._named.update(name for base in config.bases for name in base.names)
        catalog = Catalog(
            config,
            self._sources,
            clock=time.monotonic,
            resolve_alias=self._keeper.resolve_alias,
            on_access_check=self._metrics.access_checked,
            counting_unknown=self._unknown_ids.counting,
            # A replica of the ingress that is new knows from the keeper what ran before.
            was_base=lambda name: name in self._named or name in self._keeper.start_times_s(),
        )

        async def is_ready() -> bool:
            return is_service_ready(config.originals, await self._states())

        self._gateway = ServiceGateway(
            catalog,
            FanOut(self._dispatcher, self._dispatcher.count_parts),
            registry=ServiceRegistry(
                catalog,
                self._keeper,
                Fleet(self._handles, self._counts, clock=time.monotonic, bases=[base.id for base in config.bases]),
                pictures=AdapterPictures(catalog, self._environment.cache_dir / "pictures"),
                check_defaults=check_defaults,
                states=self._states,
            ),
            draw_seed=lambda: secrets.randbits(SEED_BITS),
            is_ready=is_ready,
            canaries=Canaries(config, is_running=self._starts.is_running, family_of=catalog.family),
            on_refusal=self._metrics.refused,
            on_drawn=self._note_drawn,
            weight_of=self._keys.weight_of,
            prompt_syntax_of=self._keys.prompt_syntax_of,
        )

    def _note_drawn(self, key: str | None, request: GenerationRequest, result: GenerationResult) -> None:
        self._adapter_metrics.drawn(request, result)
        self._keeper.note_drawn(key, request.base_id, images=len(result.images), device_s=result.device_s)
        for use in request.adapters:
            self._keeper.note_use(use.spec)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the HTTP application; called by Serve once this replica is made, and before `reconfigure`."""
        self._watchdog = start_watchdog(self._arguments.ingress)
        await self._keeper.begin(patience_s=ALIASES_PATIENCE_S)

        def count(route: str, status: int, base_id: str | None) -> None:
            self._metrics.answered(route=route, status=status, base_id=base_id)
            answered(route=route, status=status, base_id=base_id)

        own_id = serve.get_replica_context().replica_id.unique_id
        measured = MetricsMiddleware(FrontCheckMiddleware(self._answer), count)
        return TracingMiddleware(
            CapacityHeaderMiddleware(
                measured, replica=own_id, most=lambda: self._most, held=lambda: self._dispatcher.held
            )
        )

    async def check_health(self) -> None:
        """Note that this replica serves: Serve calls this first when it has been set up, then again and again.

        Raises:
            ValueError: there is no `user_config`, and so there are no bases.
        """
        if self._config is None:
            raise ValueError("the deployment of the ingress needs a user_config with its 'bases'")
        self._is_serving = True

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over what has changed; called by Serve. Requests that came before are answered as they began.

        Raises:
            ValueError, KeyFileInvalid: the settings cannot be used, and this replica is new. One that serves goes on
                as before, and says so in the log.
        """
        try:
            live = with_live_settings(self._arguments, user_config)
            self._keys.replace(live.auth)
        except (ValueError, KeyFileInvalid) as error:
            if not self._is_serving:
                raise
            log.error("the ingress' user_config is not taken over, the settings before hold on: %s", error)
            return
        self._unknown_ids.allow(live.ingress.unknown_ids_per_minute)
        before, self._config = self._config, live
        if before is None or any(getattr(before, name) != getattr(live, name) for name in BASES):
            self._serve_bases(live)
            self._dispatcher.watch_replicas()
            self._most = most_held(live)
        # The proxy in front adds `x-request-id`, the very id that we are given, to every reply.
        self._app = create_app(
            self._gateway,
            live.ingress,
            request_timeout_s=live.request_timeout_s,
            access=self._access,
            echo_request_id=False,
            decoder=None if before is None else self._app.state.services.decoder,
        )
        log.info("the ingress' user_config is in force: %s", ", ".join(user_config))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _rate_limiter(config: IngressArguments) -> RateLimiter:
    """Return what counts for keys with limits: Redis where it is configured, else this replica, for its share."""
    share = 1 / config.ingress.max_replicas
    redis = config.auth.limits_redis
    if redis is None:
        return LocalRateLimiter(clock=time.monotonic, share=share)
    return RedisRateLimiter(redis.get_secret_value(), share=share)
