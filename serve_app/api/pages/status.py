"""Whether the service is up, and what a browser sees.

Owns `/` and `/health`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.http.auth import OpenRoute
from serve_app.api.http.caller import caller_of
from serve_app.api.http.gateway import Services, ServicesOf
from serve_app.api.http.negotiation import prefers_page
from serve_app.api.http.schemas import ErrorBody
from serve_app.api.pages.pages import asset_response, read_page
from serve_app.errors import NotReady

# Health checks compare the text: these very bytes.
OK = b'{"ok":"ok"}'
_REPLIES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "up",
        "content": {"application/json": {"example": {"ok": "ok"}, "schema": {"type": "object"}}},
    }
}
_HEALTH_REPLIES: dict[int | str, dict[str, Any]] = {
    **_REPLIES,
    503: {"model": ErrorBody, "description": "a base that must run does not"},
}
_VERBOSE: dict[str, Any] = {
    "name": "verbose",
    "in": "query",
    "required": False,
    "description": "whatever its value: say what each base does, to callers with a key where keys are configured",
    "schema": {"type": "string"},
}

router = APIRouter(route_class=OpenRoute, tags=["Status"], default_response_class=Response)
_page = read_page("index.html")


@router.get("/", operation_id="status", responses=_REPLIES)
@router.head("/", include_in_schema=False)
async def status(request: Request) -> Response:
    """Say that the HTTP face is up; to a browser, show the page."""
    if prefers_page(",".join(request.headers.getlist("accept"))):
        response = asset_response(request, _page)
    else:
        response = Response(OK, media_type="application/json")
    response.headers["vary"] = "accept"
    return response


@router.get("/health", operation_id="health", responses=_HEALTH_REPLIES, openapi_extra={"parameters": [_VERBOSE]})
@router.head("/health", include_in_schema=False)
async def health(request: Request, services: ServicesOf) -> Response:
    """Say whether the bases that must run do, 503 while they do not; with `verbose`, what each base does."""
    error = None if await services.gateway.is_ready() else NotReady("the service")
    if "verbose" in request.query_params:
        return await _verbose(request, services, error)
    if error is not None:
        raise error
    return Response(OK, media_type="application/json")


async def _verbose(request: Request, services: Services, error: NotReady | None) -> Response:
    content: dict[str, Any] = {"ok": "ok"} if error is None else {"error": str(error), "code": error.code}
    content["notices"] = getattr(request.state, "notices", [])
    # The ids of bases are for those who may list them.
    if caller_of(request).is_known:
        states = await services.gateway.registry.states()
        content["bases"] = [
            {"id": base, "state": one.state, "since": one.since_s, "expected_s": one.expected_s, "reason": one.reason}
            for base, one in states.items()
        ]
    if error is None:
        return JSONResponse(content)
    return JSONResponse(content, error.status, {"retry-after": str(error.retry_after_s)})
