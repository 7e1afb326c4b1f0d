"""The outermost layer of the HTTP face: request ids, a limit on headers, and no exception past this point.

Owns `x-request-id`, `nosniff`, what a request's head may be, and the reply to an unexpected failure. Plain ASGI, so
that a hang-up reaches the routes.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.http.error_responses import error_response, internal_error
from serve_app.api.http.replies import EXPOSED_HEADERS, Stages
from serve_app.errors import HeadersTooLarge, MalformedRequest
from serve_app.redaction import contains_secret

log = logging.getLogger(__name__)

# Browsers send a few kilobytes, cookies and all.
MAX_HEAD_BYTES = 32 * 1024
# C0, DEL and C1, and what else ends a line: no id holds one, and a router's pattern may match before a final newline.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SANE_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


def new_uuid() -> str:
    """Return a fresh request id."""
    return str(uuid.uuid4())


class RequestIdMiddleware:
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
        is_fit = _SANE_ID.fullmatch(given) and not contains_secret(given)
        request_id = given if is_fit else self._new_request_id()
        scope.setdefault("state", {}).update(request_id=request_id, stages=Stages())
        has_started = False

        async def send_marked(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                if self._echo_request_id:
                    headers["x-request-id"] = request_id
                headers["access-control-expose-headers"] = EXPOSED_HEADERS
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await (self._app if (refusal := _refusal(scope)) is None else refusal)(scope, receive, send_marked)
        except Exception:
            log.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"][:200])
            if has_started:
                raise
            await internal_error(scope, request_id)(scope, receive, send_marked)


def _refusal(scope: Scope) -> ASGIApp | None:
    """Return the reply to a request whose head alone is at fault, None where it is not."""
    size_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    size_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
    if size_bytes > MAX_HEAD_BYTES:
        return error_response(scope, HeadersTooLarge(size_bytes, MAX_HEAD_BYTES))
    if _CONTROL.search(scope["path"]):
        return error_response(scope, MalformedRequest("the path holds a control character"))
    return None
