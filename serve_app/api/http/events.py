"""Server-sent events: a reply that is written as the work goes on.

Owns the framing of events, and what becomes of a failure once the status has been sent. Must not know what the events
say, but for which of them may be said again.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.api.http.error_responses import error_content
from serve_app.api.http.waiting import ClientDisconnected
from serve_app.errors import InternalError, LoraplexError

log = logging.getLogger(__name__)

# A comment, which clients pass over (HTML standard, "Server-sent events"): a proxy that sees it keeps the connection.
KEEP_ALIVE = b": keep-alive\n\n"
# The last parts of the names of events that say no more than how far the work is, and when it can begin.
PROGRESS = "progress"
STARTING = "starting"


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event: its name, and its data as one line of JSON."""

    name: str
    data: str

    def encode(self) -> bytes:
        """Return the event as it is written (the event stream format of the HTML standard)."""
        return f"event: {self.name}\ndata: {self.data}\n\n".encode()


class EventStream(Response):
    """Writes events as they come; a failure becomes the last event, as the status is long gone.

    Where nothing comes for `keep_alive_s`, a comment is written, again and again. The events are closed however the
    reply ends, so that their producer stops.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[ServerEvent], *, request_id: str, keep_alive_s: float) -> None:
        super().__init__()
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._request_id = request_id
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        # Proxies of nginx's kind would otherwise hold events back.
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the whole stream."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(_chunks(self._events, self._keep_alive_s)) as chunks:
                async for chunk in chunks:
                    await _write(send, chunk)
        except ClientDisconnected:
            log.info("request %s: the caller left its stream", self._request_id)
        except LoraplexError as error:
            log.warning("request %s: its stream ended in %s: %s", self._request_id, error.code, error)
            await _write(send, failure_event(error))
        except Exception:
            log.exception("request %s failed in its stream", self._request_id)
            await _write(send, failure_event(InternalError(self._request_id)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _chunks(events: AsyncGenerator[ServerEvent], keep_alive_s: float) -> AsyncGenerator[bytes]:
    """Yield events as they are written, and a comment after each `keep_alive_s` of silence."""
    async with aclosing(events):
        while True:
            coming = asyncio.ensure_future(anext(events, None))
            try:
                while not (await asyncio.wait({coming}, timeout=keep_alive_s))[0]:
                    yield KEEP_ALIVE
            finally:
                # Before the events are closed, which must not happen while one is awaited.
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
            event = coming.result()
            if event is None:
                return
            yield event.encode()


def failure_event(error: LoraplexError) -> bytes:
    """Return the last event of a stream that failed, as it is written."""
    return ServerEvent("error", json.dumps({"error": error_content(error)})).encode()


def refusal_event(reply: bytes) -> bytes:
    """Return the last event of a stream whose work was refused with `reply`, the JSON of a fault of its family.

    Raises:
        ValueError: it is no JSON.
    """
    return ServerEvent("error", json.dumps(json.loads(reply))).encode()


def tells_progress_alone(chunk: bytes) -> bool:
    """Whether what is written is whole events that say how far the work is, and comments, and nothing else."""
    *blocks, rest = chunk.split(b"\n\n")
    return not rest and all(_is_comment(block) or _tells_progress(block) for block in blocks)


def _is_comment(block: bytes) -> bool:
    return block.startswith(b":") and b"\n" not in block


def _tells_progress(block: bytes) -> bool:
    name, _, _ = block.partition(b"\n")
    return name.startswith(b"event: ") and name.endswith((f".{PROGRESS}".encode(), f".{STARTING}".encode()))


async def _write(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
