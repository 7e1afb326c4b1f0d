"""What one connection may take of the proxy: a bound on the head of a request, and on how long a reader may stall.

Owns what Serve's HTTP server leaves open: it gathers a header line whole, however long it is, in time that grows with
the square of its length; and it waits for ever on a caller who takes a reply's first bytes and no more. Runs inside the
proxy, so it knows no configuration and no Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import config as uvicorn_config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve_app.errors import HeadersTooLarge

log = logging.getLogger(__name__)

# More than `MAX_HEAD_BYTES` of the HTTP face, whose reply names the very limit: this only keeps what comes bounded. It
# also covers what of a body came with its head.
MAX_UNREAD_HEAD_BYTES = 512 * 1024
# A reader that takes nothing for so long has left.
READER_PATIENCE_S = 60.0


class BoundedHeadProtocol(HttpToolsProtocol):
    """Uvicorn's protocol; a request whose head does not end is answered with 431 and the connection closed."""

    _head_bytes: int | None = 0

    def data_received(self, data: bytes) -> None:
        """Take what has come, unless too much of one head has."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_UNREAD_HEAD_BYTES:
                self._refuse()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Count a new head."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Count no further: what follows is a body."""
        self._head_bytes = None
        super().on_headers_complete()

    def _refuse(self) -> None:
        if self.transport.is_closing():
            return
        error = HeadersTooLarge(self._head_bytes or 0, MAX_UNREAD_HEAD_BYTES)
        content = json.dumps({"error": str(error), "code": error.code}).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
        self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\n" + head.encode() + content)
        self.transport.close()


def bound_heads() -> None:
    """Have uvicorn's servers that start in this process from now on bound the heads of requests."""
    protocols: dict[str, Any] = uvicorn_config.HTTP_PROTOCOLS
    protocols["auto"] = f"{__name__}:{BoundedHeadProtocol.__name__}"


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
