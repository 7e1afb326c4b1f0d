"""Eight families end to end: HTTP, streams with previews, edits; and a base that cannot be served."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.family_service import BROKEN, FAMILIES
from tests.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1200)]
SIDE = 64


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    """Return the pictures of a stream that has ended; its other events tell how far it is."""
    assert reply.status_code == 200, reply.text
    lines = [line[len("data: ") :] for line in reply.text.splitlines() if line.startswith("data: {")]
    return [event for event in map(json.loads, lines) if "b64_json" in event]


def picture(event: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))).convert("RGB")


def png(colour: str, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


def fields(name: str, **others: Any) -> dict[str, Any]:
    return {"prompt": "a red cat", "model": f"tiny/{name}", "size": f"{SIDE}x{SIDE}", "seed": 3, **others}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_streams_a_preview_and_then_its_image(families: Service, name: str) -> None:
    body = fields(name, stream=True, partial_images=1, output_format="png")
    events = events_of(families.http.post("v1/images/generations", json=body))
    kinds = [event["type"] for event in events]
    assert kinds == ["image_generation.partial_image", "image_generation.completed"]
    assert [picture(event).size for event in events] == [(SIDE, SIDE)] * 2
    again = families.http.post("v1/images/generations", json=fields(name, response_format="b64_json"))
    assert np.array_equal(picture(again.json()["data"][0]), picture(events[-1]))


def test_an_edit_with_several_pictures_reads_them_all(families: Service) -> None:
    def edited(*pictures: bytes) -> Image.Image:
        files = [("image[]", (f"{number}.png", picture)) for number, picture in enumerate(pictures)]
        data = fields("flux2_klein", stream="true", partial_images="1", num_inference_steps="4")
        events = events_of(families.http.post("v1/images/edits", data=data, files=files))
        assert [event["type"] for event in events] == ["image_edit.partial_image", "image_edit.completed"]
        return picture(events[-1])

    one, two = edited(png("red")), edited(png("red"), png("blue", (32, 96)))
    assert one.size == two.size == (SIDE, SIDE)
    assert not np.array_equal(one, two)


def test_bases_say_what_each_family_takes(families: Service) -> None:
    told = {base["id"]: base for base in families.http.get("v1/bases").json()}
    assert {"text", "edit", "inpaint"} == set(told["tiny/flux2_klein"]["tasks"])
    assert told["tiny/sd3"]["limits"]["side_multiple"] == 16
    assert told["tiny/flux_dev"]["defaults"]["guidance_scale"] == 3.5  # of the family: the configuration says none
    assert told["tiny/flux_dev"]["defaults"]["steps"] == 4


def test_callers_of_a_base_that_cannot_be_served_are_told_why(families: Service) -> None:
    reason = f"{BROKEN} cannot be served: WanPipeline makes videos, and only images are served"
    reply = families.http.post("v1/images/generations", json=fields("video"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "base_unusable")
    assert reason in reply.json()["error"]["message"]
    # A stream may have begun by the time that Serve has said so, and then ends in the error.
    streamed = families.http.post("v1/images/generations", json=fields("video", stream=True))
    assert reason in streamed.text
