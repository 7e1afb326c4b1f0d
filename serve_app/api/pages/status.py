"""Whether the service is up, and what a browser sees.

Owns `/` and `/health`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.http.auth import OpenRoute
from serve_app.api.http.gateway import ServicesOf
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
    503: {"model": ErrorBody, "description": "no base can serve yet"},
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


@router.get("/health", operation_id="health", responses=_HEALTH_REPLIES)
@router.head("/health", include_in_schema=False)
async def health(services: ServicesOf) -> Response:
    """Say whether any base can serve; 503 while none can."""
    if not await services.gateway.is_ready():
        raise NotReady("every base model")
    return Response(OK, media_type="application/json")
