"""Which requests are our application's, of all that come to Serve's proxy: others share the cluster.

Owns what is used of the proxy's route table, which Serve does not publish (`docs/routing.md` has the table), and the
prefix under which our application lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

# The deployment that answers for our application: its name is how it is known among others.
INGRESS_NAME = "LoraplexIngress"
_PREFIX = "loraplex.prefix"
# Added to each request that came through the layers, for the ingress to notice where they are missing.
FRONT_HEADER = "x-loraplex-front"


class OwnRoutesOnly:
    """Sends requests for our application through the layers, and all others past them."""

    def __init__(self, app: ASGIApp, layers: Callable[[ASGIApp], ASGIApp]) -> None:
        """`layers` puts what is to be done for our own requests around an application."""
        self._others = app
        self._own = layers(app)
        self._router = _proxy_router(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        prefix = self._prefix(scope["path"]) if scope["type"] in ("http", "websocket") else None
        if prefix is None:
            await self._others(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name != FRONT_HEADER.encode()]
        scope[_PREFIX], scope["headers"] = prefix, [*headers, (FRONT_HEADER.encode(), b"1")]
        await self._own(scope, receive, send)

    def _prefix(self, path: str) -> str | None:
        """Return our application's prefix where it answers a path; None for other applications and Serve itself."""
        matched = self._router.match_route(path)
        if matched is not None:
            route, handle, _ = matched
            return route.rstrip("/") if handle.deployment_name == INGRESS_NAME else None
        # No route answers it. Where we have no route yet, it may be a request that came too early for us.
        is_known = any(handle.deployment_name == INGRESS_NAME for handle in self._router.handles.values())
        return None if is_known else ""


def own_path(scope: Scope) -> str:
    """Return the path of a request within our application."""
    path: str = scope["path"]
    return path.removeprefix(scope.get(_PREFIX, ""))


def as_own(scope: Scope) -> Scope:
    """Return a scope with our application's prefix as its root, for replies in the shape of its routes."""
    return dict(scope, root_path=scope.get(_PREFIX, ""))


def _proxy_router(app: Any) -> Any:
    """Return the table of routes of the proxy that an application leads to; Serve wraps it in a layer of its own."""
    while not hasattr(app, "proxy_router"):
        app = app._app
    return app.proxy_router
