"""What the dispatcher does with what comes of a request; `tests/integration` has it with Serve's own handles."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve_app.config import AppConfig
from serve_app.core import GenerationRequest, GivenBack, PixelImage, Preview, Progress
from serve_app.deployments.ingress.dispatcher import MOST_OF_PLACES, Dispatcher
from serve_app.deployments.ingress.key_slots import MOST_OF_SLOTS
from serve_app.errors import QueueFull, ReplicaLost
from tests.engine_cases import request

BASE = request().base_id
PLACES = 8
PROGRESS, PREVIEW = Progress(0, 1, 2), Preview(0, 0, PixelImage(1, 1, b"rgb"))


class Response:
    """A call, as Serve's handles return it."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def __await__(self) -> Generator[Any, None, Any]:
        return self.outcome.__await__()

    def cancel(self) -> None:
        self.outcome.cancel()


class Handle:
    """A handle whose calls the test ends."""

    def __init__(self) -> None:
        self.sent: list[GenerationRequest] = []
        self.calls: list[Response] = []

    def options(self, **_: Any) -> Handle:
        return self

    @property
    def generate(self) -> Handle:
        return self

    def remote(self, asked: GenerationRequest) -> Response:
        self.sent.append(asked)
        self.calls.append(Response())
        return self.calls[-1]

    async def has_sent(self, count: int) -> bool:
        """Return whether so many were sent once nothing else is left to do."""
        for _ in range(50):
            await asyncio.sleep(0)
        return len(self.sent) == count


def full() -> BackPressureError:
    return BackPressureError(num_queued_requests=PLACES, max_queued_requests=PLACES)


def settings() -> AppConfig:
    replica = {"max_ongoing_requests": PLACES / 2, "max_queued_requests": PLACES / 2}
    base = {"id": BASE, "source": {"embedded": "demo/sd15"}, "replica": replica}
    return AppConfig.model_validate({"bases": [base], "ingress": {"replicas": 1}})


def dispatcher(handle: Any) -> Dispatcher:
    config = settings()
    dispatch = Dispatcher(config.ingress, {BASE: handle}, on_retry=lambda _, __: None, resend_after_s=0)
    dispatch.serve(config.bases)
    return dispatch


async def test_what_a_replica_gives_back_is_sent_again_with_the_time_that_it_has_waited() -> None:
    handle = Handle()
    call = asyncio.create_task(dispatcher(handle)(request()))
    for number, waited_s in enumerate((7.0, 9.0), start=1):
        assert await handle.has_sent(number)
        handle.calls[-1].outcome.set_exception(GivenBack(waited_s))
    assert await handle.has_sent(3)
    handle.calls[-1].outcome.set_result("images")
    assert await call == "images"
    assert handle.sent == [replace(request(), waited_s=waited_s) for waited_s in (0.0, 7.0, 9.0)]


@pytest.mark.parametrize("end", [GivenBack(7.0), ReplicaLost(BASE, attempts=1)], ids=["given back", "lost"])
async def test_what_was_accepted_waits_for_a_place_where_others_have_taken_its_own(
    end: Exception,
) -> None:
    handle = Handle()
    call = asyncio.create_task(dispatcher(handle)(request()))
    for number, outcome in enumerate((end, full(), full()), start=1):
        assert await handle.has_sent(number)
        handle.calls[-1].outcome.set_exception(outcome)
    assert await handle.has_sent(4)
    handle.calls[-1].outcome.set_result("images")
    assert await call == "images"


async def test_what_finds_no_place_at_first_is_refused() -> None:
    handle = Handle()
    call = asyncio.create_task(dispatcher(handle)(request()))
    assert await handle.has_sent(1)
    handle.calls[-1].outcome.set_exception(full())
    with pytest.raises(QueueFull):
        await call


async def test_a_base_whose_application_came_back_is_asked_through_a_new_handle() -> None:
    gone, back = Handle(), Handle()
    handles = {BASE: gone}

    def renew(base: str, used: Handle) -> None:
        assert (base, used) == (BASE, gone)
        handles[base] = back

    config = settings()
    dispatch = Dispatcher(
        config.ingress,
        handles,
        on_retry=lambda _, __: None,
        renew=renew,
        resend_after_s=0,  # type: ignore[arg-type]
    )
    dispatch.serve(config.bases)
    call = asyncio.create_task(dispatch(request()))
    assert await gone.has_sent(1)
    gone.calls[0].outcome.set_exception(DeploymentUnavailableError(DeploymentID(name="base", app_name="app")))
    assert await back.has_sent(1)
    back.calls[0].outcome.set_result("images")
    assert await call == "images"


async def test_of_a_request_s_parts_that_lost_their_replicas_one_at_a_time_is_sent_again() -> None:
    handle, whole = Handle(), request(seed=0, num_images=3)
    dispatch = dispatcher(handle)
    calls = [asyncio.create_task(dispatch(whole.part(number, 1))) for number in range(3)]
    assert await handle.has_sent(3)
    for lost in handle.calls:
        lost.outcome.set_exception(ReplicaLost(BASE, attempts=1))
    for sent in (4, 5, 6):
        assert await handle.has_sent(sent)
        handle.calls[-1].outcome.set_result(handle.sent[-1].seed)
    assert await asyncio.gather(*calls) == [0, 1, 2]


async def test_no_key_has_all_places_of_a_base_or_all_slots_of_its_replicas() -> None:
    handle = Handle()
    dispatch = dispatcher(handle)
    most, slots = int(MOST_OF_PLACES * PLACES), int(MOST_OF_SLOTS * PLACES / 2)
    calls = [asyncio.create_task(dispatch(request(seed=seed, share="many"))) for seed in range(most)]
    assert await handle.has_sent(slots)
    with pytest.raises(QueueFull):
        await dispatch(request(share="many"))
    calls += [asyncio.create_task(dispatch(request(seed=seed, share=share))) for seed, share in enumerate(("few", ""))]
    assert await handle.has_sent(slots + 2)
    handle.calls[0].outcome.set_result(None)
    await calls[0]
    assert await handle.has_sent(slots + 3)
    assert handle.sent[-1].seed == slots
    calls.append(asyncio.create_task(dispatch(request(share="many"))))
    assert await handle.has_sent(slots + 3)
    for call in reversed(calls):
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
    assert await handle.has_sent(slots + 3), "those that were given up while they waited are not sent"


class Stream:
    """The events of a call: some, and then the loss of its replica."""

    def __init__(self, *events: Any) -> None:
        self._events = iter(events)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        try:
            return next(self._events)
        except StopIteration:
            raise RayActorError from None

    def cancel(self) -> None:
        pass


class StreamingHandle(Handle):
    """A handle whose calls bring what the test says, one after the other."""

    def __init__(self, *streams: Stream) -> None:
        super().__init__()
        self._streams = iter(streams)

    @property
    def generate_stream(self) -> StreamingHandle:
        return self

    def remote(self, asked: GenerationRequest) -> Any:
        self.sent.append(asked)
        return next(self._streams)


@pytest.mark.parametrize(("shown", "sent"), [(PROGRESS, 2), (PREVIEW, 1)], ids=["progress", "a picture"])
async def test_a_stream_that_lost_its_replica_is_begun_again_unless_a_picture_was_shown(shown: Any, sent: int) -> None:
    handle = StreamingHandle(Stream(shown), Stream(PREVIEW))
    with pytest.raises(ReplicaLost):
        async for _ in dispatcher(handle).stream(request()):
            pass
    assert len(handle.sent) == sent
