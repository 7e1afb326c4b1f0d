"""Load shedding in the proxy.

Under overload, requests would wait minutes in the proxy's queue only to be rejected by the ingress within milliseconds;
so the proxy rejects them at once. It counts the requests in flight and rejects new ones when that number exceeds what
the ingress replicas may hold, plus a small slack. Owns that count in the proxy, and the header by which ingress
replicas report their capacity. Runs inside the proxy, so it knows no configuration and no Ray.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.http.error_responses import error_response
from serve_app.deployments.front.own_routes import as_own, own_path
from serve_app.errors import Overloaded

log = logging.getLogger(__name__)

# On every reply, from ingress replica to proxy alone: how many requests all ingress replicas may hold, and on a refusal
# for want of capacity who refuses and how many it holds: "160" or "160 x7f3=72".
HELD_HEADER = "x-loraplex-held"
# For so long after a full queue was reported, the count is limited by what was reported.
REPORT_TTL_S = 5.0
# Requests allowed on their way beyond those held, and a share of those: they are accepted or refused in a moment.
SLACK_REQUESTS = 8
SLACK_SHARE = 1 / 16
# Before the first reply.
DEFAULT_CAPACITY = 256
TOO_MANY = HTTPStatus.TOO_MANY_REQUESTS
LOG_EVERY_S = 10.0
DEFAULT_RETRY_AFTER_S = 1
# The registry is for its administrators to change, under any load.
_ALWAYS_LET_IN = ("/v1/loras", "/-/")


class InFlightLimit:
    """How many requests may be in flight through one proxy. Pure but for the clock.

    Invariant: `SLACK_REQUESTS` requests may always be in flight, no matter what is reported.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds that only grow."""
        self._clock = clock
        self._held: dict[str, tuple[float, int]] = {}
        self._most = DEFAULT_CAPACITY
        self.retry_after_s = DEFAULT_RETRY_AFTER_S
        self.in_flight = 0

    def set_capacity(self, most: int) -> None:
        """Take in how many requests all ingress replicas may hold."""
        self._most = most

    def record_rejection(self, replica: str, held: int, retry_after_s: int) -> None:
        """Take in that an ingress replica refused a request, what it holds, and when the caller was to come back."""
        now = self._clock()
        self._held = {id_: report for id_, report in self._held.items() if now - report[0] <= REPORT_TTL_S}
        self._held[replica] = now, held
        self.retry_after_s = retry_after_s

    @property
    def max_in_flight(self) -> int:
        """How many requests may be in flight now."""
        now = self._clock()
        reported = [count for at, count in self._held.values() if now - at <= REPORT_TTL_S]
        held = sum(reported) if reported else self._most
        return held + int(held * SLACK_SHARE) + SLACK_REQUESTS

    @property
    def has_capacity(self) -> bool:
        """Whether one more may come in."""
        return self.in_flight < self.max_in_flight


class LoadSheddingMiddleware:
    """Refuses requests for images while more are on their way than can be looked at in a moment; nothing else."""

    def __init__(
        self, app: ASGIApp, on_shed: Callable[[], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`on_shed` hears of each request that is refused here."""
        self._app = app
        self._on_shed = on_shed
        self._clock = clock
        self.limit = InFlightLimit(clock)
        self._shed = 0
        self._logged_at = float("-inf")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_read(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._read_report(message)
            await send(message)

        if scope["method"] != "POST" or own_path(scope).startswith(_ALWAYS_LET_IN):
            await self._app(scope, receive, send_read)
            return
        if not self.limit.has_capacity:
            await self._refuse(scope, receive, send)
            return
        self.limit.in_flight += 1
        try:
            await self._app(scope, _Arriving(receive, self.limit), send_read)
        finally:
            self.limit.in_flight -= 1

    def _read_report(self, message: Message) -> None:
        headers = MutableHeaders(raw=list(message.get("headers", [])))
        if (report := headers.get(HELD_HEADER)) is None:
            return
        del headers[HELD_HEADER]
        message["headers"] = headers.raw
        most, _, refusal = report.partition(" ")
        self.limit.set_capacity(int(most))
        if refusal:
            replica, _, held = refusal.partition("=")
            self.limit.record_rejection(replica, int(held), int(headers.get("retry-after", DEFAULT_RETRY_AFTER_S)))

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._on_shed()
        self._note()
        response = error_response(as_own(scope), Overloaded(self.limit.retry_after_s))
        response.headers["x-request-id"] = Headers(scope=scope).get("x-request-id") or str(uuid.uuid4())
        response.headers["access-control-expose-headers"] = "x-request-id"
        await response(scope, receive, send)

    def _note(self) -> None:
        """Log now and then: a line for each would cost more than the refusal."""
        self._shed += 1
        if self._clock() - self._logged_at >= LOG_EVERY_S:
            log.warning("%d requests were refused by the proxy; %d are in flight", self._shed, self.limit.in_flight)
            self._shed, self._logged_at = 0, self._clock()


class _Arriving:
    """A request's body on its way in: while it waits for its caller, it does not count against the limit."""

    def __init__(self, receive: Receive, limit: InFlightLimit) -> None:
        self._receive = receive
        self._limit = limit
        self._is_complete = False

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()
        self._limit.in_flight -= 1
        try:
            message = await self._receive()
        finally:
            self._limit.in_flight += 1
        self._is_complete = not message.get("more_body", False)
        return message


class CapacityHeaderMiddleware:
    """Tells the proxy how many requests ingress replicas may hold, and on such a refusal what one holds."""

    def __init__(self, app: ASGIApp, *, replica: str, most: Callable[[], int], held: Callable[[], int | None]) -> None:
        """`most` is what all may hold; `held` gives None while no base has too much."""
        self._app = app
        self._most = most
        self._replica = replica
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""

        async def send_with_capacity(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A key's own limits are a 429 too, and say nothing of capacity.
                held = self._held() if message["status"] == TOO_MANY else None
                refusal = "" if held is None else f" {self._replica}={held}"
                MutableHeaders(scope=message)[HELD_HEADER] = f"{self._most()}{refusal}"
            await send(message)

        await self._app(scope, receive, send_with_capacity)
