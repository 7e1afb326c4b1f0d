from __future__ import annotations

import base64
import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serve_app.api.pictures.images import decode_base64, decode_image, encode_image, is_base64_image, is_image
from serve_app.core import PixelImage
from serve_app.errors import MalformedRequest, TooLarge
from tests.unit.api.fakes import gradient

PICTURE = gradient(48, 32)
PNG = encode_image(PICTURE, "png")


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_png_keeps_every_pixel() -> None:
    assert decode_image(PNG, "image", max_pixels=10_000) == PICTURE


@pytest.mark.parametrize(("form", "pillow"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_each_format_is_what_it_says_and_near_the_picture(form: str, pillow: str) -> None:
    encoded = encode_image(PICTURE, form)  # type: ignore[arg-type]
    with Image.open(io.BytesIO(encoded)) as opened:
        assert opened.format == pillow
    decoded = decode_image(encoded, "image", max_pixels=10_000)
    assert is_image(encoded)
    assert max(abs(a - b) for a, b in zip(decoded.pixels, PICTURE.pixels, strict=True)) < 24


def test_quality_makes_files_smaller() -> None:
    assert len(encode_image(PICTURE, "jpeg", quality=10)) < len(encode_image(PICTURE, "jpeg"))
    assert len(encode_image(PICTURE, "webp", quality=10)) < len(encode_image(PICTURE, "webp"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_readable_format_is_told_by_its_first_bytes(form: str) -> None:
    content = saved(Image.new("RGB", (16, 16), "red"), form)
    assert is_image(content)
    assert decode_image(content, "image", max_pixels=10_000).width == 16


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    decoded = decode_image(saved(Image.new(mode, (8, 4)), "PNG"), "image", max_pixels=10_000)
    assert decoded == PixelImage(8, 4, bytes(8 * 4 * 3))


def test_sixteen_bit_greys_keep_their_brightness() -> None:
    decoded = decode_image(saved(Image.new("I;16", (4, 4), 0x8000), "PNG"), "image", max_pixels=100)
    assert set(decoded.pixels) <= {127, 128}


def test_a_phone_picture_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    decoded = decode_image(turned, "image", max_pixels=10_000)
    assert (decoded.width, decoded.height) == (20, 40)


def png_of_size(width: int, height: int) -> bytes:
    """A few hundred bytes that claim to be a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


@pytest.mark.parametrize(("width", "height"), [(101, 100), (10_000, 10_000), (60_000, 60_000)])
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(TooLarge, match="10000 pixels"):
        decode_image(png_of_size(width, height), "image", max_pixels=10_000)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), st.data())
def test_a_damaged_picture_is_malformed_and_nothing_else(form: str, data: st.DataObject) -> None:
    content = bytearray(saved(Image.new("RGB", (24, 24), "teal"), form))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    try:
        decoded = decode_image(bytes(content[:cut]), "image", max_pixels=10_000)
    except (MalformedRequest, TooLarge):
        return
    assert len(decoded.pixels) == decoded.width * decoded.height * 3


def test_a_format_that_is_not_served_is_malformed() -> None:
    with pytest.raises(MalformedRequest, match="'image' is not a readable PNG"):
        decode_image(saved(Image.new("RGB", (8, 8)), "TIFF"), "image", max_pixels=10_000)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_base64_of_a_picture_is_told_from_a_prompt(form: str) -> None:
    encoded = base64.b64encode(saved(Image.new("RGB", (32, 32)), form)).decode()
    assert is_base64_image(encoded)


@pytest.mark.parametrize("prompt", ["", "an elephant", "/9j/", "UklGR is what a WebP file starts with", "R0lGOD" * 40])
def test_a_prompt_is_no_picture(prompt: str) -> None:
    assert not is_base64_image(prompt)


@pytest.mark.parametrize("wrap", ["{}", "data:image/png;base64,{}", "data:;base64,{}"])
def test_base64_may_be_plain_or_a_data_url(wrap: str) -> None:
    assert decode_base64(wrap.format(base64.b64encode(PNG).decode()), "image") == PNG


def test_base64_may_have_line_breaks() -> None:
    assert decode_base64(base64.encodebytes(PNG).decode(), "image") == PNG


@pytest.mark.parametrize("text", ["elephant!", "abc", "é", "data:image/png,abc", "\ud800"])
def test_what_is_not_base64_is_malformed(text: str) -> None:
    with pytest.raises(MalformedRequest, match="'image' is not a picture in base64"):
        decode_base64(text, "image")
