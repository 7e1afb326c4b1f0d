from __future__ import annotations

import base64
import io
import re
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from serve_app.api.pictures.images import decode_image, encode_image
from serve_app.core import AdapterRef, Encoding, Scales, UnresolvedRequest
from tests.unit.api.fakes import FakeGateway, gradient

PICTURE = gradient(40, 24)
PNG = encode_image(PICTURE, "png")
BASE64 = base64.b64encode(PNG).decode()
JPEG = Encoding("jpeg")


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_a_prompt_alone_leaves_everything_to_the_base(client: TestClient, gateway: FakeGateway) -> None:
    response = client.post("/", json={"inputs": "an elephant"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/jpeg"
    assert opened(response.content).format == "JPEG"
    assert gateway.draft == UnresolvedRequest(prompt="an elephant", encoding=JPEG)


def test_every_parameter_arrives(client: TestClient, gateway: FakeGateway) -> None:
    parameters = {
        "negative_prompt": "blurry", "height": 72, "width": 96, "num_inference_steps": 11,
        "guidance_scale": 3, "scheduler": "DDIMScheduler", "seed": 41, "num_images_per_prompt": 1,
    }  # fmt: skip
    assert client.post("/", json={"inputs": "elephant", "parameters": parameters}).status_code == 200
    assert gateway.draft == UnresolvedRequest(
        prompt="elephant", negative_prompt="blurry", height=72, width=96, steps=11, guidance_scale=3.0,
        scheduler="DDIMScheduler", seed=41, encoding=JPEG,
    )  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": "elephant"},
        {"inputs": "elephant", "parameters": None},
        {"inputs": "elephant", "parameters": {}, "options": {"wait_for_model": True}, "image": None},
        {
            "inputs": "elephant",
            "parameters": {"seed": None, "width": None, "loras": None, "lora_adapter": ""},
        },
        {"inputs": "elephant", "parameters": {"loras": [], "target_size": None, "prompt": None}},
    ],
)
def test_null_and_empty_mean_absent(client: TestClient, gateway: FakeGateway, body: dict[str, Any]) -> None:
    headers = {"x-wait-for-model": "true", "x-use-cache": "0", "x-load-model": "1"}
    assert client.post("/", json=body, headers=headers).status_code == 200
    assert gateway.draft == UnresolvedRequest(prompt="elephant", encoding=JPEG)


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/x-www-form-urlencoded", "text/plain", "image/png", "nonsense", ""],
)
def test_json_is_read_whatever_the_content_type_says(
    client: TestClient, gateway: FakeGateway, content_type: str
) -> None:
    response = client.post("/", content=b'\n {"inputs": "\xc3\xa9lan"}', headers={"content-type": content_type})
    assert response.status_code == 200
    assert gateway.draft.prompt == "élan"


def test_a_byte_order_mark_is_passed_over(client: TestClient, gateway: FakeGateway) -> None:
    assert client.post("/", content='\ufeff{"inputs": "b"}'.encode()).status_code == 200
    assert gateway.draft.prompt == "b"


@pytest.mark.parametrize("seed", [0, 2**63 - 1, "0", "41", "9223372036854775807"])
def test_a_seed_is_a_number_or_its_digits(client: TestClient, gateway: FakeGateway, seed: Any) -> None:
    assert client.post("/", json={"inputs": "a", "parameters": {"seed": seed}}).status_code == 200
    assert gateway.draft.seed == int(seed)


@pytest.mark.parametrize("path", ["/models/demo/sdxl-sepia", "/models/demo/sdxl-sepia/", "/models/demo%2Fsdxl-sepia"])
def test_the_path_names_the_model(client: TestClient, gateway: FakeGateway, path: str) -> None:
    assert client.post(path, json={"inputs": "elephant"}).status_code == 200
    assert gateway.draft.model == "demo/sdxl-sepia"


@pytest.mark.parametrize("path", ["/models/", "/models//", "/models/" + "a" * 300])
def test_a_path_that_can_be_no_model_is_404(client: TestClient, gateway: FakeGateway, path: str) -> None:
    response = client.post(path, json={"inputs": "elephant"})
    assert (response.status_code, response.json()["code"]) == (404, "model_not_found")
    assert gateway.drafts == []


ONE = (AdapterRef("demo/sdxl-sepia"),)


@pytest.mark.parametrize(
    ("header", "parameters", "adapters"),
    [
        ("demo/sdxl-sepia", {}, ONE),
        (" demo/sdxl-sepia ", {"lora_adapter": "demo/other"}, ONE),
        ("", {}, ()),
        ("", {"lora_adapter": "demo/other"}, ()),
        (None, {"lora_adapter": "demo/sdxl-sepia"}, ONE),
        (None, {"loras": [{"id": "demo/sdxl-sepia"}]}, ONE),
        (None, {"loras": ["demo/sdxl-sepia"]}, ONE),
        (None, {"loras": [{"name": "a/b", "weight": 0.5}]}, (AdapterRef("a/b", 0.5),)),
        (None, {"loras": [{"path": "a/b", "scale": -1, "revision": "v2"}]}, (AdapterRef("a/b", -1.0, "v2"),)),
        (None, {"loras": [{"id": "a/b", "scale": 0, "weight": None}]}, (AdapterRef("a/b", 0.0),)),
        (
            None,
            {"loras": [{"id": "a/b", "scale": {"denoiser": 0.8, "text_encoder": 0}}]},
            (AdapterRef("a/b", Scales(0.8, 0.0)),),
        ),
        (
            None,
            {"loras": [{"id": "a/b", "weight": {"unet": 2, "transformer": None}}]},
            (AdapterRef("a/b", Scales(2.0, 1.0)),),
        ),
        (
            None,
            {"loras": [{"id": "a/b", "scale": {"transformer": 0.5, "text_encoder": 0.5}}]},
            (AdapterRef("a/b", 0.5),),
        ),
        (None, {"loras": [{"id": "a/b", "scale": {}}]}, (AdapterRef("a/b", 1.0),)),
        (None, {"loras": [{"id": "a/b", "filename": "x.safetensors"}, "c/d"]},
         (AdapterRef("a/b", filename="x.safetensors"), AdapterRef("c/d"))),
    ],
)  # fmt: skip
def test_adapters_are_named_by_header_or_parameter(
    client: TestClient,
    gateway: FakeGateway,
    header: str | None,
    parameters: dict[str, Any],
    adapters: tuple[AdapterRef, ...],
) -> None:
    headers = {} if header is None else {"lora": header}
    response = client.post("/", json={"inputs": "elephant", "parameters": parameters}, headers=headers)
    assert response.status_code == 200, response.text
    assert gateway.draft.adapters == adapters


@pytest.mark.parametrize(
    ("accept", "form"),
    [("image/png", "PNG"), ("image/webp;q=0.9,image/png;q=0.1", "WEBP"), ("image/*", "JPEG")],
)
def test_the_reply_is_in_the_format_asked_for(client: TestClient, accept: str, form: str) -> None:
    response = client.post("/", json={"inputs": "elephant"}, headers={"accept": accept})
    assert opened(response.content).format == form
    assert response.headers["content-type"] == f"image/{form.lower()}"
    assert "content-encoding" not in response.headers


def test_an_unacceptable_format_is_refused_before_anything_is_drawn(client: TestClient, gateway: FakeGateway) -> None:
    response = client.post("/", json={"inputs": "elephant"}, headers={"accept": "application/json"})
    assert (response.status_code, response.json()["code"]) == (406, "not_acceptable")
    assert gateway.drafts == []


def test_a_png_reply_is_the_very_pixels(client: TestClient) -> None:
    response = client.post("/", json={"inputs": "elephant"}, headers={"accept": "image/png"})
    assert decode_image(response.content, "reply", max_pixels=10_000) == gradient(64, 64)


def test_separate_scales_are_told_in_the_reply(client: TestClient) -> None:
    lora = {"id": "a/b", "scale": {"unet": 0.8, "text_encoder": 0.3}}
    response = client.post("/", json={"inputs": "elephant", "parameters": {"loras": [lora]}})
    assert response.headers["x-adapters"] == "a/b@0123abcd;0.8/0.3;48/50"
    response = client.post("/v1/images/generations", json={"prompt": "elephant", "lora": lora})
    assert response.json()["loraplex"]["adapters"][0]["scale"] == {"denoiser": 0.8, "text_encoder": 0.3}


def test_the_headers_tell_how_the_image_came_about(client: TestClient, gateway: FakeGateway) -> None:
    gateway.warnings = ("the prompt was cut after 'größte'\r\nx-evil: 1",)
    response = client.post(
        "/",
        json={"inputs": "größer", "parameters": {"loras": [{"id": "a/b", "scale": 0.8}, "c/ü"], "seed": 5}},
    )
    expected = {
        "x-compute-type": "cpu",
        "x-compute-time": "0.453",
        "x-compute-characters": "6",
        "x-seed": "5",
        "x-base-model": "demo/sdxl",
        "x-adapters": "a/b@0123abcd;0.8;48/50, c/%C3%BC@0123abcd;1;48/50",
        "x-batch-size": "1",
        "x-warning": "the prompt was cut after 'gr\\xf6\\xdfte' x-evil: 1",
        "x-request-id": "made-id",
    }
    assert {name: response.headers.get(name) for name in expected} == expected
    timing = response.headers["server-timing"]
    assert timing.startswith(
        "queue;dur=1.0, fetch;dur=2.0, swap;dur=3.2, suspended;dur=7.0, denoise;dur=400.0, decode;dur=50.0, "
    )
    assert re.search(r"parse;dur=[0-9.]+, hop;dur=[0-9.]+, encode;dur=[0-9.]+, total;dur=[0-9.]+$", timing)
    exposed = response.headers["access-control-expose-headers"].split(", ")
    assert {*expected, "server-timing"} <= set(exposed)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("abc-1.2:3_x", "abc-1.2:3_x"), (None, "made-id"), ("", "made-id"), ("a" * 129, "made-id"),
        ("a b", "made-id"), ("<script>", "made-id"),
    ],
)  # fmt: skip
def test_a_sane_request_id_is_kept_and_any_other_replaced(
    client: TestClient, gateway: FakeGateway, given: str | None, used: str
) -> None:
    headers = {} if given is None else {"x-request-id": given}
    response = client.post("/", json={"inputs": "elephant"}, headers=headers)
    assert response.headers["x-request-id"] == used
    assert gateway.request_ids == [used]


PICTURE_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"inputs": BASE64, "parameters": {"prompt": "elephant"}}, "elephant"),
    ({"image": BASE64, "parameters": {"prompt": "elephant"}}, "elephant"),
    ({"image": BASE64, "inputs": "", "parameters": {"prompt": "elephant"}}, "elephant"),
    ({"image": BASE64, "inputs": "elephant"}, "elephant"),
    ({"image": BASE64}, ""),
    ({"inputs": BASE64}, ""),
    ({"inputs": f"data:image/png;base64,{BASE64}"}, ""),
    ({"inputs": BASE64, "parameters": {"prompt": ""}}, ""),
]


@pytest.mark.parametrize(("body", "prompt"), PICTURE_REQUESTS)
def test_a_picture_in_base64_makes_image_to_image(
    client: TestClient, gateway: FakeGateway, body: dict[str, Any], prompt: str
) -> None:
    response = client.post("/", json=body)
    assert response.status_code == 200, response.text
    assert gateway.draft == UnresolvedRequest(prompt=prompt, image=PICTURE, encoding=JPEG)
    assert opened(response.content).size == (40, 24)


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", None])
def test_raw_picture_bytes_make_image_to_image_without_a_prompt(
    client: TestClient, gateway: FakeGateway, content_type: str | None
) -> None:
    headers = {"lora": "demo/sdxl-sepia"} | ({"content-type": content_type} if content_type else {})
    response = client.post("/models/demo/sdxl", content=PNG, headers=headers)
    assert response.status_code == 200
    assert gateway.draft == UnresolvedRequest(prompt="", model="demo/sdxl", adapters=ONE, image=PICTURE, encoding=JPEG)


@pytest.mark.parametrize("size", [{"target_size": {"width": 80, "height": 48}}, {"width": 80, "height": 48}])
def test_the_output_has_the_size_asked_for(client: TestClient, gateway: FakeGateway, size: dict[str, Any]) -> None:
    body = {"inputs": BASE64, "parameters": {"prompt": "elephant", "strength": 0.5, **size}}
    response = client.post("/", json=body)
    assert opened(response.content).size == (80, 48)
    draft = gateway.draft
    assert (draft.width, draft.height, draft.strength, draft.image) == (80, 48, 0.5, PICTURE)
