"""The Hugging Face inference shape: `POST /` and `POST /models/{id}`.

Owns the turn from that wire shape to a `UnresolvedRequest`, and from a result to one raw image. Must not know
the limits of any base.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.http.auth import DrawingRoute
from serve_app.api.http.body import read_body, read_json
from serve_app.api.http.caller import charge_quota
from serve_app.api.http.gateway import Services, ServicesOf
from serve_app.api.http.negotiation import FORMATS, choose_format
from serve_app.api.http.openapi_responses import (
    IMAGE_HEADERS,
    REQUEST_ID_PARAMETER,
    Replies,
    header_parameter,
    refusals,
)
from serve_app.api.http.replies import Stages, describe
from serve_app.api.http.schemas import MAX_NAME_LENGTH, ErrorBody, validate_model
from serve_app.api.http.validation import clip
from serve_app.api.http.waiting import (
    PRIORITY_PARAMETER,
    TIMEOUT_PARAMETER,
    WAIT_PARAMETER,
    Deadline,
    deadline_of,
    priority_of,
    run_until_disconnect,
    with_scheduling,
)
from serve_app.api.huggingface.schemas import InferenceBody, Parameters
from serve_app.api.pictures.decoder import EncodedPicture
from serve_app.api.pictures.images import (
    encode_image,
    is_base64_image,
    is_image,
    off_loop,
    pixels_of,
)
from serve_app.core import AdapterRef, Encoding, PixelImage, UnresolvedRequest
from serve_app.errors import MalformedRequest, ModelNotFound, OutOfBounds

_REPLIES: Replies = {
    200: {
        "description": "the image, in the format that Accept asks for",
        "headers": IMAGE_HEADERS,
        "content": {f"image/{name}": {"schema": {"type": "string", "format": "binary"}} for name in FORMATS},
    },
    **refusals(ErrorBody, 400, 401, 403, 404, 406, 408, 413, 422, 429, 431, 500, 503, 504),
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/InferenceBody"}},
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    },
    "parameters": [
        header_parameter(
            "lora",
            "an adapter's id; wins over `parameters.lora_adapter`; empty means none",
            type="string",
            maxLength=MAX_NAME_LENGTH,
        ),
        TIMEOUT_PARAMETER,
        WAIT_PARAMETER,
        PRIORITY_PARAMETER,
        REQUEST_ID_PARAMETER,
    ],
}


router = APIRouter(
    route_class=DrawingRoute, tags=["Hugging Face shape"], responses=_REPLIES, default_response_class=Response
)


@router.post("/", operation_id="infer", openapi_extra=_BODY)
async def infer(request: Request, services: ServicesOf) -> Response:
    """Draw with the default base, or with the base of the adapter that the request names."""
    return await _answer(request, services, None)


@router.post("/models/{id:path}", operation_id="infer_with_model", openapi_extra=_BODY)
async def infer_with_model(id: str, request: Request, services: ServicesOf) -> Response:
    """Draw with a base, or with an adapter on the base that it was made for."""
    return await _answer(request, services, _model_id(id))


async def _answer(request: Request, services: Services, model: str | None) -> Response:
    stages: Stages = request.state.stages
    deadline = deadline_of(request, services.request_timeout_s)
    priority = priority_of(request)
    form = choose_format(",".join(request.headers.getlist("accept")))
    read = replace(await _read_request(request, model, services, deadline), encoding=Encoding(form))
    unresolved = await charge_quota(request, with_scheduling(read, priority=priority, deadline=deadline))
    stages.end("parse")
    call = services.gateway.generate(unresolved, request_id=request.state.request_id)
    result = await run_until_disconnect(request, call, deadline=deadline)
    stages.end("service")
    content = await off_loop(pixels_of(result.images[0]), encode_image, result.images[0], form)
    stages.end("encode")
    response = Response(content, media_type=f"image/{form}")
    describe(response, result, unresolved.prompt, stages)
    return response


def _model_id(path: str) -> str:
    model = path.strip("/")
    if not model or len(model) > MAX_NAME_LENGTH or not model.isprintable():
        raise ModelNotFound(clip(model) or "''", "an id looks like 'owner/name'")
    return model


async def _read_request(
    request: Request, model: str | None, services: Services, deadline: Deadline
) -> UnresolvedRequest:
    settings = services.settings
    body = await read_body(request, settings.max_body, timeout_s=settings.body_timeout_s)
    lora = _lora_header(request.headers)
    if is_image(body) or (_says_image(request.headers) and not body.lstrip().startswith(b"{")):
        decoding = services.decoder.image(EncodedPicture("body", body))
        image = await run_until_disconnect(request, decoding, deadline=deadline)
        return UnresolvedRequest(prompt="", model=model, adapters=_adapters(lora, Parameters()), image=image)
    value = await read_json(body, max_bytes=settings.max_json, pictures=("image", "inputs"))
    asked = validate_model(InferenceBody, value)
    parameters = asked.parameters or Parameters()
    adapters = _adapters(lora, parameters)
    prompt, encoded = _prompt_and_image(asked, parameters)
    _check_one_image(parameters)
    if encoded is None:
        return _unresolved(parameters, prompt, model, adapters, None)
    decoding = services.decoder.image(EncodedPicture("image" if asked.image is not None else "inputs", encoded))
    image = await run_until_disconnect(request, decoding, deadline=deadline)
    return _unresolved(parameters, prompt, model, adapters, image)


def _says_image(headers: Headers) -> bool:
    return headers.get("content-type", "").lower().startswith("image/")


def _lora_header(headers: Headers) -> str | None:
    """Return the adapter id of the `lora` header, empty for none, None where the header is absent."""
    values = headers.getlist("lora")
    if len(values) > 1:
        raise MalformedRequest("the header 'lora' is given more than once; name several adapters in 'loras'")
    value = values[0].strip() if values else None
    if value and len(value) > MAX_NAME_LENGTH:
        raise OutOfBounds("lora", f"{len(value)} characters long", f"at most {MAX_NAME_LENGTH} characters")
    return value


def _adapters(header: str | None, parameters: Parameters) -> tuple[AdapterRef, ...]:
    single = header if header is not None else (parameters.lora_adapter or "").strip()
    if not parameters.loras:
        return (AdapterRef(single),) if single else ()
    if single:
        where = "the header 'lora'" if header else "'lora_adapter'"
        raise MalformedRequest(f"adapters are named both by {where} and by 'loras'; put them all in 'loras'")
    return tuple(entry.ref() for entry in parameters.loras)


def _prompt_and_image(asked: InferenceBody, parameters: Parameters) -> tuple[str, str | None]:
    """Return the prompt and the picture's base64: `inputs` is the picture where the prompt is elsewhere."""
    if asked.image is not None:
        if asked.inputs and parameters.prompt is not None:
            raise MalformedRequest("beside 'image' the prompt is 'inputs' or 'parameters.prompt', not both")
        return (asked.inputs or "") if parameters.prompt is None else parameters.prompt, asked.image
    if asked.inputs is None:
        raise MalformedRequest('\'inputs\' is missing: send {"inputs": "a prompt"}')
    if parameters.prompt is not None or is_base64_image(asked.inputs):
        return parameters.prompt or "", asked.inputs
    return asked.inputs, None


def _check_one_image(parameters: Parameters) -> None:
    if parameters.num_images_per_prompt not in (None, 1):
        raise OutOfBounds(
            "num_images_per_prompt",
            parameters.num_images_per_prompt,
            "1 here, where the reply is one raw image; POST /v1/images/generations with 'n' draws several",
        )


def _unresolved(
    parameters: Parameters,
    prompt: str,
    model: str | None,
    adapters: tuple[AdapterRef, ...],
    image: PixelImage | None,
) -> UnresolvedRequest:
    width, height = _size(parameters, image)
    return UnresolvedRequest(
        prompt=prompt,
        model=model,
        adapters=adapters,
        negative_prompt=parameters.negative_prompt,
        width=width,
        height=height,
        steps=parameters.num_inference_steps,
        guidance_scale=parameters.guidance_scale,
        scheduler=parameters.scheduler,
        seed=parameters.seed,
        image=image,
        strength=parameters.strength,
        options=parameters.options(),
        scheduler_options=parameters.sorted_scheduler_options(),
        prompt_syntax=parameters.prompt_syntax,
    )


def _size(parameters: Parameters, image: PixelImage | None) -> tuple[int | None, int | None]:
    size = parameters.target_size
    if image is None:
        for name, value in (("strength", parameters.strength), ("target_size", size)):
            if value is not None:
                raise MalformedRequest(f"'{name}' is for image-to-image, and the request has no image")
    if size is None:
        return parameters.width, parameters.height
    if parameters.width is not None or parameters.height is not None:
        raise MalformedRequest("the output's size is either 'target_size' or 'width' and 'height', not both")
    return size.width, size.height
