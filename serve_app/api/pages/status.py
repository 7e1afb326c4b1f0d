"""Whether the service is up, and what a browser sees.

Owns `/` and `/health`.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.http.gateway import Gateway
from serve_app.api.http.negotiation import prefers_page
from serve_app.api.http.schemas import ErrorBody
from serve_app.api.pages.pages import asset_response, read_page
from serve_app.errors import NotReady

# Health checks compare the text: these very bytes.
OK = b'{"ok":"ok"}'


def add_status_routes(app: FastAPI, gateway: Gateway) -> None:
    """Add the status routes over a gateway."""
    page = read_page("index.html")

    @app.get("/", operation_id="status", tags=["Status"], responses=_REPLIES, response_class=Response)
    @app.head("/", include_in_schema=False)
    async def status(request: Request) -> Response:
        """Say that the HTTP face is up; to a browser, show the page."""
        if prefers_page(",".join(request.headers.getlist("accept"))):
            response = asset_response(request, page)
        else:
            response = Response(OK, media_type="application/json")
        response.headers["vary"] = "accept"
        return response

    @app.get("/health", operation_id="health", tags=["Status"], responses=_HEALTH_REPLIES, response_class=Response)
    @app.head("/health", include_in_schema=False)
    async def health() -> Response:
        """Say whether any base can serve; 503 while none can."""
        if not await gateway.is_ready():
            raise NotReady("every base model")
        return Response(OK, media_type="application/json")


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
