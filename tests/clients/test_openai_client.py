"""The OpenAI client that people have, against the real service: images, edits, streams, errors and retries."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.faults.breaking import replica_pids, resume, stop
from tests.service import Service

PROMPT = "a red circle on a blue background"
STEPS = 12
HTTP_GUIDE = (Path(__file__).parents[2] / "docs" / "http.md").read_text()


@pytest.fixture
def ai(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def pixels(encoded: str | None) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded or ""))).convert("RGB"))


def png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def left_half_mask(side: int) -> bytes:
    mask = np.zeros((side, side, 4), np.uint8)
    mask[:, side // 2 :, 3] = 255
    return png(mask)


def test_an_image_is_the_one_that_the_other_shape_gives(ai: openai.OpenAI, service: Service) -> None:
    reply = ai.images.generate(model="demo/sdxl-sepia", prompt=PROMPT, extra_body={"seed": 7})
    assert reply.data is not None
    assert np.array_equal(pixels(reply.data[0].b64_json), service.draw(PROMPT, model="demo/sdxl-sepia", seed=7))


def test_a_base_and_an_adapter_in_one_model_name_with_several_images(ai: openai.OpenAI, service: Service) -> None:
    reply = ai.images.generate(model="demo/sd15:demo/sd15-night", prompt=PROMPT, n=2, extra_body={"seed": 7})
    assert reply.data is not None
    first, second = (pixels(image.b64_json) for image in reply.data)
    alone = service.draw(PROMPT, model="demo/sd15-night", seed=8).astype(int)
    assert abs(second.astype(int) - alone).max() <= 1
    assert not np.array_equal(first, second)


def test_several_images_in_a_format_and_size_of_one_s_own(ai: openai.OpenAI, service: Service) -> None:
    reply = ai.images.generate(
        model="demo/sdxl", prompt=PROMPT, n=3, output_format="webp", output_compression=80,
        size="96x64", extra_body={"seed": 7, "loras": [{"id": "demo/sdxl-sepia", "scale": 0.5}]},
    )  # type: ignore[call-overload]  # fmt: skip
    decoded = [Image.open(io.BytesIO(base64.b64decode(image.b64_json))) for image in reply.data]
    assert [(picture.format, picture.size) for picture in decoded] == [("WEBP", (96, 64))] * 3
    assert reply.model_extra["loraplex"]["adapters"][0]["scale"] == 0.5


def test_an_edit_starts_from_the_picture(ai: openai.OpenAI, service: Service) -> None:
    source = service.draw(PROMPT, model="demo/sdxl", seed=7)

    def edited(strength: float) -> NDArray[Any]:
        reply = ai.images.edit(
            image=("a.png", png(source)), prompt=PROMPT, model="demo/sdxl", extra_body={"strength": strength, "seed": 1}
        )
        assert reply.data is not None
        return pixels(reply.data[0].b64_json).astype(int)

    near, far = edited(0.2), edited(1.0)
    assert near.shape == source.shape
    assert abs(near - source).mean() < abs(far - source).mean()


@pytest.mark.parametrize("base", ["demo/sdxl", "demo/sd15"])
def test_a_mask_keeps_every_pixel_that_it_covers(ai: openai.OpenAI, service: Service, base: str) -> None:
    source = service.draw(PROMPT, model=base, seed=7)
    reply = ai.images.edit(
        image=("a.png", png(source)), mask=("m.png", left_half_mask(64)), model=base,
        prompt="a green square on a yellow background", extra_body={"seed": 3},
    )  # fmt: skip
    assert reply.data is not None
    edited = pixels(reply.data[0].b64_json)
    assert np.array_equal(edited[:, 32:], source[:, 32:])
    assert abs(edited[:, :32].astype(int) - source[:, :32]).mean() > 10


def test_a_stream_shows_the_work_and_ends_in_the_same_image(ai: openai.OpenAI, service: Service) -> None:
    with ai.images.generate(
        model="demo/sdxl-night", prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7}
    ) as stream:
        events = [event.model_dump() for event in stream]
    progress = [(event["step"], event["steps"]) for event in events if event["type"].endswith(".progress")]
    assert progress[0] == (0, STEPS)
    assert progress[-1] == (STEPS, STEPS)
    assert progress == sorted(progress)
    previews = [event for event in events if event["type"] == "image_generation.partial_image"]
    assert [event["partial_image_index"] for event in previews] == [0, 1, 2]
    final = pixels(events[-1]["b64_json"])
    assert events[-1]["type"] == "image_generation.completed"
    assert np.array_equal(final, service.draw(PROMPT, model="demo/sdxl-night", seed=7))
    distances = [abs(pixels(event["b64_json"]).astype(int) - final).mean() for event in previews]
    assert distances[-1] < 20
    assert distances[-1] <= distances[0]


def test_an_edit_streams_too(ai: openai.OpenAI, service: Service) -> None:
    source = service.draw(PROMPT, model="demo/sd15", seed=7)
    with ai.images.edit(
        image=("a.png", png(source)), prompt="a star", model="demo/sd15", stream=True, partial_images=1,
        extra_body={"strength": 0.5, "seed": 1},
    ) as stream:  # fmt: skip
        events = [event.model_dump() for event in stream]
    assert [event["type"] for event in events if not event["type"].endswith("progress")] == [
        "image_edit.partial_image", "image_edit.completed",
    ]  # fmt: skip
    assert events[0]["steps"] == STEPS // 2


@contextmanager
def stopped_replicas(deployment: str) -> Iterator[Callable[[], None]]:
    """Hold all replicas of a base until what this yields is called."""
    pids = replica_pids(deployment, app="loraplex")
    assert pids

    def resume_all() -> None:
        for pid in pids:
            resume(pid)

    try:
        for pid in pids:
            stop(pid)
        yield resume_all
    finally:
        resume_all()


def test_a_stream_begins_before_anything_is_drawn(service: Service) -> None:
    body = {"model": "demo/sdxl", "prompt": PROMPT, "stream": True}
    with (
        stopped_replicas("base-demo--sdxl") as resume_all,
        httpx.stream("POST", f"{service.url}/v1/images/generations", json=body, timeout=120, trust_env=False) as reply,
    ):
        lines = reply.iter_lines()
        # The replica is held: what comes now is told by those before it.
        assert next(lines) == "event: image_generation.progress"
        assert json.loads(next(lines).removeprefix("data: "))["step"] == 0
        resume_all()
        assert "event: image_generation.completed" in lines


def test_errors_are_told_before_and_in_a_stream(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="demo/nope"):
        ai.images.generate(model="demo/nope", prompt=PROMPT, stream=True)
    with pytest.raises(openai.BadRequestError, match="made for demo/sdxl") as caught:
        ai.images.generate(model="demo/sd15:demo/sdxl-sepia", prompt=PROMPT)
    assert caught.value.code == "base_mismatch"
    with pytest.raises(openai.BadRequestError) as size:
        ai.images.generate(model="demo/sdxl", prompt=PROMPT, size="4096x4096", stream=True)  # type: ignore[call-overload]
    assert size.value.param == "size"


def test_a_deadline_ends_either_shape(ai: openai.OpenAI) -> None:
    slow: dict[str, Any] = {"num_inference_steps": 50, "size": "128x128"}
    header = {"x-request-timeout-s": "0.1"}
    with pytest.raises(openai.InternalServerError) as caught:
        ai.images.generate(model="demo/sdxl", prompt=PROMPT, n=4, extra_body=slow, extra_headers=header)
    assert caught.value.status_code == 504
    with (
        # Either it was stopped, or what waits before it leaves it no time.
        pytest.raises(openai.APIError, match=r"0\.1 s"),
        ai.images.generate(
            model="demo/sdxl", prompt=PROMPT, n=4, stream=True, extra_body=slow, extra_headers=header
        ) as stream,
    ):
        list(stream)


def test_an_edit_of_several_pictures_with_adapters_as_the_client_writes_them(
    ai: openai.OpenAI, service: Service
) -> None:
    source = png(service.draw(PROMPT, model="demo/sdxl", seed=7))
    raw = ai.images.with_raw_response.edit(
        image=[("a.png", source), ("b.png", source)], prompt=PROMPT, model="demo/sdxl", response_format="url",
        input_fidelity="high", extra_body={"seed": 1, "loras": [{"id": "demo/sdxl-sepia", "scale": 0.5}]},
    )  # fmt: skip
    reply = raw.parse()
    assert reply.data is not None
    prefix, _, encoded = (reply.data[0].url or "").partition(",")
    assert prefix == "data:image/png;base64"
    assert pixels(encoded).shape == (64, 64, 3)
    assert raw.headers["x-adapters"].startswith("demo/sdxl-sepia@")
    assert len(raw.headers.get_list("x-warning")) == 2


def test_models_are_listed(ai: openai.OpenAI) -> None:
    assert {"demo/sdxl", "demo/sd15", "demo/sdxl-sepia"} <= {model.id for model in ai.models.list()}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", HTTP_GUIDE, re.DOTALL)


@pytest.mark.parametrize("block", blocks("bash") + blocks("python"))
def test_every_example_of_the_guide_works(service: Service, tmp_path: Path, block: str) -> None:
    example = block.replace("127.0.0.1:8000", urlsplit(service.url).netloc)
    shell = ["bash", "-ec", example] if example.startswith("curl") else [sys.executable, "-W", "ignore", "-c", example]
    subprocess.run(shell, cwd=tmp_path, timeout=120, check=True)
    for made in tmp_path.iterdir():
        if made.suffix in (".png", ".jpg"):
            with Image.open(made) as picture:
                assert picture.size == (64, 64)
        else:
            assert "b64_json" in made.read_text()
