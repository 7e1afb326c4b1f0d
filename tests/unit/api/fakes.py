"""A gateway without a cluster, and a real server around it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace

import uvicorn
from starlette.types import ASGIApp

from serve_app.catalog.replica_report import ModelInfo
from serve_app.core import (
    Accepted,
    AppliedAdapter,
    GenerationEvent,
    GenerationResult,
    PixelImage,
    Preview,
    Progress,
    Starting,
    Timings,
    UnresolvedRequest,
    WallClockDeadline,
)
from tests.unit.api.fake_registry import FakeRegistry

STEPS = 4


def gradient(width: int, height: int, shade: int = 0) -> PixelImage:
    """A smooth picture, which JPEG keeps recognisable."""
    rows = (bytes((x * 255 // width, y * 255 // height, shade)) for y in range(height) for x in range(width))
    return PixelImage(width, height, b"".join(rows))


class FakeGateway:
    """Draws gradients of the size asked for; fails with `failure`, or waits where `is_stuck`, until `release`.

    A stream fails or waits after its first step where `is_begun`, else before its first event.
    """

    def __init__(self) -> None:
        self.registry = FakeRegistry()
        self.reset()

    def release(self) -> None:
        """Let those go on who wait; from any thread."""
        self.is_stuck = False
        for loop, released in self._waiting:
            loop.call_soon_threadsafe(released.set)

    def reset(self) -> None:
        """Forget everything: one gateway serves a whole session, as making an application takes longer."""
        self.registry.reset()
        # Without their deadlines, which no two requests share; those are in `dues`.
        self.drafts: list[UnresolvedRequest] = []
        self.dues: list[WallClockDeadline | None] = []
        self.request_ids: list[str] = []
        self.failure: Exception | None = None
        self.is_stuck = False
        self.is_begun = False
        self.is_up = True
        self.starting: tuple[Starting, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.known: tuple[ModelInfo, ...] = ()
        self.on_generate: Callable[[], None] = lambda: None
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def draft(self) -> UnresolvedRequest:
        """The one draft that arrived."""
        (draft,) = self.drafts
        return draft

    async def generate(self, draft: UnresolvedRequest, *, request_id: str) -> GenerationResult:
        self._note(draft, request_id)
        await self._fail_or_wait()
        return self._result(draft, request_id)

    async def stream(self, draft: UnresolvedRequest, *, request_id: str) -> AsyncGenerator[GenerationEvent]:
        self._note(draft, request_id)
        if not self.is_begun:
            await self._fail_or_wait()
        result = self._result(draft, request_id)
        image = result.images[0]
        try:
            yield Accepted(result.base_id, result.seeds[0], image.width, image.height, STEPS)
            for starting in self.starting:
                yield starting
            yield Progress(2, 0, STEPS)
            for step in range(1, STEPS + 1):
                yield Progress(0, step, STEPS)
                if step <= draft.num_previews:
                    for index in range(draft.num_images):
                        yield Preview(step - 1, index, gradient(8, 8, shade=index))
                if self.is_begun:
                    await self._fail_or_wait()
        except GeneratorExit:  # closed between two events, not while it waits
            self.cancelled.set()
            raise
        yield result

    def _note(self, draft: UnresolvedRequest, request_id: str) -> None:
        self.drafts.append(replace(draft, due=None))
        self.dues.append(draft.due)
        self.request_ids.append(request_id)
        self.started.set()
        self.on_generate()

    async def _fail_or_wait(self) -> None:
        cancelled = self.cancelled
        if self.is_stuck:
            await self._wait(cancelled)
        if self.failure is not None:
            raise self.failure

    async def _wait(self, cancelled: threading.Event) -> None:
        released = asyncio.Event()
        self._waiting.append((asyncio.get_running_loop(), released))
        if not self.is_stuck:  # looked at again: `release` may have come before it could see this one
            released.set()
        try:
            await released.wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def _result(self, draft: UnresolvedRequest, request_id: str) -> GenerationResult:
        source = draft.image
        width = draft.width or (source.width if source else 64)
        height = draft.height or (source.height if source else 64)
        seed = 7 if draft.seed is None else draft.seed
        return GenerationResult(
            request_id=request_id,
            base_id="demo/sdxl",
            images=tuple(gradient(width, height, shade) for shade in range(draft.num_images)),
            seeds=tuple(seed + i for i in range(draft.num_images)),
            adapters=tuple(
                AppliedAdapter(ref.id, "0123abcd", 1.0 if ref.scale is None else ref.scale, 48, 50)
                for ref in draft.adapters
            ),
            timings=Timings(1.0, 2.0, 3.25, 7.0, 400.0, 50.0),
            compute_s=0.4531,
            device="cpu",
            batch_size=1,
            warnings=self.warnings,
        )

    async def is_ready(self) -> bool:
        return self.is_up

    async def models(self) -> tuple[ModelInfo, ...]:
        return self.known


@contextlib.contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """Serve an application through a real uvicorn on loopback; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    # Clients keep a connection for 5 s, as uvicorn does: it would close one at the moment at which it is used.
    config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", timeout_keep_alive=600)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=120)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"
