"""Images leave a replica as files."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from serve_app.api.pictures.images import encode_image
from serve_app.core import EncodedImage, Encoding, GenerationResult, ImageFormat, PixelImage, Timings
from serve_app.deployments.replica.replica import encode_result

PIXELS = bytes(range(192)) * 256
IMAGE = PixelImage(128, 128, PIXELS)
RESULT = GenerationResult("r", "b", (IMAGE, IMAGE), (1, 2), (), Timings(denoise_ms=3.0), 0.1, "cpu", 2)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
async def test_images_are_encoded_as_the_request_says_and_the_ingress_passes_them_on(form: ImageFormat) -> None:
    encoding = Encoding(form, None if form == "png" else 80)
    result = await encode_result(RESULT, encoding)
    assert (result.seeds, result.timings.denoise_ms, result.timings.encode_ms > 0) == ((1, 2), 3.0, True)
    for image in result.images:
        assert isinstance(image, EncodedImage)
        assert image.content == encode_image(IMAGE, form, quality=encoding.quality)
        assert encode_image(image, form, quality=encoding.quality) is image.content
        picture = Image.open(io.BytesIO(image.content))
        assert (picture.format, picture.size) == (form.upper(), (128, 128))


async def test_a_request_without_an_encoding_gets_pixels() -> None:
    assert await encode_result(RESULT, None) is RESULT
