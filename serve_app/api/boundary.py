"""The outermost layer of the HTTP face: request ids, and no exception past this point.

Owns `x-request-id` and the reply to an unexpected failure. Plain ASGI, so that a hang-up reaches the routes.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.faults import internal_error
from serve_app.api.replies import EXPOSED_HEADERS

log = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


def new_uuid() -> str:
    """Return a fresh request id."""
    return str(uuid.uuid4())


class Boundary:
    """Gives each request its id and turns an unexpected exception into a 500 that leaks nothing.

    `echo_request_id` is off where the server in front already adds the header to every reply.
    """

    def __init__(self, app: ASGIApp, *, new_request_id: Callable[[], str], echo_request_id: bool) -> None:
        self._app = app
        self._new_request_id = new_request_id
        self._echo_request_id = echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else self._new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def send_marked(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                if self._echo_request_id:
                    headers["x-request-id"] = request_id
                headers["access-control-expose-headers"] = EXPOSED_HEADERS
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception:
            log.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if has_started:
                raise
            await internal_error(scope, request_id)(scope, receive, send_marked)
