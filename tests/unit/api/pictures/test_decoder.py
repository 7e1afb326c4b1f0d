"""Pictures are decoded in processes that can be ended, and that know nothing of the service."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import sys
from collections.abc import Iterator

import psutil
import pytest
from PIL import Image

from serve_app.api.pictures.decoder import EncodedPicture, PictureDecoder
from serve_app.api.pictures.images import encode_image
from serve_app.errors import MalformedRequest, TooLarge
from tests.unit.api.fakes import gradient
from tests.unit.api.pictures.test_structure import with_scans

PICTURE = gradient(40, 24)
PNG = encode_image(PICTURE, "png")


@pytest.fixture
def decoder() -> Iterator[PictureDecoder]:
    made = PictureDecoder(max_pixels=10_000, limit_s=1.0)
    yield made
    made.close()


def children() -> set[psutil.Process]:
    return {child for child in psutil.Process().children() if "pictures.child" in " ".join(child.cmdline())}


async def test_a_picture_is_the_same_as_bytes_and_as_base64(decoder: PictureDecoder) -> None:
    text = base64.b64encode(PNG).decode()
    for content in (PNG, text, f"data:image/png;base64,{text}"):
        assert await decoder.image(EncodedPicture("image", content)) == PICTURE


async def test_refusals_come_back_from_the_process_as_they_are(decoder: PictureDecoder) -> None:
    refused = {b"no picture": "not a readable PNG", with_scans(250): "over 32 scans", "!!": "not a picture in base64"}
    for content, sentence in refused.items():
        with pytest.raises(MalformedRequest, match=sentence):
            await decoder.image(EncodedPicture("body", content))
    with pytest.raises(TooLarge, match="10000 pixels"):
        await decoder.image(EncodedPicture("body", encode_image(gradient(200, 100), "png")))
    with pytest.raises(MalformedRequest, match="no transparent pixel"):
        await decoder.mask(EncodedPicture("mask", PNG))


async def test_a_picture_that_takes_too_long_ends_its_process_and_no_other_picture(decoder: PictureDecoder) -> None:
    # A comment of a GIF in pieces of one byte each: seconds in the parser, and no end before the pixels.
    endless = b"GIF89a\x08\x00\x08\x00\x00\x00\x00\x21\xfe" + b"\x01a" * 12_000_000
    before = children()
    with pytest.raises(TooLarge, match="1 s of computing"):
        await decoder.image(EncodedPicture("body", endless))
    assert children() == before
    assert await decoder.image(EncodedPicture("body", PNG)) == PICTURE


async def test_a_process_that_the_system_ended_meanwhile_costs_nobody_a_picture(decoder: PictureDecoder) -> None:
    before = children()
    await decoder.image(EncodedPicture("body", PNG))
    (child,) = children() - before
    child.kill()
    while child.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110 - to wait for a process is its parent's
        await asyncio.sleep(0.01)
    assert await decoder.image(EncodedPicture("body", PNG)) == PICTURE


async def test_a_caller_who_leaves_ends_the_process_that_works_for_it(decoder: PictureDecoder) -> None:
    before = children()
    await decoder.image(EncodedPicture("body", PNG))
    (child,) = children() - before
    os.kill(child.pid, signal.SIGSTOP)
    waiting = asyncio.ensure_future(decoder.image(EncodedPicture("body", PNG)))
    async with asyncio.timeout(60):
        while decoder._idle:  # noqa: ASYNC110 - until a thread has given the held process the picture
            await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    child.wait(60)
    assert await decoder.image(EncodedPicture("body", PNG)) == PICTURE


async def test_the_process_has_limits_a_low_priority_and_nothing_of_our_environment(
    decoder: PictureDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_children")
    before = children()
    await decoder.image(EncodedPicture("body", PNG))
    (child,) = children() - before
    for limit in (psutil.RLIMIT_AS, psutil.RLIMIT_CPU):
        assert child.rlimit(limit)[0] != psutil.RLIM_INFINITY
    assert child.nice() > psutil.Process().nice()
    assert "HF_TOKEN" not in child.environ()


async def test_a_picture_has_no_more_memory_than_its_pixels_ask_for() -> None:
    # As if the limit on pixels had a hole: 144 million, in a process that has memory for one.
    narrow = PictureDecoder(max_pixels=1, limit_s=60.0)
    buffer = io.BytesIO()
    Image.new("L", (12_000, 12_000)).save(buffer, "PNG")
    await narrow.image(EncodedPicture("body", encode_image(gradient(1, 1), "png")))
    narrow._max_pixels = 200_000_000
    try:
        with pytest.raises((TooLarge, MalformedRequest)):
            await narrow.image(EncodedPicture("body", buffer.getvalue()))
    finally:
        narrow.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux is told what to return")
@pytest.mark.timeout(30)
async def test_what_a_large_picture_took_goes_back_to_the_system(decoder: PictureDecoder) -> None:
    before = children()
    await decoder.image(EncodedPicture("body", PNG))
    (child,) = children() - before
    small = child.memory_info().rss
    text = base64.b64encode(bytes(16 * 1024**2)).decode()
    for _ in range(3):
        with pytest.raises(MalformedRequest, match="not a readable"):
            await decoder.image(EncodedPicture("body", text))
    # It answers first, and then lets go.
    while child.memory_info().rss - small > 8 * 1024**2:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.01)
