"""Errors on the wire: the JSON body, status and headers of each, in the shape of the route's family.

Owns the two error shapes and the handlers that produce them.
"""

from __future__ import annotations

import json
import logging
from http import HTTPStatus

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from serve_app.api.http.waiting import ClientDisconnected
from serve_app.errors import InternalError, LoraplexError, OutOfBounds, QueueFull, UnknownParameter

log = logging.getLogger(__name__)

# Not in any standard: nginx's status for a caller who hung up. Only the access log shows it.
CLIENT_CLOSED_REQUEST = 499


def install(app: FastAPI) -> None:
    """Answer every error of the product, of routing and of a vanished caller in JSON."""
    app.add_exception_handler(LoraplexError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(ClientDisconnected, _gone)


def error_response(scope: Scope, error: LoraplexError) -> Response:
    """Return the reply that tells a caller about an error."""
    headers: dict[str, str] = {}
    if error.status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE):
        # The rest of the body is still on its way and will not be read.
        headers["connection"] = "close"
    retry_after_s = getattr(error, "retry_after_s", None)
    if error.retry_after and retry_after_s is not None:
        headers["retry-after"] = str(retry_after_s)
    return _reply(scope, error.status, error.code, str(error), headers, parameter=_parameter(error))


def error_content(error: LoraplexError) -> dict[str, object]:
    """Return what the OpenAI shape says about an error."""
    return _fault(error.status, error.code, str(error), _parameter(error))


def _parameter(error: LoraplexError) -> str | None:
    return error.name if isinstance(error, (UnknownParameter, OutOfBounds)) else None


def _fault(status: int, code: str, message: str, parameter: str | None) -> dict[str, object]:
    return {"message": message, "type": _fault_type(status), "param": parameter, "code": code}


def _reply(
    scope: Scope,
    status: int,
    code: str,
    message: str,
    headers: dict[str, str],
    *,
    parameter: str | None = None,
) -> Response:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    if path == "/v1" or path.startswith("/v1/"):
        content: dict[str, object] = {"error": _fault(status, code, message, parameter)}
        if status in (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.GATEWAY_TIMEOUT):
            # The OpenAI client asks twice more on any 5xx; the same request would only fail again, as slowly.
            headers["x-should-retry"] = "false"
    else:
        content = {"error": message, "code": code}
    return Response(json.dumps(content), status, headers, "application/json")


def _fault_type(status: int) -> str:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, LoraplexError)
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or isinstance(error, QueueFull):
        log.warning("request %s: %s: %s", request.state.request_id, error.code, error)
    else:
        log.info("request %s: %s: %s", request.state.request_id, error.code, error)
    return error_response(request.scope, error)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path[:200]
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.NOT_FOUND:
        return _reply(request.scope, 404, "not_found", f"nothing is served at {path}", headers)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = headers["Allow"] = ", ".join(sorted(_methods_at(request)))
        return _reply(request.scope, 405, "method_not_allowed", f"{path} takes {allowed}, not {method}", headers)
    return _reply(request.scope, error.status_code, "bad_request", str(error.detail), headers)


def _methods_at(request: Request) -> set[str]:
    """Return the methods that the path takes, over all its routes; the router names only one route's."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    here = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in here for method in route.methods or ()}


async def _gone(request: Request, error: Exception) -> Response:
    log.info("request %s: the caller hung up", request.state.request_id)
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def internal_error(scope: Scope, request_id: str) -> Response:
    """Return the reply to a failure of our own, which names nothing but the request."""
    return error_response(scope, InternalError(request_id))
