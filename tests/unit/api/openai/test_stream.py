"""Streams of the OpenAI shape, through the real client over a real server on loopback."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from serve_app.api.pictures.images import decode_image, encode_image
from serve_app.core import Starting
from serve_app.errors import ModelNotFound, OutOfBounds, QueueFull, ReplicaLost
from tests.service import connect, posted
from tests.unit.api.fakes import STEPS, FakeGateway, gradient

PICTURE = gradient(40, 24)
PNG = encode_image(PICTURE, "png")


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def dumped(stream: Any) -> list[dict[str, Any]]:
    return [event.model_dump() for event in stream]


def picture_of(event: dict[str, Any]) -> Any:
    return decode_image(base64.b64decode(event["b64_json"]), "event", max_pixels=10_000)


def test_a_stream_tells_progress_then_previews_then_the_image(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    with ai.images.generate(prompt="elephant", size="80x48", stream=True, partial_images=2) as stream:  # type: ignore[call-overload]
        events = dumped(stream)
    assert gateway.draft.num_previews == 2
    progress = [event for event in events if event["type"] == "image_generation.progress"]
    assert [(event["queue_position"], event["step"], event["steps"]) for event in progress] == [
        (None, 0, STEPS), (2, 0, STEPS), *((0, step, STEPS) for step in range(1, STEPS + 1)),
    ]  # fmt: skip
    previews = [event for event in events if event["type"] == "image_generation.partial_image"]
    assert [event["partial_image_index"] for event in previews] == [0, 1]
    for event in previews:
        assert event.items() >= {
            "size": "80x48", "quality": "auto", "background": "opaque", "output_format": "png", "image_index": 0,
        }.items()  # fmt: skip
        assert (picture_of(event).width, picture_of(event).height) == (80, 48)
    done = events[-1]
    assert done["type"] == "image_generation.completed"
    assert picture_of(done) == gradient(80, 48)
    assert done["usage"]["total_tokens"] == 0
    assert (done["loraplex"]["seed"], done["loraplex"]["base_model"]) == (7, "demo/sdxl")


def test_a_stream_tells_that_its_base_starts(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.starting = (Starting(19.23), Starting(None, has_room=False))
    with ai.images.generate(prompt="elephant", stream=True) as stream:
        events = dumped(stream)
    told = [event for event in events if event["type"] == "image_generation.starting"]
    assert [(event["base_model"], event["state"], event["expected_s"]) for event in told] == [
        ("demo/sdxl", "starting", 19.2), ("demo/sdxl", "waiting", None),
    ]  # fmt: skip
    assert events[-1]["type"] == "image_generation.completed"


def test_each_image_of_a_stream_is_completed_by_an_event_of_its_own(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    with ai.images.generate(prompt="elephant", n=3, stream=True, partial_images=1, output_format="webp") as stream:
        events = dumped(stream)
    previews = [event["image_index"] for event in events if event["type"] == "image_generation.partial_image"]
    done = [event for event in events if event["type"] == "image_generation.completed"]
    assert previews == [0, 1, 2]
    assert [event["image_index"] for event in done] == [0, 1, 2]
    assert {event["output_format"] for event in done} == {"webp"}


def test_no_preview_is_sent_unasked(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    with ai.images.generate(prompt="elephant", stream=True) as stream:
        assert "image_generation.partial_image" not in {event["type"] for event in dumped(stream)}
    assert gateway.draft.num_previews == 0


def test_an_edit_streams_events_of_its_own_names(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    with ai.images.edit(image=("a.png", PNG), prompt="lion", stream=True, partial_images=1) as stream:
        events = dumped(stream)
    assert gateway.draft.image == PICTURE
    assert [event["type"] for event in events if "progress" not in event["type"]] == [
        "image_edit.partial_image", "image_edit.completed",
    ]  # fmt: skip
    assert picture_of(events[-1]) == PICTURE


def test_the_wire_is_that_of_server_sent_events(url: str, gateway: FakeGateway) -> None:
    body = {"prompt": "elephant", "stream": True}
    with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=60, trust_env=False) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["x-base-model"] == "demo/sdxl"
        assert reply.headers["x-seed"] == "7"
        blocks = reply.read().decode().split("\n\n")
    assert blocks.pop() == ""
    for block in blocks:
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


@pytest.mark.parametrize(("told", "seed"), [({"x-request-seed": "123"}, 123), ({"x-request-seed": "x"}, 5), ({}, 5)])
def test_a_stream_that_is_begun_again_has_the_seed_it_had(
    url: str, gateway: FakeGateway, told: dict[str, str], seed: int
) -> None:
    body = {"prompt": "elephant", "stream": True, "seed": 5}
    httpx.post(f"{url}/v1/images/generations", json=body, headers=told, timeout=60, trust_env=False).raise_for_status()
    assert gateway.draft.seed == seed


def test_the_first_event_is_there_before_the_work_is_done(url: str, gateway: FakeGateway) -> None:
    gateway.is_stuck = gateway.is_begun = True
    body = {"prompt": "elephant", "stream": True}
    with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=60, trust_env=False) as reply:
        lines = reply.iter_lines()  # kept: a generator that is let go closes the connection
        assert next(lines) == "event: image_generation.progress"
        assert not gateway.cancelled.is_set()
    assert gateway.cancelled.wait(60)


@pytest.mark.parametrize(
    ("failure", "status"),
    [(ModelNotFound("demo/nope"), 404), (QueueFull("demo/sdxl", 1), 429), (ZeroDivisionError("/secret"), 500)],
)
def test_what_is_refused_before_the_first_event_has_a_status(
    ai: openai.OpenAI, gateway: FakeGateway, failure: Exception, status: int
) -> None:
    gateway.failure = failure
    with pytest.raises(openai.APIStatusError) as caught:
        ai.images.generate(prompt="elephant", stream=True)
    assert caught.value.status_code == status
    assert "/secret" not in str(caught.value)


def test_a_bound_is_named_as_this_shape_names_it(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.failure = OutOfBounds("num_images_per_prompt", 9, "from 1 to 4")
    with pytest.raises(openai.BadRequestError) as caught:
        ai.images.generate(prompt="elephant", stream=True)
    assert caught.value.param == "n"
    gateway.is_begun = True
    with pytest.raises(openai.APIError) as in_stream, ai.images.generate(prompt="elephant", stream=True) as stream:
        dumped(stream)
    assert in_stream.value.param == "n"


@pytest.mark.parametrize(
    ("failure", "code", "sentence"),
    [
        (ReplicaLost("demo/sdxl", attempts=1), "replica_lost", "try again in 2 s"),
        (ZeroDivisionError("/secret"), "internal", "the service failed on this request"),
    ],
)
def test_what_fails_later_is_the_last_event(
    ai: openai.OpenAI, gateway: FakeGateway, failure: Exception, code: str, sentence: str
) -> None:
    gateway.failure, gateway.is_begun = failure, True
    seen: list[Any] = []
    with (
        pytest.raises(openai.APIError, match=sentence) as caught,
        ai.images.generate(prompt="elephant", stream=True) as stream,
    ):
        seen.extend(iter(stream))
    assert len(seen) == 3
    assert caught.value.code == code
    assert "/secret" not in str(caught.value)


def test_a_caller_who_leaves_a_stream_cancels_the_work(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.is_stuck = gateway.is_begun = True
    with ai.images.generate(prompt="elephant", stream=True) as stream:
        next(iter(stream))
        assert not gateway.cancelled.is_set()
    assert gateway.cancelled.wait(60)


def test_a_caller_who_leaves_before_the_first_event_cancels_the_work(url: str, gateway: FakeGateway) -> None:
    gateway.is_stuck = True
    with connect(url) as caller:
        caller.sendall(posted("/v1/images/generations", {"prompt": "a", "stream": True}))
        assert gateway.started.wait(60)
        assert not gateway.cancelled.is_set()
    assert gateway.cancelled.wait(60)


def test_a_deadline_in_a_stream_is_its_last_event(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.is_stuck = gateway.is_begun = True
    with (
        pytest.raises(openai.APIError, match=r"longer than 0\.2 s and was stopped") as caught,
        ai.images.generate(prompt="a", stream=True, extra_headers={"x-request-timeout-s": "0.2"}) as stream,
    ):
        dumped(stream)
    assert caught.value.code == "deadline_exceeded"
    assert gateway.cancelled.wait(60)


SHAPES = [("/", {"inputs": "a"}), ("/v1/images/generations", {"prompt": "a"}),
          ("/v1/images/generations", {"prompt": "a", "stream": True})]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), SHAPES)
def test_a_request_may_ask_for_less_time(
    client: TestClient, gateway: FakeGateway, path: str, body: dict[str, Any]
) -> None:
    gateway.is_stuck = True
    reply = client.post(path, json=body, headers={"x-request-timeout-s": "0.05"})
    assert reply.status_code == 504, reply.text
    assert "took longer than 0.05 s" in reply.text
    assert gateway.cancelled.is_set()


@pytest.mark.parametrize("asked", ["soon", "0", "-1", "nan", "inf", "1e9", "301"])
@pytest.mark.parametrize(("path", "body"), SHAPES)
def test_a_wrong_or_too_long_time_is_refused(
    client: TestClient, gateway: FakeGateway, path: str, body: dict[str, Any], asked: str
) -> None:
    reply = client.post(path, json=body, headers={"x-request-timeout-s": asked})
    assert reply.status_code == 400, reply.text
    assert "x-request-timeout-s" in reply.text
    assert gateway.drafts == []


@pytest.mark.parametrize(("said", "waits"), [(None, True), ("true", True), ("1", True), ("false", False), ("0", False)])
@pytest.mark.parametrize("path", ["/", "/v1/images/generations"])
def test_a_caller_may_say_whether_it_waits_for_a_base_that_starts(
    client: TestClient, gateway: FakeGateway, path: str, said: str | None, waits: bool
) -> None:
    body = {"inputs": "a"} if path == "/" else {"prompt": "a"}
    assert client.post(path, json=body, headers={"x-wait-for-model": said} if said else {}).status_code == 200
    (due,) = gateway.dues
    assert due is not None
    assert due.waits_for_start is waits


def test_whether_a_caller_waits_is_true_or_false(client: TestClient) -> None:
    reply = client.post("/", json={"inputs": "a"}, headers={"x-wait-for-model": "maybe"})
    assert (reply.status_code, reply.json()["error"]) == (400, "'x-wait-for-model' is maybe, but must be true or false")
