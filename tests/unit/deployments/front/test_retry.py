from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.ports import free_port
from serve_app.deployments.front import retry
from serve_app.deployments.front.retry import MAX_RESENDS, PIECE_BYTES, BufferBudget, BufferedRequest, RetryMiddleware

MARK = {"access-control-expose-headers": "x-request-id"}
SSE = "text/event-stream"
Part = Callable[[Scope, Receive, Send], Awaitable[None]]


class Proxy:
    """Serve's proxy, as far as a layer around it sees: it reads ahead, writes into the scope, and says nothing where
    its replica dies. Each attempt gets the next of `parts`."""

    def __init__(self, *parts: Part) -> None:
        self._parts = iter(parts)
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope | {"headers": list(scope["headers"])})
        scope["root_path"] = scope.get("root_path", "") + "/prefix"
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        gone = asyncio.create_task(self._read(receive, inbox))
        part = asyncio.ensure_future(next(self._parts)(scope, inbox.get, send))
        try:
            await asyncio.wait({part, gone}, return_when=asyncio.FIRST_COMPLETED)
            if part.done():
                part.result()
        finally:
            gone.cancel()
            part.cancel()

    async def _read(self, receive: Receive, inbox: asyncio.Queue[Message]) -> None:
        while True:
            message = await receive()
            inbox.put_nowait(message)
            if message["type"] == "http.disconnect":
                return


async def body_of(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


async def lost(scope: Scope, receive: Receive, send: Send) -> None:
    await body_of(receive)


async def lost_with_its_head_sent(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": Headers(MARK).raw})


async def unavailable(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("Deployment Ingress is unavailable", 503)(scope, receive, send)


async def no_route(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("Path '/' not found. Ping http://.../-/routes", 404)(scope, receive, send)


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("a fault of the proxy")


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(await body_of(receive), 200, MARK)(scope, receive, send)


def answers(status: int) -> Part:
    async def part(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(b'{"error": "ours"}', status, MARK)(scope, receive, send)

    return part


PROGRESS = b"event: image_generation.progress\ndata: {}\n\n"
STARTING = b"event: image_generation.starting\ndata: {}\n\n"
PREVIEW = b"event: image_generation.partial_image\ndata: {}\n\n"
COMPLETED = b"event: image_generation.completed\ndata: {}\n\n"


def breaks_off(kind: str, *events: bytes, **headers: str) -> Part:
    async def part(scope: Scope, receive: Receive, send: Send) -> None:
        head = Headers(MARK | {"content-type": kind} | headers).raw
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})

    return part


def streams(*events: bytes, seed: str = "7") -> Part:
    async def part(scope: Scope, receive: Receive, send: Send) -> None:
        await breaks_off(SSE, *events, **{"x-seed": seed})(scope, receive, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return part


def breaks_off_after(*events: bytes, seed: str = "7") -> Part:
    return breaks_off(f"{SSE}; charset=utf-8", *events, **{"x-seed": seed})


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    """A real server on loopback, the one that Serve's proxy runs in."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off"))
    running = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn tells by a flag alone
        await asyncio.sleep(0.01)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as http:
        yield http
    server.should_exit = True
    await running


@pytest.fixture
def losses() -> list[str]:
    return []


async def asked(losses: list[str], *parts: Part, **request: Any) -> tuple[httpx.Response, Proxy]:
    proxy = Proxy(*parts)
    async with serving(RetryMiddleware(proxy, losses.append, backoff_s=0.001)) as http:
        reply = await http.request(**({"method": "POST", "url": "/", "content": b"a star"} | request))
    return reply, proxy


@pytest.mark.parametrize(
    ("first", "noted"),
    [(lost, ["resent"]), (lost_with_its_head_sent, ["resent"]), (unavailable, ["resent"]), (no_route, [])],
)
async def test_a_request_that_lost_its_ingress_before_an_answer_or_came_too_early_is_sent_again_whole(
    losses: list[str], first: Part, noted: list[str]
) -> None:
    body = bytes(range(256)) * 1000
    reply, proxy = await asked(losses, first, echo, content=body)
    assert (reply.status_code, reply.content) == (200, body)
    assert losses == noted
    assert [scope["root_path"] for scope in proxy.scopes] == ["", ""]


async def test_it_keeps_its_id_and_says_how_old_it_is(losses: list[str]) -> None:
    _, proxy = await asked(losses, lost, lost, echo)
    heads = [Headers(scope=scope) for scope in proxy.scopes]
    assert len({head["x-request-id"] for head in heads}) == 1
    assert [head.getlist("x-request-age-s") != [] for head in heads] == [False, True, True]
    assert float(heads[2]["x-request-age-s"]) > float(heads[1]["x-request-age-s"]) > 0


async def test_after_all_attempts_it_is_refused_as_the_contract_says(losses: list[str]) -> None:
    reply, proxy = await asked(losses, *[lost] * (MAX_RESENDS + 1), headers={"x-request-id": "mine"})
    assert reply.status_code == 503
    assert reply.json()["code"] == "ingress_lost"
    assert "try again" in reply.json()["error"]
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.headers["x-request-id"] == "mine"
    assert (len(proxy.scopes), losses) == (MAX_RESENDS + 1, ["resent"] * MAX_RESENDS + ["refused"])


async def test_the_refusal_has_the_shape_of_the_route_s_family(losses: list[str]) -> None:
    reply, _ = await asked(losses, *[lost] * (MAX_RESENDS + 1), url="/v1/images/generations")
    assert reply.json()["error"]["code"] == "ingress_lost"


async def test_what_removes_something_is_not_sent_twice(losses: list[str]) -> None:
    reply, proxy = await asked(losses, lost, method="DELETE", url="/v1/loras/mine")
    assert (reply.status_code, len(proxy.scopes), losses) == (503, 1, ["refused"])


async def test_a_fault_of_the_proxy_leaks_nothing(losses: list[str]) -> None:
    reply, _ = await asked(losses, broken)
    assert reply.status_code == 500
    assert reply.json() == {
        "error": f"the service failed on this request; its id is {reply.headers['x-request-id']}",
        "code": "internal",
    }


@pytest.mark.parametrize("status", [404, 429, 500, 503])
async def test_the_application_s_own_errors_are_passed_on(losses: list[str], status: int) -> None:
    reply, _ = await asked(losses, answers(status))
    assert (reply.status_code, reply.json(), losses) == (status, {"error": "ours"}, [])


async def test_once_it_knows_the_way_a_404_of_serve_s_is_one() -> None:
    async with serving(RetryMiddleware(Proxy(echo, no_route), lambda _: None)) as http:
        assert (await http.post("/")).status_code == 200
        assert (await http.post("/elsewhere")).status_code == 404


async def test_serve_s_own_paths_are_left_alone(losses: list[str]) -> None:
    reply, _ = await asked(losses, unavailable, method="GET", url="/-/healthz")
    assert (reply.status_code, reply.text) == (503, "Deployment Ingress is unavailable")


async def test_a_stream_that_breaks_off_before_a_picture_goes_on_with_the_same_seed(losses: list[str]) -> None:
    keep_alive = b": keep-alive\n\n"
    first = breaks_off_after(PROGRESS, keep_alive, STARTING, PROGRESS + keep_alive)
    reply, proxy = await asked(losses, first, streams(PROGRESS, PREVIEW, COMPLETED))
    told = PROGRESS + keep_alive + STARTING + PROGRESS + keep_alive
    assert reply.content == told + PROGRESS + PREVIEW + COMPLETED
    assert [Headers(scope=scope).get("x-request-seed") for scope in proxy.scopes] == [None, "7"]
    assert losses == ["resent"]


def assert_ends_in(reply: httpx.Response, begin: bytes, code: str) -> None:
    said, _, last = reply.content.removesuffix(b"\n\n").rpartition(b"\n\n")
    assert said + b"\n\n" == begin
    name, data = last.decode().split("\n")
    assert name == "event: error"
    fault = json.loads(data.removeprefix("data: "))["error"]
    assert fault["code"] == code
    assert "try again" in fault["message"]


@pytest.mark.parametrize(
    "events", [(PREVIEW,), (PROGRESS, PROGRESS + PREVIEW), (PROGRESS, PREVIEW[:20]), (COMPLETED, PROGRESS), (b"x\n\n",)]
)
async def test_a_stream_that_breaks_off_after_a_picture_ends_in_an_event_that_says_to_try_again(
    losses: list[str], events: tuple[bytes, ...]
) -> None:
    reply, proxy = await asked(losses, breaks_off_after(PROGRESS, *events, b"\n\n"))
    assert_ends_in(reply, PROGRESS + b"".join(events) + b"\n\n", "ingress_lost")
    assert (len(proxy.scopes), losses) == (1, ["cut"])


async def test_a_stream_that_has_told_no_seed_is_not_begun_again(losses: list[str]) -> None:
    reply, _ = await asked(losses, breaks_off_after(PROGRESS, seed=""))
    assert_ends_in(reply, PROGRESS, "ingress_lost")


async def test_a_begun_stream_that_is_lost_again_and_again_says_so(losses: list[str]) -> None:
    others = [lost, unavailable, breaks_off_after(PROGRESS)]
    reply, proxy = await asked(losses, breaks_off_after(PROGRESS), *others)
    assert_ends_in(reply, PROGRESS * 2, "ingress_lost")
    assert (len(proxy.scopes), losses) == (MAX_RESENDS + 1, ["resent"] * MAX_RESENDS + ["cut"])


async def test_a_begun_stream_that_is_then_refused_says_why(losses: list[str]) -> None:
    async def full(scope: Scope, receive: Receive, send: Send) -> None:
        fault = {"error": {"code": "queue_full", "message": "the queue is full; try again in 3 s"}}
        reply = json.dumps(fault, indent=1).encode()
        await StreamingResponse(iter([reply[:9], reply[9:]]), 429, MARK, "application/json")(scope, receive, send)

    reply, _ = await asked(losses, breaks_off_after(PROGRESS), full)
    assert_ends_in(reply, PROGRESS, "queue_full")
    assert losses == ["resent"]


async def test_an_image_that_breaks_off_is_no_whole_answer(losses: list[str]) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await asked(losses, breaks_off("image/png", b"half", **{"content-length": "100"}))
    assert losses == ["cut"]


async def test_a_stream_comes_as_it_is_made(losses: list[str]) -> None:
    was_read = asyncio.Event()

    async def events() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        await was_read.wait()
        yield b"data: 2\n\n"

    async def part(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(events(), 200, MARK, SSE)(scope, receive, send)

    async with (
        serving(RetryMiddleware(Proxy(part), losses.append)) as http,
        http.stream("POST", "/") as reply,
    ):
        chunks = reply.aiter_bytes()
        assert await anext(chunks) == b"data: 1\n\n"
        was_read.set()
        assert await anext(chunks) == b"data: 2\n\n"


async def test_a_caller_who_leaves_is_noticed_and_its_request_not_sent_again(losses: list[str]) -> None:
    has_begun, has_ended = asyncio.Event(), asyncio.Event()

    async def part(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        has_begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            has_ended.set()

    proxy = Proxy(part)
    async with serving(RetryMiddleware(proxy, losses.append)) as http:
        asking = asyncio.create_task(http.post("/", content=b"a star"))
        await has_begun.wait()
        asking.cancel()
        await asyncio.wait_for(has_ended.wait(), 60)
    assert (len(proxy.scopes), losses) == (1, [])


async def test_a_body_that_is_still_on_its_way_is_read_on_by_the_next(losses: list[str]) -> None:
    async def lost_at_once(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        is_lost.set()

    async def body() -> AsyncIterator[bytes]:
        yield b"a "
        await is_lost.wait()
        yield b"star"

    is_lost = asyncio.Event()
    reply, _ = await asked(losses, lost_at_once, echo, content=body())
    assert (reply.status_code, reply.content) == (200, b"a star")


def sending(*pieces: bytes, ends: bool = True) -> tuple[Receive, asyncio.Event]:
    """A caller that sends a body in pieces, and waits before the last of them until the event is set."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = not ends
    waits = asyncio.Event()

    async def receive() -> Message:
        if len(messages) == 1:
            await waits.wait()
        return messages.pop(0)

    return receive, waits


async def test_a_body_larger_than_is_kept_is_passed_on_but_not_sent_again() -> None:
    room = BufferBudget(PIECE_BYTES + 100)
    receive, waits = sending(b"x" * PIECE_BYTES, b"x" * 200)
    waits.set()
    caller = BufferedRequest(receive, room)
    inbox = caller.replay()
    assert [len((await inbox())["body"]) for _ in range(2)] == [PIECE_BYTES, 200]
    assert (caller.is_kept, room.left_bytes) == (False, PIECE_BYTES + 100)


async def test_a_body_that_comes_byte_by_byte_is_handed_on_as_one() -> None:
    receive, waits = sending(*[b"x"] * 1000)
    caller = BufferedRequest(receive, BufferBudget(10_000))
    cut_short = asyncio.ensure_future(caller.replay()())
    await asyncio.sleep(0)
    cut_short.cancel()  # as an attempt is that is lost while the body comes
    waits.set()
    message = await caller.replay()()
    assert (message["body"], message["more_body"]) == (b"x" * 1000, False)


async def test_what_came_of_a_slow_body_is_handed_on_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "GATHER_S", 0.01)
    receive, waits = sending(b"a", b"b", b"c")
    inbox = BufferedRequest(receive, BufferBudget(100)).replay()
    first = await inbox()
    waits.set()
    second = await inbox()
    assert [(one["body"], one["more_body"]) for one in (first, second)] == [(b"ab", True), (b"c", False)]


async def test_room_is_given_back_when_a_request_is_over(losses: list[str]) -> None:
    layer = RetryMiddleware(Proxy(echo, echo), losses.append)
    before = layer.budget.left_bytes
    async with serving(layer) as http:
        for _ in range(2):
            await http.post("/", content=b"x" * 1000)
    assert layer.budget.left_bytes == before
