"""Real clients over a real server on loopback."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.inference._generated.types import ImageToImageTargetSize
from PIL import Image

from serve_app.api.pictures.images import encode_image
from serve_app.core import AdapterRef, Encoding, UnresolvedRequest
from serve_app.errors import ModelNotFound
from tests.service import connect, posted
from tests.unit.api.fakes import FakeGateway, gradient

PICTURE = gradient(40, 24)
PNG = encode_image(PICTURE, "png")


def test_huggingface_text_to_image(url: str, gateway: FakeGateway) -> None:
    client = InferenceClient(model=f"{url}/models/demo/sdxl-sepia", token="hf_unused")
    image = client.text_to_image(
        "an elephant", negative_prompt="blurry", width=80, height=48, num_inference_steps=7,
        guidance_scale=2.5, scheduler="DDIMScheduler", seed=3,
    )  # fmt: skip
    assert image.size == (80, 48)
    assert image.format == "PNG"
    assert gateway.draft == UnresolvedRequest(
        "an elephant", model="demo/sdxl-sepia", negative_prompt="blurry", width=80, height=48, steps=7,
        guidance_scale=2.5, scheduler="DDIMScheduler", seed=3, encoding=Encoding("png"),
    )  # fmt: skip


def test_huggingface_names_adapters_by_header_and_by_extra_body(url: str, gateway: FakeGateway) -> None:
    InferenceClient(model=url, headers={"lora": "demo/sdxl-sepia"}).text_to_image("elephant")
    InferenceClient(model=url).text_to_image("elephant", extra_body={"loras": [{"id": "a/b", "scale": 0.5}]})
    assert [draft.adapters for draft in gateway.drafts] == [
        (AdapterRef("demo/sdxl-sepia"),),
        (AdapterRef("a/b", 0.5),),
    ]


def test_huggingface_image_to_image_with_and_without_parameters(url: str, gateway: FakeGateway) -> None:
    client = InferenceClient(model=url)
    size = ImageToImageTargetSize(width=80, height=48)  # type: ignore[call-arg]
    assert client.image_to_image(PNG).size == (40, 24)
    assert client.image_to_image(PNG, num_inference_steps=4).size == (40, 24)
    assert client.image_to_image(PNG, "elephant", strength=0.3, target_size=size).size == (80, 48)
    assert gateway.drafts == [
        replace(draft, encoding=Encoding("png"))
        for draft in (
            UnresolvedRequest("", image=PICTURE),
            UnresolvedRequest("", image=PICTURE, steps=4),
            UnresolvedRequest("elephant", image=PICTURE, strength=0.3, width=80, height=48),
        )
    ]


def test_huggingface_shows_the_error_of_the_service(url: str, gateway: FakeGateway) -> None:
    gateway.failure = ModelNotFound("demo/nope")
    with pytest.raises(HfHubHTTPError, match="model demo/nope was not found"):
        InferenceClient(model=f"{url}/models/demo/nope").text_to_image("elephant")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    ("arguments", "adapters"),
    [
        ([], ()),
        (["-H", "lora: demo/sdxl-sepia"], (AdapterRef("demo/sdxl-sepia"),)),
        (["-H", "lora: demo/sdxl-pixel"], (AdapterRef("demo/sdxl-pixel"),)),
        (["-H", "lora;"], ()),
    ],
)
def test_the_plain_curl_lines_work(
    url: str, gateway: FakeGateway, tmp_path: Path, arguments: list[str], adapters: tuple[AdapterRef, ...]
) -> None:
    body = '{"inputs": "elephant", "parameters": {"num_inference_steps": 20}}'
    target = tmp_path / "image.jpg"
    command = ["curl", "-sSf", *arguments, url.removeprefix("http://"), "-d", body, "-o", str(target)]
    subprocess.run(command, check=True, timeout=120)
    with Image.open(target) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
    assert gateway.draft == UnresolvedRequest("elephant", steps=20, adapters=adapters, encoding=Encoding("jpeg"))


@pytest.mark.parametrize(
    ("path", "body"), [("/", {"inputs": "elephant"}), ("/v1/images/generations", {"prompt": "elephant"})]
)
def test_a_caller_who_hangs_up_while_waiting_cancels_the_generation(
    url: str, gateway: FakeGateway, path: str, body: dict[str, str]
) -> None:
    gateway.is_stuck = True
    with connect(url) as caller:
        caller.sendall(posted(path, body))
        assert gateway.started.wait(60)
        assert not gateway.cancelled.is_set()
    assert gateway.cancelled.wait(60)


def test_a_caller_who_hangs_up_amid_the_body_starts_nothing(url: str, gateway: FakeGateway) -> None:
    with connect(url) as caller:
        caller.sendall(b'POST / HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1000\r\n\r\n{"inputs": "ele')
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("GET", "/")
    assert connection.getresponse().read() == b'{"ok":"ok"}'
    connection.close()
    assert gateway.drafts == []


def test_status_is_answered_while_a_generation_runs(url: str, gateway: FakeGateway) -> None:
    gateway.is_stuck = True
    with connect(url) as caller:
        caller.sendall(posted("/", {"inputs": "elephant"}))
        assert gateway.started.wait(60)
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().read() == b'{"ok":"ok"}'
        connection.close()
        assert not gateway.cancelled.is_set()


def test_a_body_that_is_too_long_by_its_header_is_refused_before_it_is_sent(url: str) -> None:
    with connect(url) as caller:
        caller.sendall(
            b"POST / HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-length: 999999999999\r\n\r\n"
        )
        reply = caller.makefile("rb").read()
    head, _, content = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert json.loads(content)["code"] == "too_large"


def test_connections_stay_open_between_requests(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    for _ in range(3):
        connection.request("POST", "/", b'{"inputs": "elephant"}', {"accept": "image/png"})
        response = connection.getresponse()
        assert response.read().startswith(b"\x89PNG")
        assert response.headers["connection"] is None
    connection.close()
