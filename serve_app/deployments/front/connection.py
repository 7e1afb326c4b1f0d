"""Limits of one connection to the proxy: bounds on a request's head and on requests ahead of their turn, and on how
long a sender or a reader may stall.

Owns what Serve's HTTP server leaves open: it gathers a header line whole, however long it is, in time that grows with
the square of its length; it takes trailers after a body as headers; it keeps as many requests as are sent before the
first is answered; and it waits for ever on a caller who begins a head, or who takes a reply's first bytes and no more.
Runs inside the proxy, so it knows no configuration and no Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import config as uvicorn_config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve_app.errors import BodyTimeout, HeadersTooLarge, LoraplexError

log = logging.getLogger(__name__)

# More than `MAX_HEAD_BYTES` of the HTTP face, whose reply names the very limit: this only keeps what comes bounded.
MAX_UNREAD_BYTES = 512 * 1024
# Clients that send requests ahead of the answers are rare, and send a few.
MAX_REQUESTS_AHEAD = 16
HEAD_TIMEOUT_S = 30.0
# A reader that takes nothing for so long has left.
READER_PATIENCE_S = 60.0


class BoundedProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, within bounds; a connection that passes one is closed, with an answer where none has begun.

    Of `MAX_UNREAD_BYTES` in a row some must be the end of a head or a part of a body: neither a head nor what comes
    after a body may be longer.
    """

    _unread_bytes = 0
    _is_in_head = True
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come, unless too much has without a meaning."""
        self._unread_bytes += len(data)
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self._refuse(HeadersTooLarge(self._unread_bytes, MAX_UNREAD_BYTES))
            return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Begin a head; an exception here ends the connection."""
        if len(self.pipeline) >= MAX_REQUESTS_AHEAD:
            raise ValueError(f"over {MAX_REQUESTS_AHEAD} requests were sent ahead of their answers")
        if self._head_timer is None:
            self._expect_head()
        self._is_in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; a trailer could change what was decided by the headers."""
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """End a head."""
        self._stop_timer()
        self._is_in_head, self._unread_bytes = False, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._unread_bytes = 0
        super().on_body(body)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, BodyTimeout(HEAD_TIMEOUT_S))

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: LoraplexError) -> None:
        if self.transport.is_closing():
            return
        has_begun = self.cycle is not None and not self.cycle.response_complete
        if self._unread_bytes and not has_begun:
            content = json.dumps({"error": str(error), "code": error.code}).encode()
            status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"
            head = f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close"
            self.transport.write(f"{status}\r\n{head}\r\n\r\n".encode() + content)
        self.transport.close()


def bound_connections() -> None:
    """Have uvicorn's servers that start in this process from now on bound their connections."""
    protocols: dict[str, Any] = uvicorn_config.HTTP_PROTOCOLS
    protocols["auto"] = f"{__name__}:{BoundedProtocol.__name__}"


class SlowReaderMiddleware:
    """Ends a request whose caller takes nothing of the reply for `patience_s`; the work behind it ends too."""

    def __init__(self, app: ASGIApp, *, patience_s: float = READER_PATIENCE_S) -> None:
        self._app = app
        self._patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(None) as limit:

                async def send_timed(message: Message) -> None:
                    limit.reschedule(now() + self._patience_s)
                    await send(message)
                    limit.reschedule(None)

                await self._app(scope, receive, send_timed)
        except TimeoutError:
            if not limit.expired():
                raise
            # The server closes the connection of a reply that is not whole.
            log.warning("a caller took nothing of its reply for %g s; its request was ended", self._patience_s)
