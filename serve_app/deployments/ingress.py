"""The ingress deployment: HTTP in, a request to the right base's replicas, images out.

Owns the way to the replicas: multiplexed ids, deadlines, retries after a lost replica, and the errors of both sides.
Must not know torch: an ingress replica runs on a CPU node.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve_app.api.app import create_app
from serve_app.catalog.catalog import Catalog, build_repositories
from serve_app.config import AppConfig, Environment
from serve_app.core import GenerationRequest, GenerationResult
from serve_app.demo.embedded import embedded_root
from serve_app.deployments.gateway import ServiceGateway
from serve_app.deployments.logs import set_up_logging
from serve_app.deployments.measured import Measured
from serve_app.errors import DeadlineExceeded, LoraplexError, QueueFull, ReplicaLost
from serve_app.telemetry import IngressMetrics

log = logging.getLogger(__name__)

READINESS_TTL_S = 1.0
# Serve types its states as an enumeration, and sends them as text.
RUNNING: Any = "RUNNING"
SEED_BITS = 32


def deployment_name(base_id: str) -> str:
    """Return the Serve deployment that serves a base; Serve forbids slashes in names."""
    return "base-" + base_id.replace("/", "--")


class Dispatcher:
    """Sends settled requests to replicas through Serve handles.

    A request whose replica dies is sent again, at most `max_retries` times: its seed is fixed, so it gives the same
    image.
    """

    def __init__(
        self, config: AppConfig, handles: dict[str, DeploymentHandle], *, on_retry: Callable[[str], None]
    ) -> None:
        self._on_retry = on_retry
        self._settings = config.ingress
        self._queue_limits = {base.id: base.replica.max_queued_requests for base in config.bases}
        self._handles = handles

    async def __call__(self, request: GenerationRequest) -> GenerationResult:
        """Return the result of one request.

        Raises:
            QueueFull: the base has as much waiting as it accepts.
            ReplicaLost: every attempt lost its replica.
            DeadlineExceeded: the request ran out of its time.
        """
        limit_s = self._settings.request_timeout_s
        deadline = time.monotonic() + limit_s
        attempts = self._settings.max_retries + 1
        for attempt in range(1, attempts + 1):
            try:
                return await self._attempt(request, deadline - time.monotonic(), limit_s)
            except (RayActorError, ReplicaLost) as error:
                log.warning(
                    "request %s lost its replica of %s (attempt %d of %d): %s",
                    request.request_id, request.base_id, attempt, attempts, type(error).__name__,
                )  # fmt: skip
                self._on_retry(request.base_id)
        raise ReplicaLost(base=request.base_id, attempts=attempts)

    async def _attempt(self, request: GenerationRequest, left_s: float, limit_s: float) -> GenerationResult:
        # A base-only request names no model: with an id it would stick to one replica.
        model_id = request.adapters[0].spec.key if request.adapters else ""
        handle = self._handles[request.base_id].options(multiplexed_model_id=model_id)
        response = handle.generate.remote(request)
        try:
            return await asyncio.wait_for(_result_of(response), max(left_s, 0.001))
        except TimeoutError:
            response.cancel()
            raise DeadlineExceeded(limit_s=limit_s) from None
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise QueueFull(base=request.base_id, limit=self._queue_limits[request.base_id]) from None
        except LoraplexError as error:
            # What arrives is Ray's double of our error, whose text is a remote traceback.
            cause = getattr(error, "cause", error)
            raise cause from None
        except RayTaskError as error:
            raise error.cause from None


async def _result_of(response: object) -> GenerationResult:
    return await response  # type: ignore[misc]


class Readiness:
    """Whether any base of the application has a running replica, or would start one on demand; asked of Serve at
    most once a second."""

    def __init__(self, config: AppConfig, app_name: str) -> None:
        self._scales_to_zero = any(base.autoscaling.min_replicas == 0 for base in config.bases)
        self._deployments = {deployment_name(base.id) for base in config.bases}
        self._app_name = app_name
        self._checked_at = float("-inf")
        self._is_ready = False
        self._lock = asyncio.Lock()

    async def __call__(self) -> bool:
        """Return the last answer, renewed when it is older than a second."""
        if self._scales_to_zero:
            return True
        async with self._lock:
            if time.monotonic() - self._checked_at > READINESS_TTL_S:
                self._is_ready = await asyncio.to_thread(self._any_running)
                self._checked_at = time.monotonic()
        return self._is_ready

    def _any_running(self) -> bool:
        application = serve.status().applications.get(self._app_name)
        if application is None:
            return False
        return any(
            overview.replica_states.get(RUNNING, 0) > 0
            for name, overview in application.deployments.items()
            if name in self._deployments
        )


@serve.deployment
@serve.ingress()
class Ingress:
    """One replica of the HTTP face."""

    def __init__(self, config: AppConfig, environment: Environment, handles: dict[str, DeploymentHandle]) -> None:
        set_up_logging(config.log_level)
        self._config = config
        self._metrics = IngressMetrics()
        repositories = build_repositories(
            config,
            token=environment.hub_token.get_secret_value() if environment.hub_token else None,
            embedded_root=embedded_root(),
            cache_dir=environment.cache_dir,
            endpoint=environment.hub_endpoint,
        )
        self._gateway = ServiceGateway(
            Catalog(config, repositories, clock=time.monotonic),
            Dispatcher(config, handles, on_retry=self._metrics.retried),
            draw_seed=lambda: secrets.randbits(SEED_BITS),
            can_serve=Readiness(config, serve.get_replica_context().app_name),
            on_refusal=self._metrics.refused,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the HTTP application; called by Serve once this replica is made."""
        # The proxy in front adds `x-request-id`, the very id that we are given, to every reply.
        app = create_app(self._gateway, self._config.ingress, echo_request_id=False)

        def count(route: str, status: int, base_id: str | None) -> None:
            self._metrics.answered(route=route, status=status, base_id=base_id)

        return Measured(app, count)
