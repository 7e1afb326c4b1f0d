"""Images leave a replica as files, encoded beside the device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from serve_app.api.pictures.images import encode_image, off_loop, pixels_of
from serve_app.api.pictures.infotext import infotext
from serve_app.core import EncodedImage, GenerationRequest, GenerationResult


async def encode_result(
    result: GenerationResult, request: GenerationRequest, *, scheduler: str, digests: Sequence[str] | None
) -> GenerationResult:
    """Return a result with its images as files, or as it is where the request asks for pixels.

    `scheduler` is the one that drew, `digests` are those of the adapters; None for files that say nothing of these.
    """
    encoding = request.encoding
    if encoding is None:
        return result

    def encode() -> tuple[EncodedImage, ...]:
        found: list[EncodedImage] = []
        for image, seed in zip(result.images, result.seeds, strict=True):
            text = None if digests is None else infotext(request, seed=seed, scheduler=scheduler, digests=digests)
            content = encode_image(image, encoding.form, quality=encoding.quality, text=text)
            found.append(EncodedImage(image.width, image.height, encoding, content))
        return tuple(found)

    began_s = time.monotonic()
    images = await off_loop(pixels_of(*result.images), encode)
    timings = dataclasses.replace(result.timings, encode_ms=(time.monotonic() - began_s) * 1e3)
    return dataclasses.replace(result, images=images, timings=timings)
