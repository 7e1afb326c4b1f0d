"""Callers of a base that does not start hear why at once; those of one that starts wait for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping

import pytest

from serve_app.deployments.ingress import start_failures
from serve_app.deployments.ingress.start_failures import StartFailures
from serve_app.deployments.registry.replica_counts import ReplicaCount, start_failure
from serve_app.errors import BaseUnusable

BASE = "owner/base"
REASON = "WanPipeline makes videos, and only images are served"
RETRYING = f"""A replica failed to start with exception. Retrying 2 more time(s). Error:
ray::ServeReplica:default:base-owner--base.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "replica.py", line 90, in __init__
RuntimeError: Traceback (most recent call last):
serve_app.errors.BaseUnusable: {BASE} cannot be served: {REASON}"""


class Serve:
    """What Serve would say, one answer after the other, the last for ever."""

    def __init__(self, *answers: ReplicaCount) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.asked_twice = threading.Event()

    async def __call__(self) -> Mapping[str, ReplicaCount]:
        self.asked += 1
        if self.asked == 2:
            self.asked_twice.set()
        return {BASE: self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]}


@pytest.fixture(autouse=True)
def _asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_failures, "POLL_S", 0.01)


def failures(serve: Serve) -> StartFailures:
    return StartFailures(serve, clock=asyncio.get_running_loop().time)


async def _forever() -> None:
    await asyncio.Event().wait()


async def test_who_waits_for_a_base_that_fails_is_told_why() -> None:
    serve = Serve(ReplicaCount(starting=1), ReplicaCount(failure=REASON))
    with pytest.raises(BaseUnusable, match=f"{BASE} cannot be served: {REASON}"):
        await failures(serve).unless_unusable(BASE, _forever())
    assert serve.asked == 2


async def test_a_stream_of_a_base_that_fails_is_told_why() -> None:
    async def events() -> AsyncIterator[int]:
        await _forever()
        yield 1

    with pytest.raises(BaseUnusable, match=REASON):
        async for _ in failures(Serve(ReplicaCount(failure=REASON))).watched(BASE, events()):
            pass


async def test_who_waits_for_a_base_that_starts_gets_what_it_makes() -> None:
    serve, ready = Serve(ReplicaCount(starting=1), ReplicaCount(running=1)), asyncio.Event()

    async def work() -> str:
        await ready.wait()
        return "an image"

    started = failures(serve)
    waiting = asyncio.create_task(started.unless_unusable(BASE, work()))
    await asyncio.to_thread(serve.asked_twice.wait, 60)
    ready.set()
    assert await waiting == "an image"
    # It runs: nobody is asked again so soon.
    assert await started.unless_unusable(BASE, work()) == "an image"
    assert serve.asked == 2


async def test_a_stream_gives_all_its_events() -> None:
    async def events() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    started = failures(Serve(ReplicaCount(running=1)))
    assert [event async for event in started.watched(BASE, events())] == [0, 1, 2]


async def test_who_leaves_stops_the_work() -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await _forever()
        finally:
            stopped.set()

    waiting = asyncio.create_task(failures(Serve(ReplicaCount(starting=1))).unless_unusable(BASE, work()))
    await started.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert stopped.is_set()


@pytest.mark.parametrize(
    ("message", "has_given_up", "reason"),
    [
        (RETRYING, False, REASON),
        ("", False, None),
        ("A replica failed to start with exception. Retrying. Error:\nKeyError: 1", False, None),
        ("The deployment failed to start 3 times in a row. Error:\nKeyError: 1", True, "its replicas end"),
    ],
)
def test_the_reason_is_read_from_what_serve_says(message: str, has_given_up: bool, reason: str | None) -> None:
    found = start_failure(message, has_given_up=has_given_up)
    assert found == reason or (found is not None and reason is not None and found.startswith(reason))
