"""The OpenAI images shape: `/v1/models`, `/v1/images/generations`, `/v1/images/edits`.

Owns the turn from that wire shape to a `GenerationDraft`, and from a result to its reply. Must not know the limits of
any base.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.body import parse_json, read_body
from serve_app.api.forms import Form, read_form, typed
from serve_app.api.gateway import Gateway
from serve_app.api.images import decode_image, encode_image
from serve_app.api.openai_schemas import (
    AdapterReport,
    FaultBody,
    ImageData,
    ImageEdit,
    ImageGeneration,
    ImagesReply,
    Model,
    ModelList,
    Report,
)
from serve_app.api.replies import describe
from serve_app.api.schemas import checked
from serve_app.api.validation import clip
from serve_app.api.waiting import while_connected
from serve_app.config import IngressSettings
from serve_app.core import AdapterRef, GenerationDraft, GenerationResult, ModelInfo, PixelImage
from serve_app.errors import MalformedRequest, ModelNotFound, OutOfBounds

MAX_PAGE = 1000
# What this family calls the fields of a draft.
_OWN_NAMES = {"num_images_per_prompt": "n", "width": "size", "height": "size", "width x height": "size"}
_REFUSALS = (400, 401, 403, 404, 413, 422, 429, 500, 503, 504)
_FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": FaultBody, "description": HTTPStatus(status).phrase} for status in _REFUSALS
}


def add_openai_routes(app: FastAPI, gateway: Gateway, settings: IngressSettings, *, now: Callable[[], float]) -> None:
    """Add the routes of this family over a gateway; `now` is in seconds since 1970."""
    documented: dict[str, Any] = {"tags": ["OpenAI shape"], "response_class": Response}

    async def draw(request: Request, asked: ImageGeneration, image: PixelImage | None) -> Response:
        draft = _draft(asked, image)
        call = gateway.generate(draft, request_id=request.state.request_id)
        try:
            result = await while_connected(request, call, timeout_s=settings.request_timeout_s)
        except OutOfBounds as error:
            raise OutOfBounds(_OWN_NAMES.get(error.name, error.name), error.value, error.limit) from None
        content = await asyncio.to_thread(_reply, asked, result, int(now()))
        response = Response(content, media_type="application/json")
        describe(response, result, draft.prompt)
        return response

    @app.post(
        "/v1/images/generations",
        operation_id="generate_images",
        responses={200: {"model": ImagesReply}, **_FAULTS},
        openapi_extra=_body("application/json", "ImageGeneration"),
        **documented,
    )
    async def generations(request: Request) -> Response:
        """Draw images from a prompt."""
        body = await read_body(request, settings.max_body)
        return await draw(request, checked(ImageGeneration, parse_json(body)), None)

    @app.post(
        "/v1/images/edits",
        operation_id="edit_image",
        responses={200: {"model": ImagesReply}, **_FAULTS},
        openapi_extra=_body("multipart/form-data", "ImageEditForm"),
        **documented,
    )
    async def edits(request: Request) -> Response:
        """Draw changed versions of a picture."""
        form = await read_form(request.headers, await read_body(request, settings.max_body))
        asked = checked(ImageEdit, typed(ImageEdit, form.fields))
        content = _picture(form)
        image = await asyncio.to_thread(decode_image, content, "image", max_pixels=settings.max_image_pixels)
        return await draw(request, asked, image)

    _add_model_routes(app, gateway, documented)


def _add_model_routes(app: FastAPI, gateway: Gateway, documented: dict[str, Any]) -> None:
    @app.get(
        "/v1/models",
        operation_id="list_models",
        responses={200: {"model": ModelList}, **_FAULTS},
        openapi_extra={"parameters": [_query("limit", "integer"), _query("after", "string")]},
        **documented,
    )
    async def models(request: Request) -> Response:
        """List the bases and the adapters known so far, at most `limit`, from the one behind `after` on."""
        page = _page(await gateway.models(), request.query_params.get("after"), _limit(request))
        return Response(page.model_dump_json(), media_type="application/json")

    @app.get(
        "/v1/models/{id:path}",
        operation_id="describe_model",
        responses={200: {"model": Model}, **_FAULTS},
        **documented,
    )
    async def model(id: str) -> Response:
        """Describe a base or an adapter known so far."""
        found = next((info for info in await gateway.models() if info.id == id), None)
        if found is None:
            raise ModelNotFound(clip(id))
        return Response(_model(found).model_dump_json(), media_type="application/json")


def _body(kind: str, schema: str) -> dict[str, Any]:
    content = {kind: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _query(name: str, kind: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": {"type": kind}}


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(MAX_PAGE))
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_PAGE):
        raise OutOfBounds("limit", clip(text), f"a number from 1 to {MAX_PAGE}")
    return int(text)


def _page(models: tuple[ModelInfo, ...], after: str | None, limit: int) -> ModelList:
    ids = [info.id for info in models]
    if after is not None and after not in ids:
        raise ModelNotFound(clip(after), "'after' must be an id of the page before")
    start = 0 if after is None else ids.index(after) + 1
    page = models[start : start + limit]
    return ModelList(
        data=[_model(info) for info in page],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=start + limit < len(models),
    )


def _model(info: ModelInfo) -> Model:
    return Model(
        id=info.id,
        created=info.created,
        owned_by=info.owned_by,
        root=info.base_id or info.id,
        parent=info.base_id,
    )


def _picture(form: Form) -> bytes:
    """Return the one picture of an edit."""
    if "mask" in form.files or "mask" in form.fields:
        raise MalformedRequest("'mask' is not offered: the whole picture is drawn anew")
    unknown = next((name for name in form.files if name != "image"), None)
    if unknown is not None:
        raise MalformedRequest(f"unknown file '{clip(unknown)}'; the picture is 'image'")
    pictures = form.files.get("image", ())
    if len(pictures) != 1:
        raise MalformedRequest(f"'image' must be one file, not {len(pictures)}")
    return pictures[0]


def _draft(asked: ImageGeneration, image: PixelImage | None) -> GenerationDraft:
    if asked.output_format in (None, "png") and asked.output_compression not in (None, 100):
        raise MalformedRequest("'output_compression' is for jpeg and webp; png keeps every pixel")
    model, adapters = _model_and_adapters(asked)
    width, height = asked.pixels()
    return GenerationDraft(
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
        image=image,
        strength=asked.strength if isinstance(asked, ImageEdit) else None,
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


def _reply(asked: ImageGeneration, result: GenerationResult, created: int) -> str:
    form = asked.output_format or "png"
    encoded = [encode_image(image, form, quality=asked.output_compression) for image in result.images]
    reply = ImagesReply(
        created=created,
        data=[ImageData(b64_json=base64.b64encode(content).decode()) for content in encoded],
        output_format=form,
        size=f"{result.images[0].width}x{result.images[0].height}",
        loraplex=Report(
            seed=result.seeds[0],
            base_model=result.base_id,
            adapters=[AdapterReport(**asdict(adapter)) for adapter in result.adapters],
            timing_ms={name.removesuffix("_ms"): value for name, value in asdict(result.timings).items()},
            warnings=list(result.warnings),
        ),
    )
    return reply.model_dump_json()
