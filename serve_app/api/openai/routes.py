"""The OpenAI images shape: `/v1/images/generations` and `/v1/images/edits`.

Owns the turn from that wire shape to a `UnresolvedRequest`; `serve_app.api.openai.replies` owns the way back. Must not
know the limits of any base.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.http.auth import DrawingRoute
from serve_app.api.http.body import Form, read_body, read_form, read_json
from serve_app.api.http.caller import charge_quota
from serve_app.api.http.events import EventStream
from serve_app.api.http.gateway import Services, ServicesOf
from serve_app.api.http.openapi_responses import IMAGE_HEADERS, REQUEST_ID_PARAMETER, Replies
from serve_app.api.http.replies import Stages, add_warnings, describe, header_id
from serve_app.api.http.schemas import ERROR_REPLIES, validate_model
from serve_app.api.http.validation import clip
from serve_app.api.http.waiting import (
    PRIORITY_PARAMETER,
    TIMEOUT_PARAMETER,
    WAIT_PARAMETER,
    Deadline,
    deadline_of,
    each_while_connected,
    priority_of,
    run_until_disconnect,
    with_retry_seed,
    with_scheduling,
)
from serve_app.api.openai.replies import encoding_of, event_replies, images_reply, own_names
from serve_app.api.openai.schemas import EVENTS_SCHEMA, EventKind, ImageEdit, ImageGeneration, ImagesReply
from serve_app.api.pictures.decoder import EncodedPicture, PictureDecoder
from serve_app.api.pictures.images import off_loop, pixels_of
from serve_app.core import Accepted, AdapterRef, PixelImage, PixelMask, UnresolvedRequest
from serve_app.errors import MalformedRequest, TooLarge

_REPLIES: Replies = {
    200: {
        "model": ImagesReply,
        "description": "the images, or with `stream` the events that lead to them",
        "headers": IMAGE_HEADERS,
        "content": {EventStream.media_type: {"schema": EVENTS_SCHEMA}},
    },
    **ERROR_REPLIES,
}


def _body(kind: str, schema: str) -> dict[str, Any]:
    content = {kind: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    parameters = [TIMEOUT_PARAMETER, WAIT_PARAMETER, PRIORITY_PARAMETER, REQUEST_ID_PARAMETER]
    return {"requestBody": {"required": True, "content": content}, "parameters": parameters}


router = APIRouter(route_class=DrawingRoute, tags=["OpenAI shape"], responses=_REPLIES, default_response_class=Response)


@router.post(
    "/v1/images/generations",
    operation_id="generate_images",
    openapi_extra=_body("application/json", "ImageGeneration"),
)
async def generations(request: Request, services: ServicesOf) -> Response:
    """Draw images from a prompt."""
    deadline = deadline_of(request, services.request_timeout_s)
    settings = services.settings
    body = await read_body(request, min(settings.max_json, settings.max_body), timeout_s=settings.body_timeout_s)
    asked = validate_model(ImageGeneration, await read_json(body, max_bytes=settings.max_json))
    return await _answer(request, services, asked, _unresolved(asked), "image_generation", deadline)


@router.post("/v1/images/edits", operation_id="edit_image", openapi_extra=_body("multipart/form-data", "ImageEditForm"))
async def edits(request: Request, services: ServicesOf) -> Response:
    """Draw changed versions of a picture, or of the part of it where the mask is transparent."""
    deadline = deadline_of(request, services.request_timeout_s)
    settings = services.settings
    body = await read_body(request, settings.max_body, timeout_s=settings.body_timeout_s)
    form = await read_form(request.headers, body)
    asked = validate_model(ImageEdit, form.fields, is_text=True)
    decoding = _pictures(form, services.decoder, settings.max_image_pixels)
    images, mask = await run_until_disconnect(request, decoding, deadline=deadline)
    unresolved = replace(_unresolved(asked), image=images[0], references=images[1:], mask=mask, strength=asked.strength)
    return await _answer(request, services, asked, unresolved, "image_edit", deadline)


async def _answer(
    request: Request,
    services: Services,
    asked: ImageGeneration,
    unresolved: UnresolvedRequest,
    kind: EventKind,
    deadline: Deadline,
) -> Response:
    warnings = asked.unused()
    unresolved = with_scheduling(unresolved, priority=priority_of(request), deadline=deadline)
    with own_names():
        unresolved = await charge_quota(request, unresolved)
        if asked.stream:
            return await _stream(request, services, asked, unresolved, kind, deadline, warnings)
        return await _draw(request, services, asked, unresolved, deadline, warnings)


async def _stream(
    request: Request,
    services: Services,
    asked: ImageGeneration,
    unresolved: UnresolvedRequest,
    kind: EventKind,
    deadline: Deadline,
    warnings: tuple[str, ...],
) -> Response:
    request_id = request.state.request_id
    accepting = services.gateway.stream(with_retry_seed(unresolved, request), request_id=request_id)
    events = each_while_connected(request, accepting, deadline=deadline)
    # A request refused before the first event still has a status of its own.
    accepted = await anext(events)
    assert isinstance(accepted, Accepted)
    response = EventStream(
        event_replies(events, accepted, asked, kind, services.now, warnings),
        request_id=request_id,
        keep_alive_s=services.settings.sse_ping_interval_s,
    )
    response.headers["x-base-model"] = header_id(accepted.base_id)
    response.headers["x-seed"] = str(accepted.seed)
    add_warnings(response, warnings)
    return response


async def _draw(
    request: Request,
    services: Services,
    asked: ImageGeneration,
    unresolved: UnresolvedRequest,
    deadline: Deadline,
    warnings: tuple[str, ...],
) -> Response:
    stages: Stages = request.state.stages
    stages.end("parse")
    call = services.gateway.generate(unresolved, request_id=request.state.request_id)
    result = await run_until_disconnect(request, call, deadline=deadline)
    stages.end("service")
    result = replace(result, warnings=(*warnings, *result.warnings))
    content = await off_loop(pixels_of(*result.images), images_reply, asked, result, int(services.now()))
    stages.end("encode")
    response = Response(content, media_type="application/json")
    describe(response, result, unresolved.prompt, stages)
    return response


async def _pictures(
    form: Form, decoder: PictureDecoder, max_pixels: int
) -> tuple[tuple[PixelImage, ...], PixelMask | None]:
    """Return the pictures of an edit, at least one, and the mask of the first where there is one.

    Raises:
        MalformedRequest: there is none, one cannot be read, or the mask has another size.
        TooLarge: together they have more than `max_pixels` pixels.
    """
    unknown = next((name for name in form.files if name not in ("image", "mask")), None)
    if unknown is not None:
        raise MalformedRequest(f"unknown file '{clip(unknown)}'; the picture is 'image', and 'mask' says which part")
    if "image" not in form.files:
        raise MalformedRequest("'image' is missing: send the picture as a file")
    images: list[PixelImage] = []
    for content in form.files["image"]:
        images.append(await decoder.image(EncodedPicture("image", content)))
        if pixels_of(*images) > max_pixels:
            raise TooLarge(f"'image', {len(form.files['image'])} pictures,", f"{max_pixels} pixels together")
    if "mask" not in form.files:
        return tuple(images), None
    mask = await decoder.mask(EncodedPicture("mask", _file(form, "mask")))
    if (mask.width, mask.height) != (images[0].width, images[0].height):
        sizes = f"{mask.width}x{mask.height}, but 'image' is {images[0].width}x{images[0].height}"
        raise MalformedRequest(f"'mask' is {sizes}; both must have one size")
    return tuple(images), mask


def _file(form: Form, name: str) -> bytes:
    files = form.files.get(name, ())
    if len(files) != 1:
        raise MalformedRequest(f"'{name}' must be one file, not {len(files)}")
    return files[0]


def _unresolved(asked: ImageGeneration) -> UnresolvedRequest:
    if asked.output_format in (None, "png") and asked.output_compression not in (None, 100):
        raise MalformedRequest("'output_compression' is for jpeg and webp; png keeps every pixel")
    if asked.partial_images and not asked.stream:
        raise MalformedRequest("'partial_images' goes with 'stream': true; a reply in one piece carries no previews")
    model, adapters = _model_and_adapters(asked)
    width, height = asked.pixels()
    return UnresolvedRequest(
        prompt=asked.prompt,
        model=model,
        adapters=adapters,
        negative_prompt=asked.negative_prompt,
        width=width,
        height=height,
        steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        scheduler=asked.scheduler,
        seed=asked.seed,
        num_images=1 if asked.n is None else asked.n,
        options=asked.options(),
        scheduler_options=asked.sorted_scheduler_options(),
        num_previews=asked.partial_images or 0,
        encoding=encoding_of(asked),
        prompt_syntax=asked.prompt_syntax,
    )


def _model_and_adapters(asked: ImageGeneration) -> tuple[str | None, tuple[AdapterRef, ...]]:
    if asked.lora and asked.loras:
        raise MalformedRequest("adapters are named both by 'lora' and by 'loras'; put them all in 'loras'")
    adapters = tuple(entry.ref() for entry in asked.lora or asked.loras or ())
    if asked.model is None or ":" not in asked.model:
        return asked.model, adapters
    base, _, adapter = asked.model.partition(":")
    if not base or not adapter:
        raise MalformedRequest("'model' with a colon must be '<base>:<adapter>'")
    return base, (AdapterRef(adapter), *adapters)
