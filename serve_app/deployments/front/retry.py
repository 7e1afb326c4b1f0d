"""A request whose ingress replica is lost: sent again to another, or refused as the contract says.

Owns what Serve's proxy leaves open: where the replica that it chose dies, it answers with a bare 500, even if the
request has time left and other replicas run. Runs inside the proxy, so it knows no configuration and no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.http.error_responses import error_response
from serve_app.api.http.events import EventStream, failure_event, refusal_event, tells_progress_alone
from serve_app.api.http.waiting import AGE_HEADER, SEED_HEADER
from serve_app.deployments.front.own_routes import as_own
from serve_app.errors import IngressLost, InternalError, LoraplexError

log = logging.getLogger(__name__)

Outcome = Literal["resent", "refused", "cut"]

MAX_RESENDS = 3
# Before the first resend, and twice as long before each that follows: Serve drops a dead replica within milliseconds.
BACKOFF_S = 0.1
# Bodies are kept for as long as their requests are open: one, and all of a proxy.
MAX_KEPT_BYTES = 64 * 1024**2
MAX_ALL_KEPT_BYTES = 256 * 1024**2
# A body is handed on in pieces of this size, or what has come after so long: each piece costs Serve a call between
# processes, so that a caller who sends byte by byte would cost far more than its bytes.
PIECE_BYTES = 1024**2
GATHER_S = 5.0
# Serve's own paths, which no application answers.
_SERVE_S_OWN = "/-/"
# Not DELETE: a removal that is sent a second time is told that nothing was there.
_RESENT = frozenset(("GET", "HEAD", "POST"))
_REQUEST_ID = "x-request-id"
_SEED = "x-seed"
# On every reply of the application, on none of Serve's.
_MARK = "access-control-expose-headers"


class RetryMiddleware:
    """Repeats a request whose ingress replica died before a byte of the answer was passed on; of a stream, before
    anything but progress was.

    At most `MAX_RESENDS` times, with the same id, the seed that a stream has told, and only what was kept of its body:
    no caller sees an image drawn twice. A request that cannot be repeated is answered with the contract's 503, a stream
    that had begun with an error event.
    """

    def __init__(self, app: ASGIApp, on_loss: Callable[[Outcome], None], *, backoff_s: float = BACKOFF_S) -> None:
        self._app = app
        self._on_loss = on_loss
        self._backoff_s = backoff_s
        self.budget = BufferBudget(MAX_ALL_KEPT_BYTES)
        self._has_served = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["path"].startswith(_SERVE_S_OWN):
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        request_id = headers.setdefault(_REQUEST_ID, str(uuid.uuid4()))
        caller = BufferedRequest(receive, self.budget)
        try:
            await self._answered(scope, caller, send, request_id)
        finally:
            caller.forget()

    async def _answered(self, scope: Scope, caller: BufferedRequest, send: Send, request_id: str) -> None:
        began = time.monotonic()
        answer = ClientResponse(send)
        for attempt in range(1, MAX_RESENDS + 2):
            answer.begin(is_new=not self._has_served)
            again = _attempt(scope, attempt, time.monotonic() - began, answer.seed)
            fault = await self._try(again, caller, answer, request_id)
            self._has_served |= answer.has_begun
            if answer.is_complete or caller.is_gone:
                return
            can_repeat = scope["method"] in _RESENT and caller.is_kept and answer.can_begin_again
            if fault or attempt > MAX_RESENDS or not can_repeat:
                await self._give_up(scope, answer, fault or IngressLost(attempt), request_id)
                return
            if answer.is_too_early:
                log.info("request %s came before Serve had a route to its application, sent again", request_id)
            else:
                log.warning("request %s lost its ingress replica (attempt %d), sent again", request_id, attempt)
                self._on_loss("resent")
            await asyncio.sleep(self._backoff_s * 2 ** (attempt - 1))

    async def _try(
        self, scope: Scope, caller: BufferedRequest, answer: ClientResponse, request_id: str
    ) -> LoraplexError | None:
        """Send the request once; return what to tell the caller where the proxy itself failed."""
        try:
            await self._app(scope, caller.replay(), answer.send)
        except Exception:
            log.exception("request %s failed in the proxy", request_id)
            return InternalError(request_id)
        return None

    async def _give_up(self, scope: Scope, answer: ClientResponse, error: LoraplexError, request_id: str) -> None:
        if answer.has_begun:
            log.warning("request %s: its answer broke off: %s", request_id, error.code)
            self._on_loss("cut")
            if answer.is_stream:
                await answer.end_with(failure_event(error))
            # Else nothing: the server closes the connection, which tells the caller that the rest is missing.
            return
        log.warning("request %s: %s: %s", request_id, error.code, error)
        self._on_loss("refused")
        response = error_response(as_own(scope), error)
        response.headers[_REQUEST_ID] = request_id
        response.headers[_MARK] = _REQUEST_ID
        await response(scope, _nothing_more, answer.forward)


@dataclass
class BufferBudget:
    """How many bytes of bodies may still be kept."""

    left_bytes: int


@dataclass
class BufferedRequest:
    """A caller's request, kept so that it can be sent again; past its budget it is passed on and not kept."""

    receive: Receive
    budget: BufferBudget
    is_gone: bool = False
    is_kept: bool = True
    _messages: list[Message] = field(default_factory=list[Message])
    # The part of the next message that has arrived.
    _pieces: list[bytes] = field(default_factory=list[bytes])
    _kept_bytes: int = 0

    def replay(self) -> Receive:
        """Return the way to the caller's messages, the kept ones first."""
        position = 0

        async def receive() -> Message:
            nonlocal position
            if position < len(self._messages):
                position += 1
                return self._messages[position - 1]
            message = await self._gathered()
            if message["type"] == "http.disconnect":
                self.is_gone = True
            elif self.is_kept:
                self._keep(message)
                position += 1
            return message

        return receive

    def forget(self) -> None:
        """Give its bytes back to the budget."""
        self.budget.left_bytes += self._kept_bytes
        self._kept_bytes = 0
        self._messages.clear()

    async def _gathered(self) -> Message:
        """Return what comes next, pieces of a body as one; where the wait is cancelled, what has come is not lost."""
        message: Message = {"type": "http.request", "more_body": True}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as limit:
                while message.get("more_body", False) and sum(map(len, self._pieces)) < PIECE_BYTES:
                    message = await self.receive()
                    if message["type"] != "http.request":
                        return message
                    self._pieces.append(message.get("body", b""))
                    if limit.when() is None:
                        limit.reschedule(asyncio.get_running_loop().time() + GATHER_S)
        pieces, self._pieces = self._pieces, []
        return {**message, "body": b"".join(pieces)}

    def _keep(self, message: Message) -> None:
        size_bytes = len(message.get("body", b""))
        if self._kept_bytes + size_bytes > MAX_KEPT_BYTES or size_bytes > self.budget.left_bytes:
            self.is_kept = False
            self.forget()
            return
        self._kept_bytes += size_bytes
        self.budget.left_bytes -= size_bytes
        self._messages.append(message)


@dataclass
class _AttemptResponse:
    """The answer of one attempt."""

    # This proxy has passed on no answer yet: a 404 of Serve's means that it does not know the way so far.
    is_new: bool
    is_too_early: bool = False
    is_serve_s: bool = False
    # Held back until something of the body follows.
    head: Message | None = None
    # The refusal of a stream that had begun.
    refusal: bytes | None = None


@dataclass
class ClientResponse:
    """The answer to a caller, over all attempts.

    An answer of Serve's own, given because it found no replica, is not passed on. A stream goes on with the
    events of the next attempt, or ends with its error.
    """

    forward: Send
    has_begun: bool = False
    is_complete: bool = False
    is_stream: bool = False
    # The seed that a stream's head gave; empty where there is none.
    seed: str = ""
    _has_shown: bool = False
    _reply: _AttemptResponse = field(default_factory=lambda: _AttemptResponse(is_new=True))

    def begin(self, *, is_new: bool) -> None:
        """Expect the answer to another attempt; `is_new` says that this proxy has passed on no answer yet."""
        self._reply = _AttemptResponse(is_new)

    @property
    def is_too_early(self) -> bool:
        """Whether Serve had no route yet for what was asked last."""
        return self._reply.is_too_early

    @property
    def can_begin_again(self) -> bool:
        """Whether the caller has got nothing but what may be said again."""
        return not self.has_begun or (self.is_stream and self.seed != "" and not self._has_shown)

    async def send(self, message: Message) -> None:
        """Take one message of the answer."""
        reply = self._reply
        if message["type"] == "http.response.start":
            self._take_head(message)
        elif reply.refusal is not None:
            reply.refusal = said = reply.refusal + message.get("body", b"")
            if not message.get("more_body", False):
                await self.end_with(refusal_event(said))
        elif not reply.is_serve_s:
            await self._pass_on(message)

    async def end_with(self, event: bytes) -> None:
        """Write a last event and end a stream."""
        await self.forward({"type": "http.response.body", "body": event, "more_body": False})
        self.is_complete = True

    def _take_head(self, head: Message) -> None:
        headers, status, reply = Headers(raw=head.get("headers", [])), head["status"], self._reply
        is_stream = headers.get("content-type", "").startswith(EventStream.media_type)
        if _MARK not in headers:
            reply.is_too_early = reply.is_new and status == HTTPStatus.NOT_FOUND
            reply.is_serve_s = reply.is_too_early or status >= HTTPStatus.INTERNAL_SERVER_ERROR
        if not self.has_begun:
            reply.head, self.is_stream, self.seed = head, is_stream, headers.get(_SEED, "") if is_stream else ""
        elif not is_stream and not reply.is_serve_s:
            reply.refusal = b""

    async def _pass_on(self, message: Message) -> None:
        if self._reply.head is not None:
            head, self._reply.head, self.has_begun = self._reply.head, None, True
            await self.forward(head)
        if self.is_stream:
            self._has_shown |= not tells_progress_alone(message.get("body", b""))
        await self.forward(message)
        self.is_complete |= message["type"] == "http.response.body" and not message.get("more_body", False)


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}


def _attempt(scope: Scope, attempt: int, age_s: float, seed: str) -> Scope:
    """Return the scope for one attempt: Serve writes into it, and one sent again has used up some of its time, and has
    its seed where its stream has told it."""
    headers = list(scope["headers"])
    if attempt > 1:
        headers.append((AGE_HEADER.encode(), f"{age_s:.3f}".encode()))
    if seed:
        headers.append((SEED_HEADER.encode(), seed.encode()))
    return dict(scope, headers=headers)
