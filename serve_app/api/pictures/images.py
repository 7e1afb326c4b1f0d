"""Pictures on the wire: PNG, JPEG and WebP to pixels and back.

Owns decoding under a pixel limit and encoding. Everything here blocks: encoding is called through `off_loop`, and
decoding in the process of `serve_app.api.pictures.child`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from serve_app.api.pictures.infotext import INFOTEXT
from serve_app.api.pictures.structure import TooIntricate, check_structure
from serve_app.core import EncodedImage, Encoding, ImageFormat, PixelImage, PixelMask
from serve_app.errors import MalformedRequest, TooLarge

P = ParamSpec("P")
T = TypeVar("T")

# Up to here, encoding takes less time (0.3 ms) than the way to a thread and back does on a busy machine (1 ms).
SMALL_PIXELS = 128 * 128
JPEG_QUALITY = 92
WEBP_QUALITY = 90
# Level 1 took 60% of the time of the default 6, for an eighth more bytes, on a noisy picture of 1024x1024.
PNG_COMPRESS_LEVEL = 1

# Every parser is attack surface: only what callers really send.
_READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_BASE64_SIGNATURES = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")
_DATA_URL = re.compile(r"data:[\w/+.-]*;base64,", re.ASCII)
_WHITESPACE = str.maketrans("", "", " \t\r\n")
# Errors that Pillow's parsers raise on damaged files.
_DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    NotImplementedError, struct.error, zlib.error,
)  # fmt: skip


async def off_loop(pixels: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call what takes its time for each pixel: in a thread, unless there are so few that a thread would take longer."""
    if pixels <= SMALL_PIXELS:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


def pixels_of(*images: PixelImage | EncodedImage) -> int:
    """Return how many pixels pictures have together."""
    return sum(image.width * image.height for image in images)


def is_image(content: bytes) -> bool:
    """Whether bytes begin as a readable picture does."""
    if content.startswith(b"RIFF"):
        return content[8:12] == b"WEBP"
    return content.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")) or (
        content.startswith(b"BM") and content[6:10] == b"\0\0\0\0"
    )


def is_base64_image(text: str) -> bool:
    """Whether a string is a picture in base64, not a prompt: no prompt decodes to a picture's signature."""
    if text.startswith("data:image/"):
        return True
    if not text.startswith(_BASE64_SIGNATURES) or len(text) < 48:
        return False
    try:
        return is_image(base64.b64decode(text[:48], validate=True))
    except binascii.Error:
        return False


def decode_base64(text: str, name: str) -> bytes:
    """Return the bytes of base64 text, plain or as a data URL; `name` is the field, for the error.

    Raises:
        MalformedRequest: it is not base64.
    """
    prefix = _DATA_URL.match(text)
    encoded = text[prefix.end() :] if prefix else text
    try:
        return base64.b64decode(encoded.translate(_WHITESPACE), validate=True)
    except (binascii.Error, ValueError):
        raise MalformedRequest(f"'{name}' is not a picture in base64") from None


def decode_image(content: bytes, name: str, *, max_pixels: int) -> PixelImage:
    """Return the first frame of a picture as RGB, turned as its EXIF orientation says, without transparency.

    The size in the file's header is checked before a pixel is decoded. `name` is the field, for the error.

    Raises:
        MalformedRequest: it is not a readable picture.
        TooLarge: it has more than `max_pixels` pixels.
    """
    with _opened(content, name, max_pixels) as picture:
        rgb = _to_rgb(ImageOps.exif_transpose(picture))
        return PixelImage(rgb.width, rgb.height, rgb.tobytes())


def decode_mask(content: bytes, name: str, *, max_pixels: int) -> PixelMask:
    """Return which part of a picture is to be redrawn: where the mask is transparent.

    Raises:
        MalformedRequest: it is not a readable picture, or nothing in it is transparent.
        TooLarge: it has more than `max_pixels` pixels.
    """
    with _opened(content, name, max_pixels) as picture:
        alpha = ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")
        mask = ImageOps.invert(alpha)
    if mask.getextrema() == (0, 0):
        raise MalformedRequest(f"'{name}' has no transparent pixel: the transparent part is what is redrawn")
    return PixelMask(mask.width, mask.height, mask.tobytes())


def resized(image: PixelImage, width: int, height: int) -> PixelImage:
    """Return a picture at another size."""
    picture = Image.frombytes("RGB", (image.width, image.height), image.pixels)
    return PixelImage(width, height, picture.resize((width, height), Image.Resampling.BICUBIC).tobytes())


def thumbnail(image: PixelImage, side: int) -> bytes:
    """Return a picture as WebP, as large as fits in a square of `side` pixels."""
    picture = Image.frombytes("RGB", (image.width, image.height), image.pixels)
    picture.thumbnail((side, side))
    return encode_image(PixelImage(picture.width, picture.height, picture.tobytes()), "webp")


@contextmanager
def _opened(content: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    try:
        check_structure(content)
        with Image.open(io.BytesIO(content), formats=_READABLE) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise TooLarge(f"'{name}', {width}x{height} pixels,", f"{max_pixels} pixels")
            yield picture
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"'{name}'", f"{max_pixels} pixels") from None
    except TooIntricate as error:
        raise MalformedRequest(f"'{name}' is not read: {error}") from None
    except _DAMAGED:
        raise MalformedRequest(f"'{name}' is not a readable PNG, JPEG, WebP, GIF or BMP picture") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # Pillow clips 16-bit greys at 255 instead of scaling them.
        picture = picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return picture.convert("RGB")


def encode_image(
    image: PixelImage | EncodedImage, form: ImageFormat, *, quality: int | None = None, text: str | None = None
) -> bytes:
    """Return a picture in a file format; `quality` (0 to 100) applies to JPEG and WebP, `text` goes into a PNG.

    One that a replica has encoded already is returned as it is.
    """
    if isinstance(image, EncodedImage):
        assert image.encoding == Encoding(form, quality), "a replica encodes as the request says"
        return image.content
    picture = Image.frombytes("RGB", (image.width, image.height), image.pixels)
    buffer = io.BytesIO()
    if form == "png":
        picture.save(buffer, "PNG", compress_level=PNG_COMPRESS_LEVEL, pnginfo=_with_text(text))
    elif form == "webp":
        picture.save(buffer, "WEBP", quality=WEBP_QUALITY if quality is None else quality)
    else:
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY if quality is None else quality, subsampling=0)
    return buffer.getvalue()


def _with_text(text: str | None) -> PngInfo | None:
    if text is None:
        return None
    info = PngInfo()
    # Neither halves of characters nor an early end: JSON may hold both.
    info.add_text(INFOTEXT, text.replace("\0", " ").encode("utf-8", "replace").decode())
    return info
