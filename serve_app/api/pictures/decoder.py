"""Decoding pictures in processes of their own, which can be ended.

Owns those processes: how many there are, what one picture may take, and that a picture whose caller has left is not
decoded to its end. Must not know formats or routes.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import finalize

from serve_app.core import PixelImage, PixelMask
from serve_app.errors import MalformedRequest, TooLarge

PROCESSES = 2
# Allocations from this size on are returned to the system when they are freed (glibc's M_MMAP_THRESHOLD, which else
# grows with what was freed).
RETURNED_FROM_BYTES = 1024**2
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from serve_app.api.pictures.child import main; main()"


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """A picture as it came: its bytes, or base64 text of them; `name` is the field, for errors."""

    name: str
    content: bytes | str


class PictureDecoder:
    """Decodes pictures, `PROCESSES` at a time, each for at most `limit_s` of a processor's time.

    A process starts with the first picture that needs it, and again after one that ended it. A caller that stops
    waiting ends the process that works for it.
    """

    def __init__(self, *, max_pixels: int, limit_s: float) -> None:
        self._max_pixels = max_pixels
        self._limit_s = limit_s
        self._idle: list[_Child] = []
        # Not asyncio's own pool: waiting for a picture must not block other work.
        self._threads = ThreadPoolExecutor(PROCESSES, thread_name_prefix="pictures")
        self.close = finalize(self, _close, self._idle, self._threads)

    async def image(self, picture: EncodedPicture) -> PixelImage:
        """Return a picture's pixels.

        Raises:
            MalformedRequest: it is not a readable picture.
            TooLarge: it has too many pixels, or takes too long.
        """
        head, pixels = await self._decoded(picture, is_mask=False)
        return PixelImage(head["width"], head["height"], pixels)

    async def mask(self, picture: EncodedPicture) -> PixelMask:
        """Return which part of a picture is to be redrawn.

        Raises:
            MalformedRequest, TooLarge: as for `image`, or nothing in it is transparent.
        """
        head, values = await self._decoded(picture, is_mask=True)
        return PixelMask(head["width"], head["height"], values)

    async def _decoded(self, picture: EncodedPicture, *, is_mask: bool) -> tuple[dict[str, Any], bytes]:
        work = _Work()
        order = {
            "name": picture.name,
            "is_base64": isinstance(picture.content, str),
            "is_mask": is_mask,
            "max_pixels": self._max_pixels,
            "limit_s": self._limit_s,
        }
        content = picture.content.encode() if isinstance(picture.content, str) else picture.content
        try:
            head, pixels = await asyncio.wrap_future(self._threads.submit(self._run, work, order, content))
        except EOFError:
            raise TooLarge(f"the work of decoding '{picture.name}'", f"{self._limit_s:g} s of computing") from None
        finally:
            work.give_up()
        if "error" in head:
            raise (TooLarge if head["error"] == "TooLarge" else MalformedRequest)(**head["fields"])
        return head, pixels

    def _run(self, work: _Work, order: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        child = self._idle.pop() if self._idle else _Child(self._max_pixels)
        if not child.is_alive:
            child = _Child(self._max_pixels)
        try:
            work.begin(child)
            answer = child.ask(order, content)
            work.end()
        except BaseException:
            child.kill()
            raise
        self._idle.append(child)
        return answer


class _Work:
    """One picture's turn: which process has it, and whether a caller still waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._is_given_up = False

    def begin(self, child: _Child) -> None:
        with self._lock:
            if self._is_given_up:
                raise EOFError
            self._child = child

    def end(self) -> None:
        with self._lock:
            self._child = None

    def give_up(self) -> None:
        """End the process that has it, if one has."""
        with self._lock:
            self._is_given_up = True
            if self._child is not None:
                self._child.kill()


class _Child:
    """A process and its two pipes."""

    def __init__(self, max_pixels: int) -> None:
        command = [sys.executable, "-W", "ignore", "-c", _BOOT, json.dumps(sys.path), str(max_pixels)]
        # Nothing of our environment: it holds the Hub's token. The memory of a picture goes back to the system.
        environment = {"MALLOC_MMAP_THRESHOLD_": str(RETURNED_FROM_BYTES)}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def ask(self, order: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        """Return its answer.

        Raises:
            EOFError: it ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({**order, "size_bytes": len(content)}).encode() + b"\n")
            self._process.stdin.write(content)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EOFError from None
        line = self._process.stdout.readline()
        head: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {"size_bytes": -1}
        answer = self._process.stdout.read(max(0, head["size_bytes"]))
        if len(answer) != head.pop("size_bytes"):
            raise EOFError
        return head, answer

    @property
    def is_alive(self) -> bool:
        """Whether it still runs: the system may have ended it."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it at once, even in the middle of a picture."""
        self._process.kill()
        self._process.wait()


def _close(idle: list[_Child], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    while idle:
        idle.pop().kill()
