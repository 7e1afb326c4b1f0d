from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image

from serve_app.api.pictures.structure import MAX_PADDING_BYTES, MAX_SCANS, TooIntricate, check_structure


def jpeg(*, progressive: bool = True, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(buffer, "JPEG", progressive=progressive)
    return buffer.getvalue()


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    whole = jpeg()
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * count + whole[-2:]


def with_comments(count: int) -> bytes:
    whole = jpeg()
    return whole[:2] + b"\xff\xfe\x00\x02" * count + whole[2:]


def with_padding(size_bytes: int) -> bytes:
    whole = jpeg()
    return whole[:2] + b"\xff" * size_bytes + whole[2:]


def with_chunks(count: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    whole = buffer.getvalue()
    chunk = struct.pack(">I", 0) + b"teXt" + struct.pack(">I", zlib.crc32(b"teXt"))
    return whole[:33] + chunk * count + whole[33:]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (with_scans(250), "32 scans"),
        (with_scans(MAX_SCANS + 1), "32 scans"),
        (with_comments(100_000), "1024 segments"),
        (with_padding(1_000_000), "4096 bytes of padding"),
        (b"\xff\xd8" + b"\0" * 1_000_000 + jpeg()[2:], "4096 bytes of padding"),
        (with_chunks(100_000), "4096 chunks"),
    ],
    ids=["scans", "one scan too many", "comments", "padding", "padding of zeros", "chunks"],
)
def test_a_file_that_repeats_its_parts_without_end_is_refused(content: bytes, sentence: str) -> None:
    with pytest.raises(TooIntricate, match=sentence):
        check_structure(content)


@pytest.mark.parametrize(
    "content",
    [jpeg(), jpeg(progressive=False), jpeg(side=8), with_scans(10), with_comments(50),
     with_padding(MAX_PADDING_BYTES // 2), with_chunks(1000), b"",
     b"\xff\xd8", b"\xff\xd8\xff\xe0", jpeg()[:100], b"GIF89a"],
)  # fmt: skip
def test_ordinary_and_damaged_files_are_left_to_the_decoder(content: bytes) -> None:
    check_structure(content)
