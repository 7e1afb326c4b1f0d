"""Images leave a replica as files."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from serve_app.api.pictures.images import encode_image
from serve_app.core import (
    AdapterSpec,
    EncodedImage,
    Encoding,
    GenerationResult,
    HubToken,
    ImageFormat,
    PipelineOptions,
    PixelImage,
    ScaledAdapter,
    Scales,
    Timings,
)
from serve_app.deployments.replica.encoding import encode_result
from tests.engine_cases import request

PIXELS = bytes(range(192)) * 256
IMAGE = PixelImage(128, 128, PIXELS)
RESULT = GenerationResult("r", "b", (IMAGE, IMAGE), (1, 2), (), Timings(denoise_ms=3.0), 0.1, "cpu", 2)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
async def test_images_are_encoded_as_the_request_says_and_the_ingress_passes_them_on(form: ImageFormat) -> None:
    encoding = Encoding(form, None if form == "png" else 80)
    result = await encode_result(RESULT, request(encoding=encoding), scheduler="Euler", digests=None)
    assert (result.seeds, result.timings.denoise_ms, result.timings.encode_ms > 0) == ((1, 2), 3.0, True)
    for image in result.images:
        assert isinstance(image, EncodedImage)
        assert image.content == encode_image(IMAGE, form, quality=encoding.quality)
        assert encode_image(image, form, quality=encoding.quality) is image.content
        picture = Image.open(io.BytesIO(image.content))
        assert (picture.format, picture.size) == (form.upper(), (128, 128))


async def test_a_request_without_an_encoding_gets_pixels() -> None:
    assert await encode_result(RESULT, request(), scheduler="Euler", digests=[]) is RESULT


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
async def test_a_png_says_how_it_was_drawn_and_keeps_its_pixels(form: ImageFormat) -> None:
    spec = AdapterSpec("secret/target", "b", "0" * 40, "f.safetensors", "folder", "/home/secret/f", 10)
    asked = request(
        prompt='a cat, "red"\n\ud800é\0',
        negative_prompt="a dog",
        adapters=(ScaledAdapter(spec, 0.8, "our style"), ScaledAdapter(spec, Scales(1.0, 0.5), "x/y")),
        options=PipelineOptions(clip_skip=1, sigmas=(0.5, 0.1)),
        scheduler_options=(("shift", 3.0),),
        prompt_syntax="a1111",
        encoding=Encoding(form),
        hub_token=HubToken("hf_secret"),
    )
    images = (await encode_result(RESULT, asked, scheduler="Euler a", digests=["ab" * 32, "cd" * 32])).images
    plain = (await encode_result(RESULT, asked, scheduler="Euler a", digests=None)).images
    for image, bare, seed in zip(images, plain, RESULT.seeds, strict=True):
        assert isinstance(image, EncodedImage)
        assert isinstance(bare, EncodedImage)
        drawn, without = Image.open(io.BytesIO(image.content)), Image.open(io.BytesIO(bare.content))
        assert drawn.tobytes() == without.tobytes()
        assert b"secret" not in image.content
        assert "parameters" not in without.info
        if form != "png":
            assert "parameters" not in drawn.info
            continue
        prompt, second, negative, last = drawn.info["parameters"].split("\n")
        assert (prompt, second, negative) == ('a cat, "red"', "?é ", "Negative prompt: a dog")
        assert last.startswith(
            f"Steps: 3, Sampler: Euler a, CFG scale: 4, Seed: {seed}, Size: 64x64, Model: tiny/base, Clip skip: 2, "
            'Lora hashes: "our style: abababababab, x/y: cdcdcdcdcdcd", Adapters: "'
        )
        assert last.endswith(", Prompt syntax: a1111, Version: Loraplex")
        adapters, options = (
            json.loads(json.loads(last.partition(before)[2].partition(after)[0]))
            for before, after in (("Adapters: ", ", Options"), ("Options: ", ", Prompt"))
        )
        assert options == {"shift": 3.0, "sigmas": [0.5, 0.1]}
        assert adapters[0] == {"id": "our style", "scale": 0.8, "digest": "ab" * 32}
        assert adapters[1]["scale"] == {"denoiser": 1.0, "text_encoder": 0.5}
