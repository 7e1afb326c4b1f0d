"""ASGI layers around the HTTP face: counting answers, tracing them, and noticing what is missing in front.

Owns which label values an answer gets. Changes no answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.deployments.front.own_routes import FRONT_HEADER
from serve_app.observability.tracing import tracing_request

log = logging.getLogger(__name__)

# Called with the route's template, the status and the base, None where it never came to one.
OnAnswer = Callable[[str, int, "str | None"], None]

UNKNOWN_ROUTE = "none"


class MetricsMiddleware:
    """Reports every answer of an ASGI application as it starts."""

    def __init__(self, app: ASGIApp, on_answer: OnAnswer) -> None:
        self._app = app
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The template, not the path: callers choose paths, and labels must stay few.
                route: Any = scope.get("route")
                base_id = Headers(raw=message.get("headers", [])).get("x-base-model")
                self._on_answer(getattr(route, "path", UNKNOWN_ROUTE), message["status"], base_id)
            await send(message)

        await self._app(scope, receive, send_counted)


# Health checks and pages would be most of all traces, and tell nothing.
READING = ("GET", "HEAD", "OPTIONS")


class TracingMiddleware:
    """Makes every request of an ASGI application, from its first to its last byte, one span."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] in READING:
            await self._app(scope, receive, send)
            return
        with tracing_request(Headers(scope=scope)):
            await self._app(scope, receive, send)


NO_FRONT = (
    "requests come here without Loraplex' layers in Serve's proxy: none is sent again when an ingress replica is lost, "
    "and none is refused early under a flood; docs/operations.md says what to set instead"
)


class FrontCheckMiddleware:
    """Notices that requests do not come through our layers in Serve's proxy: says so once in the log, and to the routes
    in `notices` of each request's state, for `/health?verbose`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._is_missing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if FRONT_HEADER not in Headers(scope=scope) and not self._is_missing:
            self._is_missing = True
            log.warning(NO_FRONT)
        scope.setdefault("state", {})["notices"] = [NO_FRONT] if self._is_missing else []
        await self._app(scope, receive, send)
