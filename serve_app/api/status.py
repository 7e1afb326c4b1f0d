"""Whether the service is up, and what a browser sees.

Owns `/`, `/health` and the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from serve_app.api.gateway import Gateway
from serve_app.api.negotiation import prefers_page
from serve_app.api.schemas import ErrorBody
from serve_app.errors import NotReady

STATIC = Path(__file__).parent / "static"
# Health checks compare the text: these very bytes.
OK = b'{"ok":"ok"}'
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; base-uri 'none'"


def page_response(html: str) -> HTMLResponse:
    """Return a self-contained page that may load nothing from elsewhere."""
    return HTMLResponse(html, headers={"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"})


def add_status_routes(app: FastAPI, gateway: Gateway) -> None:
    """Add the status routes over a gateway."""
    page = (STATIC / "index.html").read_text("utf-8")

    @app.get("/", operation_id="status", tags=["Status"], responses=_REPLIES, response_class=Response)
    @app.head("/", include_in_schema=False)
    async def status(request: Request) -> Response:
        """Say that the HTTP face is up; to a browser, show the page."""
        if prefers_page(",".join(request.headers.getlist("accept"))):
            response: Response = page_response(page)
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
