"""What a person sees while an image is drawn: the service's events, which only a terminal asks for."""

from __future__ import annotations

import pytest

from serve_app.api.pictures.images import encode_image
from serve_app.cli.service import Pictures, ServiceClient, Step
from serve_app.cli.terminal import CommandFailed
from serve_app.core import Starting, UnresolvedRequest
from serve_app.errors import BaseMismatch, ReplicaLost
from tests.unit.api.fakes import STEPS, FakeGateway, gradient


def test_steps_are_told_and_the_images_are_those_without_a_stream(url: str) -> None:
    draft = UnresolvedRequest("a cat", num_images=2, seed=5)
    steps: list[Step] = []
    with ServiceClient(url, None, timeout_s=30) as service:
        followed = service.draw(draft, form="png", on_step=steps.append)
        plain = service.draw(draft, form="png")
    assert [step.step for step in steps if step.step] == list(range(1, STEPS + 1))
    assert Step(2, 0, STEPS) in steps
    assert (followed.images, followed.seed, followed.timing_ms) == (plain.images, plain.seed, plain.timing_ms)


def test_a_start_that_is_waited_for_is_told(url: str, gateway: FakeGateway) -> None:
    gateway.starting = (Starting(19.23), Starting(None, has_room=False))
    steps: list[Step] = []
    with ServiceClient(url, None, timeout_s=30) as service:
        service.draw(UnresolvedRequest("a cat"), form="png", on_step=steps.append)
    told = [step.expected_s for step in steps if step.is_starting]
    assert told == [19.2, None]


def test_a_picture_can_be_followed_too(url: str, gateway: FakeGateway) -> None:
    steps: list[Step] = []
    pictures = Pictures(encode_image(gradient(48, 32), "png"))
    with ServiceClient(url, None, timeout_s=30) as service:
        service.draw(UnresolvedRequest("a cat"), form="png", pictures=pictures, on_step=steps.append)
    assert gateway.draft.image is not None
    assert steps


def test_a_refusal_before_the_first_event_is_told(url: str, gateway: FakeGateway) -> None:
    gateway.failure = BaseMismatch("demo/sd15-night", "demo/sd15", "demo/sdxl")
    with ServiceClient(url, None, timeout_s=30) as service, pytest.raises(CommandFailed) as caught:
        service.draw(UnresolvedRequest("a cat"), form="png", on_step=lambda step: None)
    assert (str(caught.value), caught.value.code) == (str(gateway.failure), "base_mismatch")


def test_a_failure_in_the_middle_is_told(url: str, gateway: FakeGateway) -> None:
    gateway.failure, gateway.is_begun = ReplicaLost("demo/sdxl", 3), True
    with ServiceClient(url, None, timeout_s=30) as service, pytest.raises(CommandFailed) as caught:
        service.draw(UnresolvedRequest("a cat"), form="png", on_step=lambda step: None)
    assert (str(caught.value), caught.value.code) == (str(gateway.failure), "replica_lost")
