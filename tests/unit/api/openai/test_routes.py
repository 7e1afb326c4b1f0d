"""The OpenAI shape, through the real client over a real server on loopback."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient

from serve_app.api.app import create_app
from serve_app.api.pictures.images import decode_image, encode_image
from serve_app.catalog.replica_report import ModelInfo
from serve_app.config import IngressSettings
from serve_app.core import AdapterRef, Encoding, UnresolvedRequest
from serve_app.errors import ModelNotFound, OutOfBounds, QueueFull
from serve_app.refusals import RankTooHigh
from tests.unit.api.fakes import FakeGateway, gradient

PICTURE = gradient(40, 24)
PNG = encode_image(PICTURE, "png")


def mask_png(width: int, height: int) -> bytes:
    """A mask whose left half is transparent."""
    mask = Image.new("RGBA", (width, height), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, width // 2, height))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()


KNOWN = (
    ModelInfo("demo/sd15", None, "loraplex", 0),
    ModelInfo("demo/sdxl", None, "loraplex", 0),
    ModelInfo("demo/sdxl-sepia", "demo/sdxl", "demo", 1_700_000_000),
)


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_a_prompt_alone_gives_one_png(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    reply = ai.images.generate(prompt="an elephant")
    assert gateway.draft == UnresolvedRequest("an elephant", encoding=Encoding("png"))
    assert reply.data is not None
    (image,) = reply.data
    assert decode_image(base64.b64decode(image.b64_json or ""), "reply", max_pixels=10_000) == gradient(64, 64)
    assert (reply.output_format, reply.size, reply.background) == ("png", "64x64", "opaque")
    assert reply.created > 1_700_000_000
    assert reply.usage is not None
    assert reply.usage.total_tokens == 0


def test_every_field_arrives_and_the_reply_tells_how(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    reply = ai.images.generate(
        model="demo/sdxl:demo/sdxl-sepia", prompt="elephant", n=3, size="80x48",  # type: ignore[arg-type]
        response_format="b64_json", output_format="webp", output_compression=40, quality="high",
        background="opaque", user="someone",
        extra_body={
            "negative_prompt": "blurry", "num_inference_steps": 5, "guidance_scale": 2, "seed": "9",
            "scheduler": "DDIMScheduler", "loras": [{"id": "a/b", "scale": 0.5}], "lora": None,
        },
    )  # fmt: skip
    assert gateway.draft == UnresolvedRequest(
        "elephant", model="demo/sdxl", adapters=(AdapterRef("demo/sdxl-sepia"), AdapterRef("a/b", 0.5)),
        negative_prompt="blurry", width=80, height=48, steps=5, guidance_scale=2.0,
        scheduler="DDIMScheduler", seed=9, num_images=3, encoding=Encoding("webp", 40),
    )  # fmt: skip
    assert reply.data is not None
    for image in reply.data:
        with Image.open(io.BytesIO(base64.b64decode(image.b64_json or ""))) as opened:
            assert (opened.format, opened.size) == ("WEBP", (80, 48))
    assert len(reply.data) == 3
    assert reply.model_extra is not None
    assert reply.model_extra["loraplex"] == {
        "seed": 9,
        "base_model": "demo/sdxl",
        "adapters": [
            {"id": name, "revision": "0123abcd", "scale": scale, "layers_matched": 48, "layers_in_file": 50}
            for name, scale in (("demo/sdxl-sepia", 1.0), ("a/b", 0.5))
        ],
        "timing_ms": {
            "queue": 1.0,
            "fetch": 2.0,
            "swap": 3.25,
            "suspended": 7.0,
            "denoise": 400.0,
            "decode": 50.0,
            "encode": 0.0,
        },
        "warnings": [],
    }


@pytest.mark.parametrize(
    ("value", "adapters"),
    [
        ("a/b", (AdapterRef("a/b"),)),
        ({"name": "a/b", "weight": 2}, (AdapterRef("a/b", 2.0),)),
        (["a/b", {"path": "c/d"}], (AdapterRef("a/b"), AdapterRef("c/d"))),
        ('{"id": "a/b", "scale": 0.5}', (AdapterRef("a/b", 0.5),)),
        (' ["a/b", {"id": "c/d"}]', (AdapterRef("a/b"), AdapterRef("c/d"))),
        ("", ()),
        ([], ()),
        (None, ()),
    ],
)
@pytest.mark.parametrize("field", ["lora", "loras"])
def test_adapters_come_in_every_form(
    client: TestClient, gateway: FakeGateway, field: str, value: Any, adapters: tuple[AdapterRef, ...]
) -> None:
    response = client.post("/v1/images/generations", json={"prompt": "elephant", field: value})
    assert response.status_code == 200, response.text
    assert gateway.draft.adapters == adapters


def test_an_edit_takes_a_picture_and_text_fields(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    reply = ai.images.edit(
        image=("elephant.png", PNG), prompt="a lion", model="demo/sdxl", n=2, output_format="jpeg",
        extra_body={"strength": 0.4, "seed": 7, "num_inference_steps": 5, "guidance_scale": 2,
                    "lora": '{"id": "a/b", "scale": 0.5}'},
    )  # fmt: skip
    assert gateway.draft == UnresolvedRequest(
        "a lion", model="demo/sdxl", adapters=(AdapterRef("a/b", 0.5),), num_images=2, image=PICTURE,
        strength=0.4, seed=7, steps=5, guidance_scale=2.0, encoding=Encoding("jpeg"),
    )  # fmt: skip
    assert reply.data is not None
    assert (len(reply.data), reply.size, reply.output_format) == (2, "40x24", "jpeg")


def test_an_edit_takes_a_list_of_one_picture_and_a_list_of_adapters(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    ai.images.edit(image=[("a.png", PNG)], prompt="a lion", size="80x48", extra_body={"loras": ["a/b", "c/d"]})  # type: ignore[arg-type]
    assert gateway.draft.adapters == (AdapterRef("a/b"), AdapterRef("c/d"))
    assert (gateway.draft.width, gateway.draft.height, gateway.draft.image) == (80, 48, PICTURE)


def test_adapters_come_as_fields_of_a_form_too(client: TestClient, gateway: FakeGateway) -> None:
    numbered = {"loras[0][id]": "a/b", "loras[0][scale]": "0.5", "loras[1][path]": "c/d"}
    columns = {"loras[][id]": ["a/b", "c/d"], "loras[][scale]": ["0.5", "1"]}
    for fields in (numbered, columns):
        reply = client.post("/v1/images/edits", data={"prompt": "a", **fields}, files={"image": PNG})
        assert reply.status_code == 200, reply.text
        assert gateway.drafts.pop().adapters == (
            AdapterRef("a/b", 0.5),
            AdapterRef("c/d", 1.0 if fields is columns else None),
        )
    single = {"lora[name]": "mine", "lora[path]": "a/b", "lora[weight]": "-2"}
    assert client.post("/v1/images/edits", data={"prompt": "a", **single}, files={"image": PNG}).status_code == 200
    assert gateway.draft.adapters == (AdapterRef("a/b", -2.0),)


def test_an_image_comes_as_an_address_that_holds_it(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    reply = ai.images.generate(prompt="a", response_format="url", output_format="webp")
    assert reply.data is not None
    assert reply.data[0].b64_json is None
    with Image.open(io.BytesIO(base64.b64decode((reply.data[0].url or "").split(",")[1]))) as image:
        assert (image.format, image.size) == ("WEBP", (64, 64))
    assert (reply.data[0].url or "").startswith("data:image/webp;base64,")


def test_a_model_called_dall_e_answers_with_addresses_where_nothing_else_is_asked(ai: openai.OpenAI) -> None:
    for asked, has_url in ({}, True), ({"response_format": "b64_json"}, False):
        (image,) = ai.images.generate(prompt="a", model="dall-e-3", **asked).data or ()
        assert (image.url is not None, image.b64_json is not None) == (has_url, not has_url)


def test_all_pictures_of_an_edit_reach_the_service_in_their_order(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    second = gradient(8, 8)
    ai.images.edit(prompt="a", image=[("a.png", PNG), ("b.png", encode_image(second, "png"))])
    assert (gateway.draft.image, gateway.draft.references) == (PICTURE, (second,))


def test_the_pictures_of_an_edit_are_bounded_together(gateway: FakeGateway) -> None:
    half = encode_image(gradient(64, 48), "png")
    client = TestClient(create_app(gateway, IngressSettings(max_image_pixels=5000)))
    reply = client.post("/v1/images/edits", data={"prompt": "a"}, files=[("image[]", half), ("image[]", half)])
    assert (reply.status_code, "together" in reply.text) == (413, True)
    assert gateway.drafts == []


def test_what_other_services_take_is_accepted_with_a_warning(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    unused: dict[str, Any] = {"style": "vivid", "moderation": "low", "background": "transparent"}
    raw = ai.images.with_raw_response.generate(prompt="a", **unused)
    told = raw.headers.get_list("x-warning")
    assert [name for name in unused if any(f"'{name}'" in warning for warning in told)] == list(unused)
    assert raw.http_response.json()["loraplex"]["warnings"] == told
    edited = ai.images.with_raw_response.edit(prompt="a", image=("a.png", PNG), input_fidelity="high")
    assert "'input_fidelity'" in edited.headers["x-warning"]
    with ai.images.with_streaming_response.generate(prompt="a", stream=True, style="natural") as streamed:
        assert "'style'" in streamed.headers["x-warning"]
        assert "'style' changes nothing" in streamed.read().decode()


def test_a_request_that_needs_no_warning_has_none(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    assert "x-warning" not in ai.images.with_raw_response.generate(prompt="a", background="opaque").headers


def test_the_transparent_part_of_a_mask_is_what_is_drawn_anew(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    ai.images.edit(image=("a.png", PNG), mask=("m.png", mask_png(40, 24)), prompt="a lion")
    mask = gateway.draft.mask
    assert mask is not None
    assert (mask.width, mask.height) == (40, 24)
    assert mask.values == (b"\xff" * 20 + b"\x00" * 20) * 24


def test_models_are_listed_and_described(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.known = KNOWN
    assert [model.id for model in ai.models.list()] == [info.id for info in KNOWN]
    model = ai.models.retrieve("demo/sdxl-sepia").model_dump()
    assert model.items() >= {
        "id": "demo/sdxl-sepia", "object": "model", "created": 1_700_000_000, "owned_by": "demo",
        "root": "demo/sdxl", "parent": "demo/sdxl",
    }.items()  # fmt: skip
    base = ai.models.retrieve("demo/sdxl").model_dump()
    assert (base["root"], base["parent"]) == ("demo/sdxl", None)
    with pytest.raises(openai.NotFoundError, match="demo/nope was not found"):
        ai.models.retrieve("demo/nope")


def test_a_long_list_of_models_comes_in_pages(client: TestClient, gateway: FakeGateway) -> None:
    gateway.known = tuple(ModelInfo(f"a/{i}", "demo/sdxl", "a", 0) for i in range(2300))
    seen: list[str] = []
    after: dict[str, str] = {}
    sizes: list[int] = []
    while True:
        page = client.get("/v1/models", params=after).json()
        seen += [model["id"] for model in page["data"]]
        sizes.append(len(page["data"]))
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert sizes == [1000, 1000, 300]
    assert seen == [info.id for info in gateway.known]
    assert len(client.get("/v1/models", params={"limit": "7"}).json()["data"]) == 7


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "limit=-1", "limit=", "after=a/b"])
def test_a_wrong_page_is_refused(client: TestClient, query: str) -> None:
    assert client.get(f"/v1/models?{query}").status_code in (400, 404)


def test_errors_have_the_shape_that_the_client_reads(ai: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.failure = ModelNotFound("demo/nope")
    with pytest.raises(openai.NotFoundError) as caught:
        ai.images.generate(prompt="elephant", model="demo/nope")
    assert caught.value.code == "model_not_found"
    assert caught.value.type == "invalid_request_error"
    gateway.failure = RankTooHigh("a/b", "its rank is 999")
    with pytest.raises(openai.UnprocessableEntityError, match="its rank is 999"):
        ai.images.generate(prompt="elephant")
    gateway.failure = OutOfBounds("num_images_per_prompt", 9, "from 1 to 4")
    with pytest.raises(openai.BadRequestError) as caught_bounds:
        ai.images.generate(prompt="elephant", n=9)
    assert caught_bounds.value.param == "n"
    with pytest.raises(openai.NotFoundError) as no_route:
        ai.post("/audio/speech", cast_to=object, body={})
    assert no_route.value.code == "not_found"


@pytest.mark.parametrize(
    ("failure", "attempts"), [(QueueFull("demo/sdxl", 1, retry_after_s=0), 3), (ZeroDivisionError(), 1)]
)
def test_the_client_asks_again_only_where_that_can_help(
    url: str, gateway: FakeGateway, failure: Exception, attempts: int
) -> None:
    gateway.failure = failure
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=2) as ai,
        pytest.raises(openai.APIStatusError),
    ):
        ai.images.generate(prompt="elephant")
    assert len(gateway.drafts) == attempts


def test_an_unexpected_failure_leaks_nothing(client: TestClient, gateway: FakeGateway) -> None:
    gateway.failure = ZeroDivisionError("/secret/path")
    response = client.post("/v1/images/generations", json={"prompt": "elephant"})
    assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
    assert response.json()["error"] == {
        "message": "the service failed on this request; its id is made-id",
        "type": "server_error",
        "param": None,
        "code": "internal",
    }


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "'prompt' is missing"),
    ({"prompt": None}, "'prompt' must be a string, not null"),
    ({"prompt": 3}, "'prompt' must be a string"),
    ({"inputs": "elephant"}, "unknown parameter 'inputs'"),
    ({"prompt": "a", "steps": 3}, "unknown parameter 'steps'"),
    ({"prompt": "a", "num_inference_step": 3}, "did you mean 'num_inference_steps'"),
    ({"prompt": "a", "strength": 0.5}, "unknown parameter 'strength'"),
    ({"prompt": "a", "size": "big"}, "'size' must be 'auto' or width and height such as '512x768'"),
    ({"prompt": "a", "size": "0x64"}, "'size' must be"),
    ({"prompt": "a", "size": "64x64x64"}, "'size' must be"),
    ({"prompt": "a", "size": 64}, "'size' must be a string"),
    ({"prompt": "a", "n": "2"}, "'n' must be an integer"),
    ({"prompt": "a", "n": True}, "'n' must be an integer, not a boolean"),
    ({"prompt": "a", "response_format": "file"}, "'response_format' is \"file\", but must be 'b64_json' or 'url'"),
    ({"prompt": "a", "output_format": "gif"}, "'output_format' is \"gif\""),
    ({"prompt": "a", "output_format": ["png"]}, "'output_format' is an array"),
    ({"prompt": "a", "output_compression": 101}, "'output_compression' is 101, but must be at most 100"),
    ({"prompt": "a", "output_compression": 50}, "png keeps every pixel"),
    ({"prompt": "a", "background": "none"}, "'background' is \"none\""),
    ({"prompt": "a", "quality": "best"}, "'quality' is \"best\""),
    ({"prompt": "a", "stream": "true"}, "'stream' must be true or false, not a string"),
    ({"prompt": "a", "partial_images": 2}, "'partial_images' goes with 'stream'"),
    ({"prompt": "a", "stream": True, "partial_images": 4}, "'partial_images' is 4, but must be at most 3"),
    ({"prompt": "a", "model": ""}, "'model' is 0 characters long"),
    ({"prompt": "a", "model": ":a/b"}, "'<base>:<adapter>'"),
    ({"prompt": "a", "model": "a/b:"}, "'<base>:<adapter>'"),
    ({"prompt": "a", "lora": "a/b", "loras": ["c/d"]}, "both by 'lora' and by 'loras'"),
    ({"prompt": "a", "loras": "[broken"}, "'loras' cannot be read: its text is not JSON"),
    ({"prompt": "a", "loras": '[{"id": "c", "scale": 1, "scale": 2}]'}, "'scale' twice"),
    ({"prompt": "a", "loras": "[3]"}, r"'loras\[0\]' must be an object, not an integer"),
    ({"prompt": "a", "loras": 3}, "'loras' must be an array, not an integer"),
    ({"prompt": "a", "loras": {"id": "a/b", "scal": 1}}, r"'loras\[0\].scal'; did you mean 'scale'"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "sentence"), WRONG, ids=range(len(WRONG)))
def test_a_field_that_is_wrong_is_named(
    ai: openai.OpenAI, gateway: FakeGateway, body: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence):
        ai.post("/images/generations", cast_to=object, body=body)
    assert gateway.drafts == []


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"json": {"prompt": "a"}}, "must be a multipart form"),
    ({"data": {"prompt": "a"}}, "must be a multipart form"),
    ({"content": b"broken", "headers": {"content-type": "multipart/form-data"}}, "cannot be read"),
    ({"content": b"broken", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "cannot be read"),
    (
        {
            "content": b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n',
            "headers": {"content-type": "multipart/form-data; boundary=x; charset=undefined"},
        },
        "cannot be read",
    ),
    ({"data": {"prompt": "a"}, "files": {"picture": PNG}}, "unknown file 'picture'; the picture is 'image'"),
    ({"data": {"prompt": "a"}, "files": {"image": PNG, "mask": PNG}}, "'mask' has no transparent pixel"),
    ({"data": {"prompt": "a"}, "files": {"image": PNG, "mask": mask_png(40, 25)}}, "'mask' is 40x25, but 'image' is"),
    ({"data": {"prompt": "a"}, "files": {"image": PNG, "mask": b"no picture"}}, "'mask' is not a readable PNG"),
    ({"data": {"prompt": "a"}, "files": {"mask": PNG}}, "'image' is missing"),
    ({"data": {"prompt": "a", "mask": "text"}, "files": {"image": PNG}}, "unknown parameter 'mask'"),
    ({"data": {"prompt": "a"}, "files": [("image", PNG), ("mask", PNG), ("mask", PNG)]}, "must be one file, not 2"),
    ({"data": {"prompt": "a", "loras[][id]": ["a", "c"], "loras[][scale]": "1"}, "files": {"image": PNG}}, "as JSON"),
    ({"data": {"prompt": "a", "loras": "a/b", "loras[0][id]": "c/d"}, "files": {"image": PNG}}, "as JSON text"),
    ({"data": {"prompt": "a", "loras[0][id]": "c", "loras[0][x]": "y"}, "files": {"image": PNG}}, "unknown parameter"),
    ({"data": {"prompt": "a"}, "files": {"image": b"no picture"}}, "'image' is not a readable PNG"),
    ({"data": {}, "files": {"image": PNG}}, "'prompt' is missing"),
    ({"data": {"prompt": "a", "n": "two"}, "files": {"image": PNG}}, "'n' must be an integer, not a string"),
    ({"data": {"prompt": "a", "n": "9" * 5000}, "files": {"image": PNG}}, "'n' must be an integer, not a string"),
    ({"data": {"prompt": "a", "stream": "maybe"}, "files": {"image": PNG}}, "'stream' must be true or false"),
    ({"data": {"prompt": "a", "strength": "nan"}, "files": {"image": PNG}}, "'strength' must be a finite number"),
    ({"data": {"prompt": ["a", "b"]}, "files": {"image": PNG}}, "has 'prompt' twice"),
    ({"data": {"prompt": "a", "loras": ["a/b", "c/d"]}, "files": {"image": PNG}}, "has 'loras' twice"),
    ({"data": {"prompt": "a", "steps": "3"}, "files": {"image": PNG}}, "unknown parameter 'steps'"),
    ({"data": {"prompt": "a", "image": "text"}, "files": {"x": b""}}, "unknown parameter 'image'"),
]  # fmt: skip


@pytest.mark.parametrize(("request_parts", "sentence"), FORMS, ids=range(len(FORMS)))
def test_a_form_that_is_wrong_is_told_why(
    client: TestClient, gateway: FakeGateway, request_parts: dict[str, Any], sentence: str
) -> None:
    response = client.post("/v1/images/edits", **request_parts)
    assert response.status_code == 400, response.text
    assert sentence in response.json()["error"]["message"]
    assert gateway.drafts == []


def test_a_large_form_is_refused(gateway: FakeGateway) -> None:
    client = TestClient(create_app(gateway, IngressSettings(max_body=1000)))
    response = client.post("/v1/images/edits", data={"prompt": "a" * 1000}, files={"image": PNG})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
