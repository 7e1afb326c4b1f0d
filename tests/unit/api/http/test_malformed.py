"""Requests that nobody should send: each is a 4xx of the contract's shape, and none reaches the service."""

from __future__ import annotations

import base64
import json
import os
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from serve_app.api.app import create_app
from serve_app.api.pictures.images import encode_image
from serve_app.config import IngressSettings
from serve_app.core import PixelImage
from tests.unit.api.fakes import FakeGateway, gradient

PNG = encode_image(gradient(16, 16), "png")
BASE64 = base64.b64encode(PNG).decode()

RAW: list[tuple[bytes, str]] = [
    (b"", "the body is empty"),
    (b" \r\n\t ", "the body is empty"),
    (b"elephant", "not JSON"),
    (b"{", "not JSON"),
    (b'{"inputs": "elephant"', "not JSON"),
    (b'{"inputs": "elephant"} trailing', "not JSON"),
    (b'{"inputs": "elephant",}', "not JSON"),
    (b"{'inputs': 'elephant'}", "not JSON"),
    (b'{inputs: "elephant"}', "not JSON"),
    (b'{"inputs": "line\nbreak"}', "not JSON"),
    (b'{"inputs": "\xff\xfe"}', "not JSON"),
    (b'{"inputs": "\\ud800"}', "not JSON"),
    (b'{"inputs": "\\x41"}', "not JSON"),
    ('{"inputs": "elephant"}'.encode("utf-16"), "not JSON"),
    (b'{"inputs": "elephant", "parameters": {"guidance_scale": NaN}}', "not JSON"),
    (b'{"inputs": "elephant", "parameters": {"guidance_scale": Infinity}}', "not JSON"),
    (b'{"inputs": "elephant", "parameters": {"guidance_scale": -Infinity}}', "not JSON"),
    (b'{"inputs": "elephant", "parameters": {"guidance_scale": 1e999}}', "guidance_scale.*finite"),
    (b'{"inputs": "elephant", "parameters": {"width": 1e999}}', "'width' must be an integer"),
    (b'{"inputs": "elephant", "parameters": {"width": 01}}', "not JSON"),
    (b'{"inputs": "elephant", "parameters": {"seed": ' + b"9" * 5000 + b"}}", ""),
    (b"[" * 100_000, "not JSON"),
    (b'{"a":' * 100_000, "not JSON"),
    (b'{"inputs": "elephant", "options": {"a": ' + b"[" * 20 + b"]" * 20 + b"}}", "16 levels"),
    (b'{"inputs": "elephant", "inputs": "lion"}', "has 'inputs' twice"),
    (b'{"inputs": "elephant", "parameters": {"seed": 1, "s\\u0065ed": 2}}', "has 'seed' twice"),
    (b"null", "the body must be an object, not null"),
    (b"[]", "the body must be an object, not an array"),
    (b"3", "the body must be an object, not an integer"),
    (b"true", "the body must be an object, not a boolean"),
    (b'"elephant"', "the body must be an object, not a string"),
    (b"inputs=elephant", "not JSON"),
    (b"\x1f\x8b\x08\x00compressed", "not JSON"),
    (b"\x89PNG\r\n\x1a\n", "'body' is not a readable"),
    (b"\xff\xd8\xff\xe0damaged", "'body' is not a readable"),
    (PNG[:60], "'body' is not a readable"),
]  # fmt: skip


def parameters(**values: Any) -> dict[str, Any]:
    return {"inputs": "elephant", "parameters": values}


BODIES: list[tuple[Any, str]] = [
    ({}, "'inputs' is missing"),
    ({"parameters": {}}, "'inputs' is missing"),
    ({"inputs": None}, "'inputs' is missing"),
    ({"inputs": 3}, "'inputs' must be a string, not an integer"),
    ({"inputs": True}, "'inputs' must be a string, not a boolean"),
    ({"inputs": ["elephant"]}, "'inputs' must be a string, not an array"),
    ({"inputs": {"text": "elephant"}}, "'inputs' must be a string, not an object"),
    ({"input": "elephant"}, "unknown parameter 'input'; did you mean 'inputs'"),
    ({"prompt": "elephant"}, "unknown parameter 'prompt'; it belongs inside 'parameters'"),
    ({"inputs": "elephant", "num_inference_steps": 3}, "it belongs inside 'parameters'"),
    ({"inputs": "elephant", "zzz": 3}, "unknown parameter 'zzz'; what there is: inputs, image"),
    ({"inputs": "elephant", "": 3}, "unknown parameter ''"),
    ({"inputs": "elephant", "k" * 10_000: 3}, "unknown parameter 'k"),
    ({"inputs": "elephant", "parameters": []}, "'parameters' must be an object, not an array"),
    ({"inputs": "elephant", "parameters": "steps"}, "'parameters' must be an object, not a string"),
    ({"inputs": "elephant", "options": 3}, "'options' must be an object, not an integer"),
    (parameters(num_steps=3), "did you mean 'num_inference_steps'"),
    (parameters(Seed=3), "did you mean 'seed'"),
    (parameters(safety_checker=None), "unknown parameter 'safety_checker'"),
    (parameters(width="64"), "'width' must be an integer, not a string"),
    (parameters(width=64.0), "'width' must be an integer, not 64.0"),
    (parameters(width=True), "'width' must be an integer, not a boolean"),
    (parameters(width=[64]), "'width' must be an integer, not an array"),
    (parameters(width=10**30), "'width' is 10"),
    (parameters(height=-(10**30)), "'height' is -10"),
    (parameters(num_inference_steps="many"), "'num_inference_steps' must be an integer"),
    (parameters(guidance_scale="7.5"), "'guidance_scale' must be a number, not a string"),
    (parameters(guidance_scale=False), "'guidance_scale' must be a number, not a boolean"),
    (parameters(guidance_scale=10**400), ""),
    (parameters(negative_prompt=["blurry"]), "'negative_prompt' must be a string"),
    (parameters(scheduler={"name": "DDIM"}), "'scheduler' must be a string"),
    (parameters(scheduler=""), "'scheduler' is 0 characters long"),
    (parameters(scheduler="S" * 257), "is 257 characters long, but must be at most 256 characters"),
    (parameters(seed=-1), "'seed' is -1, but must be at least 0"),
    (parameters(seed=2**63), "'seed' is 9223372036854775808"),
    (parameters(seed="-1"), "'seed' must be an integer, not a string"),
    (parameters(seed="0x10"), "'seed' must be an integer"),
    (parameters(seed=""), "'seed' must be an integer"),
    (parameters(seed="٣"), "'seed' must be an integer"),
    (parameters(seed="9" * 19), "'seed' is 9999999999999999999"),
    (parameters(seed="9" * 20), "'seed' must be an integer"),
    (parameters(seed=1.5), "'seed' must be an integer, not 1.5"),
    (parameters(seed=True), "'seed' must be an integer, not a boolean"),
    (parameters(num_images_per_prompt=2), "must be 1 here.*POST /v1/images/generations"),
    (parameters(num_images_per_prompt=0), "must be 1 here"),
    (parameters(strength=0.5), "'strength' is for image-to-image"),
    (parameters(target_size={"width": 64, "height": 64}), "'target_size' is for image-to-image"),
    (parameters(lora_adapter=3), "'lora_adapter' must be a string"),
    (parameters(lora_adapter="a" * 257), "'lora_adapter' is 257 characters long"),
    (parameters(lora_adapter="a/b", loras=["c/d"]), "both by 'lora_adapter' and by 'loras'"),
    (parameters(loras="a/b"), "'loras' must be an array, not a string"),
    (parameters(loras={"id": "a/b"}), "'loras' must be an array, not an object"),
    (parameters(loras=[3]), r"'loras\[0\]' must be an object, not an integer"),
    (parameters(loras=[None]), r"'loras\[0\]' must be an object, not null"),
    (parameters(loras=["a/b", ""]), r"'loras\[1\].id' is 0 characters long"),
    (parameters(loras=[{}]), r"'loras\[0\]' needs exactly one of 'id', 'name' and 'path'"),
    (parameters(loras=[{"id": "a/b", "path": "a/b"}]), "needs exactly one of"),
    (parameters(loras=[{"id": "a/b", "scale": 1, "weight": 1}]), "takes 'scale' or 'weight', not both"),
    (parameters(loras=[{"id": "a/b", "scale": "1"}]), r"'loras\[0\].scale' must be a number"),
    (parameters(loras=[{"id": "a/b", "scale": True}]), r"'loras\[0\].scale' must be a number"),
    (parameters(loras=[{"id": "a/b", "scale": 10**400}]), r"'loras\[0\].scale' must be a finite number"),
    (parameters(loras=[{"id": "a/b", "scale": {"unet": "1"}}]), r"'loras\[0\].scale.unet' must be a number"),
    (parameters(loras=[{"id": "a/b", "scale": {"unet": 1, "denoiser": 1}}]), "takes one of 'denoiser', 'unet' and"),
    (parameters(loras=[{"id": "a/b", "scale": {"textencoder": 1}}]), "scale.textencoder'; did you mean 'text_encoder'"),
    (parameters(loras=[{"id": "a/b", "scal": 1}]), r"'loras\[0\].scal'; did you mean 'scale'"),
    (parameters(loras=[{"id": 3}]), r"'loras\[0\].id' must be a string"),
    (parameters(loras=["a/b"] * 65), "'loras' is 65 entries long, but must be at most 64 entries"),
    ({"inputs": "elephant", "parameters": {"prompt": "a lion"}}, "'inputs' is not a readable PNG"),
    ({"inputs": "an elephant", "parameters": {"prompt": "a lion"}}, "'inputs' is not a picture in base64"),
    ({"image": "elephant!"}, "'image' is not a picture in base64"),
    ({"image": base64.b64encode(b"no picture").decode()}, "'image' is not a readable PNG"),
    ({"image": base64.b64encode(PNG[:70]).decode()}, "'image' is not a readable PNG"),
    ({"image": ""}, "'image' is not a readable PNG"),
    ({"image": BASE64, "inputs": "a", "parameters": {"prompt": "b"}}, "beside 'image'"),
    ({"image": 3}, "'image' must be a string"),
    ({"image": BASE64, "parameters": {"target_size": {"width": 64}}}, "'target_size.height' is missing"),
    ({"image": BASE64, "parameters": {"target_size": [64, 64]}}, "'target_size' must be an object"),
    ({"image": BASE64, "parameters": {"target_size": {"width": 8, "height": 8, "depth": 1}}}, "size.depth"),
    ({"image": BASE64, "parameters": {"target_size": {"width": 8, "height": 8}, "width": 8}}, "not both"),
    ({"image": BASE64, "parameters": {"strength": "0.5"}}, "'strength' must be a number"),
]  # fmt: skip

HEADERS: list[tuple[list[tuple[str, str]], str]] = [
    ([("lora", "a/b"), ("lora", "c/d")], "given more than once"),
    ([("lora", "a" * 257)], "'lora' is 257 characters long"),
    ([("accept", "application/json")], "none of 'application/json' can be served"),
    ([("accept", "image/gif, text/html;q=0.3")], "can be served"),
    ([("content-encoding", "gzip")], "content-encoding 'gzip'; send it uncompressed"),
]


def assert_refused(response: Any, gateway: FakeGateway, sentence: str) -> None:
    assert 400 <= response.status_code < 500, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error", "code"}
    assert re.search(sentence, body["error"]), body
    assert re.fullmatch("[a-z_]+", body["code"])
    assert len(body["error"]) < 500
    assert "Traceback" not in body["error"]
    assert "pydantic" not in body["error"]
    assert gateway.drafts == []


@pytest.mark.parametrize(("content", "sentence"), RAW, ids=range(len(RAW)))
@pytest.mark.parametrize("path", ["/", "/models/demo/sdxl"])
def test_a_body_that_is_no_request_is_refused(
    client: TestClient, gateway: FakeGateway, path: str, content: bytes, sentence: str
) -> None:
    assert_refused(client.post(path, content=content), gateway, sentence)


@pytest.mark.parametrize(("body", "sentence"), BODIES, ids=range(len(BODIES)))
def test_a_field_that_is_wrong_is_named(client: TestClient, gateway: FakeGateway, body: Any, sentence: str) -> None:
    assert_refused(client.post("/", content=json.dumps(body)), gateway, sentence)


@pytest.mark.parametrize(("headers", "sentence"), HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_is_wrong_is_named(
    client: TestClient, gateway: FakeGateway, headers: list[tuple[str, str]], sentence: str
) -> None:
    assert_refused(client.post("/", json={"inputs": "elephant"}, headers=headers), gateway, sentence)


def test_a_header_and_a_list_of_adapters_are_not_mixed(client: TestClient, gateway: FakeGateway) -> None:
    response = client.post("/", json=parameters(loras=["a/b"]), headers={"lora": "c/d"})
    assert_refused(response, gateway, "both by the header 'lora' and by 'loras'")


def test_text_that_says_it_is_a_picture_is_refused(client: TestClient, gateway: FakeGateway) -> None:
    response = client.post("/", content=b"no picture", headers={"content-type": "image/png"})
    assert_refused(response, gateway, "'body' is not a readable PNG")


# One for all examples: making an application takes longer than answering.
FUZZ_GATEWAY = FakeGateway()
FUZZ_CLIENT = TestClient(create_app(FUZZ_GATEWAY, IngressSettings(max_image_pixels=100_000)))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(BASE64),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    ["inputs", "image", "parameters", "options", "prompt", "seed", "width", "height", "loras", "lora_adapter",
     "strength", "target_size", "guidance_scale", "scheduler", "id", "scale"]
)  # fmt: skip
NEARLY = st.dictionaries(NAMES, JSON | st.dictionaries(NAMES, JSON, max_size=4), max_size=5)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=NEARLY | JSON)
def test_any_json_is_an_image_or_a_refusal(body: Any) -> None:
    response = FUZZ_CLIENT.post("/", content=json.dumps(body))
    if response.status_code == 200:
        assert len(FUZZ_GATEWAY.drafts) == 1
        FUZZ_GATEWAY.drafts.clear()
    else:
        assert_refused(response, FUZZ_GATEWAY, ".")


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_a_refusal(body: bytes) -> None:
    assert_refused(FUZZ_CLIENT.post("/", content=body), FUZZ_GATEWAY, ".")


# What JSON may weigh

NOISY = base64.b64encode(os.urandom(3_000_000)).decode()


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": "a" * 2_000_000},
        {"inputs": "a", "options": {"a": "b" * 1_100_000}},
        {"inputs": "a", "parameters": {"negative_prompt": NOISY}},
        {"image": NOISY, "inputs": "a", "options": {str(index): "c" * 1000 for index in range(1100)}},
        {"inputs": "a", **{f"{index:x}": 1 for index in range(5000)}},
        {"inputs": "a", "options": {"a": [[]] * 5000}},
        {"inputs": "a", "parameters": {"loras": [1] * 100_000}},
    ],
    ids=["prompt", "option", "picture elsewhere", "much beside a picture", "fields", "lists", "adapters"],
)
def test_json_beside_a_picture_has_a_limit_of_its_own(client: TestClient, gateway: FakeGateway, body: Any) -> None:
    response = client.post("/", content=json.dumps(body))
    assert response.json()["code"] in ("too_large", "malformed_request"), response.text
    assert response.status_code in (400, 413)
    assert gateway.drafts == []


@pytest.mark.parametrize("name", ["image", "inputs"])
def test_a_picture_in_base64_may_weigh_more_than_json(client: TestClient, gateway: FakeGateway, name: str) -> None:
    large = encode_image(PixelImage(700, 600, os.urandom(700 * 600 * 3)), "png")
    encoded = base64.b64encode(large).decode()
    bodies = [{name: encoded, "parameters": {"prompt": "a"}}, {name: f"data:image/png;base64,{encoded}"}]
    for body in bodies:
        response = client.post("/", content=json.dumps(body).replace("/", "\\/"))
        assert response.status_code == 200, response.text
        image = gateway.drafts.pop().image
        assert image is not None
        assert (image.width, image.height) == (700, 600)


def test_json_of_the_other_shape_has_the_limit_without_an_exception(client: TestClient, gateway: FakeGateway) -> None:
    for body in ({"prompt": "a" * 1_100_000}, {"prompt": "a", "loras": "[" + "1," * 50_000 + "1]"}):
        assert client.post("/v1/images/generations", json=body).status_code in (400, 413)
    assert gateway.drafts == []
