"""Tracing requests: an ASGI layer around the HTTP face, so that the face itself needs no tracer.

Owns which requests are traced: those that change or draw something, not those that read. Must not change what is
answered.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.tracing import tracing_request

# Health checks and pages would be most of all traces, and tell nothing.
READING = ("GET", "HEAD", "OPTIONS")


class Traced:
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
