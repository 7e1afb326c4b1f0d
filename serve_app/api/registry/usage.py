"""What each key had drawn on each base, day by day: `/v1/usage`, for admins."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.http.auth import AdminRoute
from serve_app.api.http.gateway import ServicesOf
from serve_app.api.http.schemas import ERROR_REPLIES
from serve_app.api.http.validation import clip
from serve_app.api.registry.schemas import Usage, UsageList
from serve_app.catalog.replica_report import KEPT_USAGE_DAYS
from serve_app.errors import OutOfBounds

_DAYS: dict[str, Any] = {
    "name": "days",
    "in": "query",
    "required": False,
    "description": "how many days, today being the last; 31 where it is absent",
    "schema": {"type": "integer", "minimum": 1, "maximum": KEPT_USAGE_DAYS},
}

router = APIRouter(route_class=AdminRoute, tags=["Registry"], default_response_class=Response)


@router.get(
    "/v1/usage",
    operation_id="list_usage",
    responses={200: {"model": UsageList}, **ERROR_REPLIES},
    openapi_extra={"parameters": [_DAYS]},
)
async def usage(request: Request, services: ServicesOf) -> Response:
    """List the images and device seconds of each key on each base, by day of UTC."""
    today = datetime.fromtimestamp(services.now(), UTC).date()
    rows = await services.gateway.registry.usage((today - timedelta(_days(request) - 1)).isoformat())
    reply = UsageList(
        data=[
            Usage(
                day=row.day,
                key=row.key,
                base_model=row.base_id,
                images=row.images,
                device_seconds=round(row.device_s, 3),
            )
            for row in sorted(rows, key=lambda row: (row.day, row.key or "", row.base_id))
        ]
    )
    return Response(reply.model_dump_json(), media_type="application/json")


def _days(request: Request) -> int:
    text = request.query_params.get("days", "31")
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= KEPT_USAGE_DAYS):
        raise OutOfBounds("days", clip(text), f"a number from 1 to {KEPT_USAGE_DAYS}")
    return int(text)
