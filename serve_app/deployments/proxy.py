"""The layers that Serve's HTTP proxy applies to requests of our application.

Owns the layers around it, and keeping callers from steering Serve itself: its proxy obeys headers that are meant for
its operators. Imported by the proxy, through `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`, so it must load quickly and
need little that Serve has not loaded.
"""

from __future__ import annotations

import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api.http.waiting import PROXY_HEADERS
from serve_app.deployments.front.connection import SlowReaderMiddleware, bound_connections
from serve_app.deployments.front.load_shedding import LoadSheddingMiddleware
from serve_app.deployments.front.own_routes import OwnRoutesOnly
from serve_app.deployments.front.retry import RetryMiddleware
from serve_app.deployments.shared.logs import keep_lines_safe
from serve_app.observability.metrics import ProxyMetrics
from serve_app.redaction import contains_secret

# Which replica, how long the proxy waits, whether it notices a caller who leaves, and what became of a request before:
# not for callers to say.
_STEERING = frozenset(
    (
        b"serve-multiplexed-model-id",
        b"x-session-id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        *(name.encode() for name in PROXY_HEADERS),
    )
)
_REQUEST_ID = b"x-request-id"
_SANE_ID = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}")


def guards() -> list[Middleware]:
    """Return the layer around Serve's proxy; called by Serve."""
    # It logs paths, and callers put tokens and keys into those too.
    keep_lines_safe()
    # Serve makes its server after this.
    bound_connections()
    metrics = ProxyMetrics()

    def layers(app: ASGIApp) -> ASGIApp:
        retried = RetryMiddleware(app, metrics.lost)
        return SlowReaderMiddleware(ServeHeaderFilter(LoadSheddingMiddleware(retried, metrics.shed)))

    return [Middleware(OwnRoutesOnly, layers)]


class ServeHeaderFilter:
    """Takes away headers that steer Serve, and ids that are unfit for a log; Serve makes an id where there is none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] in ("http", "websocket"):
            scope["headers"] = [header for header in scope["headers"] if _is_fit(*header)]
        await self._app(scope, receive, send)


def _is_fit(name: bytes, value: bytes) -> bool:
    # Serve reads hyphens and underscores alike.
    name = name.lower().replace(b"_", b"-")
    if name == _REQUEST_ID:
        return _SANE_ID.fullmatch(value) is not None and not contains_secret(value.decode("latin-1"))
    return name not in _STEERING
