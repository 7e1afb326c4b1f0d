"""Access by keys, checked before any route.

Access is decided by the route that will answer, never by the path: routes of `OpenRoute` need no key, those of
`DrawingRoute` any key, those of `AdminRoute` an admin key. Every other route needs a key to read and an admin key for
the rest. Never logs or repeats what was presented.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.http.caller import Caller, accounts_of, asked_by, read_hub_token
from serve_app.api.http.error_responses import error_response
from serve_app.api.http.limits import UNLIMITED, LocalRateLimiter, RateLimiter
from serve_app.config import ApiKey, digest_of
from serve_app.errors import AdminRequired, LoraplexError, Unauthorized

log = logging.getLogger(__name__)

READING = ("GET", "HEAD")
Need = Literal["nothing", "key", "admin"]


class OpenRoute(APIRoute):
    """A route that reads and needs no key: health checks, and the files a browser loads before a user can type in a
    key."""


class DrawingRoute(APIRoute):
    """A route that draws, and changes nothing: any key will do."""


class AdminRoute(APIRoute):
    """A route that tells of all callers, and that admins alone may read."""


@dataclass(frozen=True, slots=True)
class Access:
    """The rules in force.

    `keys` are those of now, asked for at each request: with none, everybody may do everything. `takes_hub_tokens` says
    that callers may bring their own token for the Hub. `meter` counts what keys with limits ask for; None means that
    this process counts for itself.
    """

    keys: Callable[[], tuple[ApiKey, ...]] = tuple
    takes_hub_tokens: bool = False
    meter: RateLimiter | None = None
    on_refusal: Callable[[str], None] = field(default=lambda _: None)


def need_of(route: BaseRoute | None, method: str) -> Need:
    """Return what a request to a route needs, where keys are configured; None is no route, which answers 404 or 405."""
    if isinstance(route, AdminRoute):
        return "admin"
    if route is None or method in READING:
        return "nothing" if isinstance(route, OpenRoute) else "key"
    return "key" if isinstance(route, DrawingRoute) else "admin"


def route_of(scope: Scope) -> BaseRoute | None:
    """Return the route that will answer a request: the first that matches it whole, as the router chooses."""
    routes: list[BaseRoute] = scope["app"].routes
    return next((route for route in routes if route.matches(scope)[0] is Match.FULL), None)


class Authentication:
    """Lets in callers with access, and tells the routes who they are."""

    def __init__(self, app: ASGIApp, *, access: Access, clock: Callable[[], float]) -> None:
        """Guard an application; `clock` is in monotonic seconds."""
        self._app = app
        self._access = access
        self._meter = access.meter or LocalRateLimiter(clock=clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["state"]["request_id"]
        try:
            key, caller = self._admit(scope)
        except LoraplexError as error:
            await self._refuse(error, scope, receive, send)
            return
        scope["state"]["caller"] = caller
        asked_by.set(accounts_of(scope, caller.key))
        if key is None:
            await self._app(scope, receive, send)
            return
        log.info("request %s: %s %s with key %s", request_id, scope["method"], _path(scope), key.name)
        if scope["method"] in READING or key.limits == UNLIMITED:
            await self._app(scope, receive, send)
            return
        await self._metered(key, scope, receive, send)

    def _admit(self, scope: Scope) -> tuple[ApiKey | None, Caller]:
        """Return the key of a request, None where it needs none, and who sends it.

        Raises:
            Unauthorised, AdminRequired, MalformedRequest: it is not let in.
        """
        headers, keys = Headers(scope=scope), self._access.keys()
        key: ApiKey | None = None
        is_known = not keys
        need = need_of(route_of(scope), scope["method"])
        if keys and need != "nothing":
            key = _presented(headers, keys)
            if need == "admin" and not key.admin:
                raise AdminRequired(key.name)
        elif keys:
            with contextlib.suppress(Unauthorized):
                is_known = bool(_presented(headers, keys))
        token = read_hub_token(headers, is_key_in_authorization=bool(keys)) if self._access.takes_hub_tokens else None
        return key, Caller(None if key is None else key.name, hub_token=token, is_known=is_known or key is not None)

    async def _metered(self, key: ApiKey, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            grant = await self._meter.begin(key.name, key.limits)
        except LoraplexError as error:
            await self._refuse(error, scope, receive, send)
            return
        scope["state"]["caller"] = replace(scope["state"]["caller"], allowance=grant)
        status = 0

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        finally:
            grant.end(drew=200 <= status < 300)

    async def _refuse(self, error: LoraplexError, scope: Scope, receive: Receive, send: Send) -> None:
        log.info("request %s: %s: %s", scope["state"]["request_id"], error.code, error)
        self._access.on_refusal(error.code)
        response = error_response(scope, error)
        if isinstance(error, Unauthorized):
            response.headers["www-authenticate"] = "Bearer"
        await response(scope, receive, send)


def _presented(headers: Headers, keys: tuple[ApiKey, ...]) -> ApiKey:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not value.strip():
        raise Unauthorized("a key is needed; send it as 'Authorization: Bearer <key>'")
    digest = digest_of(value.strip()).encode()
    found: ApiKey | None = None
    for key in keys:
        # No early end: the time must not tell which keys there are.
        if hmac.compare_digest(key.sha256.encode(), digest):
            found = key
    if found is None:
        raise Unauthorized("the key is not known here")
    return found


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))[:200]
