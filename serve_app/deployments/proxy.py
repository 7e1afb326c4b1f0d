"""What Serve's HTTP proxy does before it hands a request on.

Owns keeping callers from steering Serve itself: its proxy obeys headers that are meant for its operators. Imported by
the proxy, through `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`, so it must load quickly and need nothing but Starlette.
"""

from __future__ import annotations

import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

# Which replica, how long the proxy waits, and whether it notices a caller who leaves: not for callers to say.
_STEERING = frozenset(
    (b"serve-multiplexed-model-id", b"x-session-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
)
_REQUEST_ID = b"x-request-id"
_SANE_ID = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}")


def guards() -> list[Middleware]:
    """Return the layers around Serve's proxy, the outermost last; called by Serve."""
    return [Middleware(SteeringGuard)]


class SteeringGuard:
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
        return _SANE_ID.fullmatch(value) is not None
    return name not in _STEERING
