"""Replies of the OpenAI images shape: all images at once, or event by event.

Owns the turn from a result, or from the events of a stream, to what is written. Must not know how requests are read.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, replace

from serve_app.api.http.events import PROGRESS, STARTING, ServerEvent
from serve_app.api.openai.schemas import (
    AdapterReport,
    CompletedEvent,
    EventKind,
    ImageData,
    ImageGeneration,
    ImagesReply,
    PartialImageEvent,
    ProgressEvent,
    Report,
    StartingEvent,
)
from serve_app.api.pictures.images import encode_image, off_loop, pixels_of, resized
from serve_app.core import (
    Accepted,
    EncodedImage,
    Encoding,
    GenerationEvent,
    GenerationResult,
    ImageFormat,
    PixelImage,
    Preview,
    Progress,
    Starting,
)
from serve_app.errors import OutOfBounds

# This family's names of a request's fields.
_OWN_NAMES = {"num_images_per_prompt": "n", "width": "size", "height": "size", "width x height": "size"}


@contextmanager
def own_names() -> Iterator[None]:
    """Name what is out of bounds as this family does."""
    try:
        yield
    except OutOfBounds as error:
        raise OutOfBounds(_OWN_NAMES.get(error.name, error.name), error.value, error.limit) from None


def images_reply(asked: ImageGeneration, result: GenerationResult, created: int) -> str:
    """Return the JSON of a finished request; encodes images, so call it in a thread."""
    reply = ImagesReply(
        created=created,
        data=[_data(_encoded(image, asked), asked) for image in result.images],
        output_format=_format(asked),
        size=_size(result.images[0]),
        loraplex=_report(result),
    )
    return reply.model_dump_json(exclude_none=True)


def _data(encoded: str, asked: ImageGeneration) -> ImageData:
    if asked.has_urls:
        return ImageData(url=f"data:image/{_format(asked)};base64,{encoded}")
    return ImageData(b64_json=encoded)


async def event_replies(
    events: AsyncGenerator[GenerationEvent],
    accepted: Accepted,
    asked: ImageGeneration,
    kind: EventKind,
    now: Callable[[], float],
    warnings: tuple[str, ...],
) -> AsyncGenerator[ServerEvent]:
    """Yield what is written of a stream whose first event was `accepted`; `now` is in seconds since 1970, `warnings`
    what the request alone gave rise to."""
    with own_names():
        async with aclosing(events):
            yield _event(ProgressEvent(type=f"{kind}.{PROGRESS}", queue_position=None, step=0, steps=accepted.steps))
            async for event in events:
                if isinstance(event, Progress):
                    yield _event(ProgressEvent(type=f"{kind}.{PROGRESS}", **asdict(event)))
                elif isinstance(event, Starting):
                    yield _event(_starting(event, accepted, kind))
                elif isinstance(event, Preview):
                    pixels = accepted.width * accepted.height
                    yield await off_loop(pixels, _preview, event, accepted, asked, kind, int(now()))
                elif isinstance(event, GenerationResult):
                    event = replace(event, warnings=(*warnings, *event.warnings))
                    for index in range(len(event.images)):
                        pixels = pixels_of(event.images[index])
                        yield await off_loop(pixels, _completed, event, index, asked, kind, int(now()))


def _starting(event: Starting, accepted: Accepted, kind: EventKind) -> StartingEvent:
    return StartingEvent(
        type=f"{kind}.{STARTING}",
        base_model=accepted.base_id,
        state="starting" if event.has_room else "waiting",
        expected_s=None if event.expected_s is None else round(event.expected_s, 1),
    )


def _preview(event: Preview, accepted: Accepted, asked: ImageGeneration, kind: EventKind, created: int) -> ServerEvent:
    image = resized(event.image, accepted.width, accepted.height)
    return _event(
        PartialImageEvent(
            type=f"{kind}.partial_image",
            b64_json=_encoded(image, asked),
            created_at=created,
            size=_size(image),
            quality=_quality(asked),
            output_format=_format(asked),
            partial_image_index=event.index,
            image_index=event.image_index,
        )
    )


def _completed(
    result: GenerationResult, index: int, asked: ImageGeneration, kind: EventKind, created: int
) -> ServerEvent:
    image = result.images[index]
    return _event(
        CompletedEvent(
            type=f"{kind}.completed",
            b64_json=_encoded(image, asked),
            created_at=created,
            size=_size(image),
            quality=_quality(asked),
            output_format=_format(asked),
            image_index=index,
            loraplex=_report(result),
        )
    )


def _event(event: StartingEvent | ProgressEvent | PartialImageEvent | CompletedEvent) -> ServerEvent:
    return ServerEvent(event.type, event.model_dump_json())


def encoding_of(asked: ImageGeneration) -> Encoding:
    """Return how the images of a reply are encoded."""
    return Encoding(_format(asked), asked.output_compression)


def _encoded(image: PixelImage | EncodedImage, asked: ImageGeneration) -> str:
    return base64.b64encode(encode_image(image, _format(asked), quality=asked.output_compression)).decode()


def _format(asked: ImageGeneration) -> ImageFormat:
    return asked.output_format or "png"


def _quality(asked: ImageGeneration) -> str:
    """Return the quality in the words that events know."""
    return asked.quality if asked.quality in ("low", "medium", "high") else "auto"


def _size(image: PixelImage | EncodedImage) -> str:
    return f"{image.width}x{image.height}"


def _report(result: GenerationResult) -> Report:
    return Report(
        seed=result.seeds[0],
        base_model=result.base_id,
        adapters=[AdapterReport(**asdict(adapter)) for adapter in result.adapters],
        timing_ms={name.removesuffix("_ms"): value for name, value in asdict(result.timings).items()},
        warnings=list(result.warnings),
    )
