"""How much a picture's file asks of its decoder, seen from its structure alone.

Owns the limits on scans, segments and chunks: a small file can repeat them so often that decoding it takes minutes.
Pure; nothing is unpacked.
"""

from __future__ import annotations

import re

# An encoder's usual script for a progressive JPEG has 10 scans; each is a pass over all of the picture.
MAX_SCANS = 32
MAX_SEGMENTS = 1024
MAX_CHUNKS = 4096
MAX_PADDING_BYTES = 4096

_PNG = b"\x89PNG\r\n\x1a\n"
# The end of a scan's coded data: a marker that is no stuffed byte and no restart.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_SCAN, _END = 0xDA, 0xD9


class TooIntricate(ValueError):
    """A file repeats some part more often than is read; the text says which."""


def check_structure(content: bytes) -> None:
    """Refuse a JPEG or PNG that repeats its parts without end; other formats are bounded by time alone.

    Raises:
        TooIntricate: it has too many scans, segments or chunks.
    """
    if content.startswith(b"\xff\xd8"):
        _check_jpeg(content)
    elif content.startswith(_PNG):
        _check_png(content)


def _check_jpeg(content: bytes) -> None:
    scans = segments = padding = 0
    position = 2
    while position + 4 <= len(content):
        found = content.find(b"\xff", position)
        if found < 0:
            return
        marker = found + 1
        while marker < len(content) and content[marker] == 0xFF and padding <= MAX_PADDING_BYTES:
            marker, padding = marker + 1, padding + 1
        padding += found - position
        segments += 1
        if padding > MAX_PADDING_BYTES:
            raise TooIntricate(f"it has over {MAX_PADDING_BYTES} bytes of padding between its segments")
        if segments > MAX_SEGMENTS:
            raise TooIntricate(f"it has over {MAX_SEGMENTS} segments")
        if marker >= len(content) or content[marker] == _END:
            return
        position = marker + 1 + int.from_bytes(content[marker + 1 : marker + 3], "big")
        if content[marker] == _SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise TooIntricate(f"it has over {MAX_SCANS} scans")
            following = _NEXT_MARKER.search(content, position)
            if following is None:
                return
            position = following.start()


def _check_png(content: bytes) -> None:
    position, chunks = len(_PNG), 0
    while position + 12 <= len(content):
        position += 12 + int.from_bytes(content[position : position + 4], "big")
        chunks += 1
        if chunks > MAX_CHUNKS:
            raise TooIntricate(f"it has over {MAX_CHUNKS} chunks")
