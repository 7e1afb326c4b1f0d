"""The process that decodes what callers send: one picture after another, under limits of memory and computing time.

Owns its side of the pipes: a line of JSON and the file's bytes in, a line of JSON and pixels out. Started by
`serve_app.api.pictures.decoder`, with nothing of the service's environment.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from typing import Any, BinaryIO

from serve_app.api.pictures.images import decode_base64, decode_image, decode_mask
from serve_app.core import PixelImage
from serve_app.errors import LoraplexError, MalformedRequest, TooLarge

NICENESS = 10
# The interpreter, the file, and what decoders need however small a picture is; and for each pixel four bytes for a
# picture, for its turned copy, for its copy without transparency, and for the reply.
BASE_BYTES, BYTES_PER_PIXEL = 256 * 1024**2, 16


def main() -> None:
    """Serve orders from standard input until it closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of a library must not reach the replies
    os.nice(NICENESS)
    _limit_memory(int(sys.argv[2]))
    while line := sys.stdin.buffer.readline():
        _serve(json.loads(line), answers)


def _serve(order: dict[str, Any], answers: BinaryIO) -> None:
    """Answer one order; afterwards nothing of its picture is left."""
    content = sys.stdin.buffer.read(order["size_bytes"])
    _limit_time(order["limit_s"])
    _answer(answers, *_decoded(order, content))


def _limit_memory(max_pixels: int) -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    most = now + BASE_BYTES + BYTES_PER_PIXEL * max_pixels
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _limit_time(limit_s: float) -> None:
    """Have the system end this process when the next picture has taken so much of a processor."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + limit_s)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _decoded(order: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    name, max_pixels = order["name"], order["max_pixels"]
    try:
        if order["is_base64"]:
            content = decode_base64(content.decode("utf-8", "replace"), name)
        if order["is_mask"]:
            mask = decode_mask(content, name, max_pixels=max_pixels)
            return {"width": mask.width, "height": mask.height}, mask.values
        image: PixelImage = decode_image(content, name, max_pixels=max_pixels)
        return {"width": image.width, "height": image.height}, image.pixels
    except (MalformedRequest, TooLarge) as error:
        return _refusal(error), b""
    except MemoryError:
        return _refusal(TooLarge(f"'{name}', unpacked,", "the memory for one picture")), b""


def _refusal(error: LoraplexError) -> dict[str, Any]:
    return {"error": type(error).__name__, "fields": error.__dict__}


def _answer(answers: BinaryIO, head: dict[str, Any], content: bytes) -> None:
    answers.write(json.dumps({**head, "size_bytes": len(content)}).encode() + b"\n")
    answers.write(content)
    answers.flush()
