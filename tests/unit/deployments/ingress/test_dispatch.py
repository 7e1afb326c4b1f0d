"""The way of a request through the ingress, with the replicas' part played by the test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

import pytest

from serve_app.catalog.catalog import Catalog
from serve_app.config import AppConfig
from serve_app.core import (
    Accepted,
    GenerationEvent,
    GenerationRequest,
    GenerationResult,
    HubToken,
    PixelImage,
    Progress,
    Timings,
    UnresolvedRequest,
)
from serve_app.deployments.ingress.adapter_defaults import check_defaults
from serve_app.deployments.ingress.canaries import Canaries
from serve_app.deployments.ingress.dispatch import OnDrawn, ServiceGateway
from serve_app.deployments.registry.registry import ServiceRegistry
from serve_app.errors import OutOfBounds, QueueFull, ReplicaLost
from tests.unit.deployments.registry.registry_fakes import FakeReplicas, StoreKeeper

DRAFT = UnresolvedRequest("a cat", num_previews=2)
RESULT = GenerationResult("id", "demo/sd15", (PixelImage(1, 1, b"abc"),), (5,), (), Timings(), 0.1, "cpu", 1)


class Replica:
    """Answers with `events`; waits for `may_go` first where it is given, and fails with `failure` at the end."""

    def __init__(
        self,
        *events: GenerationEvent,
        may_go: asyncio.Event | None = None,
        failure: Exception | None = None,
    ) -> None:
        self._events = events
        self._may_go = may_go
        self._failure = failure
        self.asked: list[GenerationRequest] = []
        self.is_left = False

    async def __call__(self, request: GenerationRequest) -> GenerationResult:
        self.asked.append(request)
        return RESULT

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        self.asked.append(request)
        try:
            if self._may_go is not None:
                await self._may_go.wait()
            for event in self._events:
                yield event
            if self._failure is not None:
                raise self._failure
        finally:
            self.is_left = True


def gateway(
    replica: Replica,
    refusals: list[str] | None = None,
    on_drawn: OnDrawn = lambda key, request, result: None,
) -> ServiceGateway:
    config = AppConfig.model_validate(
        {"bases": [{"id": "demo/sd15", "source": {"embedded": "demo/sd15"}, "defaults": {"steps": 10}}]}
    )

    async def is_ready() -> bool:
        return True

    catalog = Catalog(config, (), clock=time.monotonic)
    return ServiceGateway(
        catalog,
        replica,
        registry=ServiceRegistry(
            catalog,
            StoreKeeper().client(),
            cast(Any, FakeReplicas()),
            pictures=cast(Any, None),
            check_defaults=check_defaults,
            states=cast(Any, None),
        ),
        draw_seed=lambda: 5,
        is_ready=is_ready,
        canaries=Canaries(config, is_running=cast(Any, None), family_of=catalog.family),
        on_refusal=(refusals if refusals is not None else []).append,
        on_drawn=on_drawn,
    )


async def test_a_stream_begins_with_what_was_accepted() -> None:
    replica = Replica(Progress(0, 0, 10), Progress(0, 1, 10), RESULT)
    events = [event async for event in gateway(replica).stream(DRAFT, request_id="id")]
    assert events == [Accepted("demo/sd15", 5, 512, 512, 10), Progress(0, 0, 10), Progress(0, 1, 10), RESULT]
    assert replica.asked[0].num_previews == 2


async def test_a_stream_begins_although_the_replica_is_silent() -> None:
    may_go = asyncio.Event()
    async with aclosing(gateway(Replica(RESULT, may_go=may_go)).stream(DRAFT, request_id="id")) as events:
        assert isinstance(await anext(events), Accepted)
        may_go.set()
        assert await anext(events) == RESULT


async def test_what_a_replica_refuses_at_once_comes_before_any_event() -> None:
    refusals: list[str] = []
    full = Replica(failure=QueueFull("demo/sd15", 1))
    with pytest.raises(QueueFull):
        await anext(gateway(full, refusals).stream(DRAFT, request_id="id"))
    assert refusals == ["queue_full"]


async def test_what_is_out_of_bounds_never_reaches_a_replica() -> None:
    replica = Replica(RESULT)
    with pytest.raises(OutOfBounds):
        await anext(gateway(replica).stream(UnresolvedRequest("a cat", steps=1000), request_id="id"))
    assert replica.asked == []


async def test_a_failure_in_the_middle_ends_the_stream_and_is_counted() -> None:
    refusals: list[str] = []
    seen: list[GenerationEvent] = []
    lost = Replica(Progress(0, 1, 10), failure=ReplicaLost("demo/sd15", 1))

    async def read() -> None:
        async for event in gateway(lost, refusals).stream(DRAFT, request_id="id"):
            seen.append(event)

    with pytest.raises(ReplicaLost):
        await read()
    assert len(seen) == 2
    assert refusals == ["replica_lost"]


@pytest.mark.parametrize("heard", [1, 2, 3])
async def test_closing_a_stream_leaves_the_replica(heard: int) -> None:
    replica = Replica(Progress(0, 0, 10), Progress(0, 1, 10), RESULT)
    async with aclosing(gateway(replica).stream(DRAFT, request_id="id")) as events:
        for _ in range(heard):
            await anext(events)
        assert not replica.is_left
    assert replica.is_left


async def test_cancelling_before_the_first_word_of_the_replica_leaves_it() -> None:
    replica = Replica(RESULT, may_go=asyncio.Event())
    async with aclosing(gateway(replica).stream(DRAFT, request_id="id")) as events:
        assert isinstance(await anext(events), Accepted)
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.wait({waiting}, timeout=0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert replica.is_left


async def test_a_failing_request_s_line_names_key_code_base_and_adapters_and_not_the_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    draft = replace(DRAFT, model="demo/sd15", key="alice", hub_token=HubToken("hf_of-alice"), num_images=99)
    with caplog.at_level("INFO"), pytest.raises(OutOfBounds):
        await gateway(Replica()).generate(draft, request_id="r7")
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("dispatch")]
    assert line.startswith("request r7 with key alice failed: ")
    assert line.endswith("(out_of_bounds); base demo/sd15, adapters none")
    assert "a cat" not in line
    assert "hf_" not in line


async def test_what_was_drawn_is_told_with_its_request_streamed_or_not() -> None:
    told: list[tuple[str | None, GenerationRequest, GenerationResult]] = []
    replica, draft = Replica(Progress(0, 0, 10), RESULT), replace(DRAFT, key="alice")
    service = gateway(replica, on_drawn=lambda *drawn: told.append(drawn))
    await service.generate(draft, request_id="id")
    assert [event async for event in service.stream(draft, request_id="id")][-1] == RESULT
    assert told == [("alice", replica.asked[0], RESULT), ("alice", replica.asked[1], RESULT)]
