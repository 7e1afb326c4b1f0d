"""The pictures of adapters: `/v1/pictures`.

Owns how a picture is made small, and when one is drawn: with an adapter that has none, once. Must not know where they
are kept.
"""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.http.auth import DrawingRoute
from serve_app.api.http.body import read_body
from serve_app.api.http.caller import charge_quota, hub_token_of
from serve_app.api.http.gateway import Services, ServicesOf
from serve_app.api.http.schemas import ERROR_REPLIES
from serve_app.api.http.waiting import (
    TIMEOUT_PARAMETER,
    WAIT_PARAMETER,
    Deadline,
    deadline_of,
    run_until_disconnect,
    with_scheduling,
)
from serve_app.api.pictures.decoder import EncodedPicture
from serve_app.api.pictures.images import off_loop, pixels_of, thumbnail
from serve_app.api.registry.routes import MAX_BODY_BYTES, checked_name
from serve_app.config import BaseModelConfig
from serve_app.core import PixelImage, UnresolvedRequest
from serve_app.errors import MalformedRequest, NoPicture, TooLarge

SIDE_PX = 256
# A larger picture takes longer to draw, and is made as small as this one.
MAX_DRAWN_PX = 512
# Sides of every base are multiples of a power of two up to this.
_MULTIPLE_PX = 64
MAX_AGE_S = 300
SEED = 0

_REPLIES: dict[int | str, dict[str, Any]] = {
    **ERROR_REPLIES,
    200: {"description": "the picture", "content": {"image/webp": {"schema": {"type": "string", "format": "binary"}}}},
    304: {"description": "the caller has it already"},
}

router = APIRouter(route_class=DrawingRoute, tags=["Registry"], responses=_REPLIES, default_response_class=Response)


@router.get("/v1/pictures/{name:path}", operation_id="get_picture")
async def picture(name: str, request: Request, services: ServicesOf) -> Response:
    """Return a small copy of the picture of an adapter or alias."""
    deadline = deadline_of(request, services.request_timeout_s)
    found = await run_until_disconnect(request, _found(checked_name(name), request, services), deadline=deadline)
    if found is None:
        raise NoPicture(name)
    return _reply(request, found)


@router.post(
    "/v1/pictures/{name:path}",
    operation_id="draw_picture",
    openapi_extra={"parameters": [TIMEOUT_PARAMETER, WAIT_PARAMETER]},
)
async def draw(name: str, request: Request, services: ServicesOf) -> Response:
    """Return the picture of an adapter or alias; where it has none, draw one with its trigger words, and keep it."""
    deadline = deadline_of(request, services.request_timeout_s)
    await read_body(request, MAX_BODY_BYTES)
    call = _found_or_drawn(checked_name(name), request, services, deadline)
    return _reply(request, await run_until_disconnect(request, call, deadline=deadline))


async def _found(name: str, request: Request, services: Services) -> bytes | None:
    async def shrink(file: str, content: bytes) -> bytes:
        try:
            return await _small(await services.decoder.image(EncodedPicture(file, content)))
        except (MalformedRequest, TooLarge) as error:
            raise NoPicture(name, str(error)) from None

    return await services.gateway.registry.picture(name, shrink, token=hub_token_of(request))


async def _found_or_drawn(name: str, request: Request, services: Services, deadline: Deadline) -> bytes:
    found = await _found(name, request, services)
    if found is not None:
        return found
    if not services.settings.draw_pictures:
        raise NoPicture(name, "none comes with it, and this service draws none (`ingress.draw_pictures`)")
    async with services.drawing_picture:
        # Somebody else may have had it drawn by now.
        return await _found(name, request, services) or await _drawn(name, request, services, deadline)


async def _drawn(name: str, request: Request, services: Services, deadline: Deadline) -> bytes:
    registry, token = services.gateway.registry, hub_token_of(request)
    adapter = (await registry.lora(name, token=token)).adapter
    base = next(base for base in registry.bases() if base.id == adapter.spec.base_id)
    width, height = _size(base)
    order = UnresolvedRequest(
        prompt=adapter.example_prompt or adapter.spec.defaults.trigger_words or name,
        model=name,
        width=width,
        height=height,
        seed=SEED,
        prompt_syntax="plain",
    )
    order = await charge_quota(request, with_scheduling(order, priority="batch", deadline=deadline))
    result = await services.gateway.generate(order, request_id=request.state.request_id)
    image = result.images[0]
    assert isinstance(image, PixelImage), "no encoding was asked for"
    content = await _small(image)
    await registry.keep_picture(name, content, token=token)
    return content


def _size(base: BaseModelConfig) -> tuple[int | None, int | None]:
    """Return the size at which a base draws a picture: its own, or a smaller one of the same shape."""
    sides = (base.defaults.width, base.defaults.height)
    scale = MAX_DRAWN_PX / max(sides)
    width, height = (int(side * scale) // _MULTIPLE_PX * _MULTIPLE_PX for side in sides)
    is_smaller = scale < 1 and min(width, height) >= base.limits.min_side
    return (width, height) if is_smaller else (None, None)


async def _small(image: PixelImage) -> bytes:
    return await off_loop(pixels_of(image), thumbnail, image, SIDE_PX)


def _reply(request: Request, content: bytes) -> Response:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "etag": etag,
        # For this caller alone: another may not be allowed to see it.
        "cache-control": f"private, max-age={MAX_AGE_S}",
        "vary": "authorization, x-hf-token",
        "x-content-type-options": "nosniff",
    }
    if request.method == "GET" and request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="image/webp", headers=headers)
