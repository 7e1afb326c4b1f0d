from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from PIL import Image
from starlette.testclient import TestClient

from serve_app.api.app import create_app
from serve_app.api.http.auth import Access
from serve_app.api.pictures.images import encode_image
from serve_app.config import ApiKey, IngressSettings, KeyLimits, digest_of
from serve_app.settings import Defaults
from tests.unit.api.fake_registry import BASE
from tests.unit.api.fakes import FakeGateway, gradient

ADDRESS = "/v1/pictures/demo/sketch"


def size_of(content: bytes) -> tuple[str | None, tuple[int, int]]:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.format, picture.size


def test_a_picture_is_a_small_copy_that_a_browser_may_hold(client: TestClient, gateway: FakeGateway) -> None:
    gateway.registry.pictures["demo/sketch"] = encode_image(gradient(600, 300), "png", text="a secret prompt")
    reply = client.get(ADDRESS)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "image/webp")
    assert size_of(reply.content) == ("WEBP", (256, 128))
    assert b"secret" not in reply.content
    assert reply.headers["cache-control"].startswith("private")
    assert reply.headers["vary"] == "authorization, x-hf-token"
    again = client.get(ADDRESS, headers={"if-none-match": reply.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [("demo/sketch", "no_picture", "none was drawn yet"), ("demo/none", "model_not_found", "demo/none")],
)
def test_where_there_is_none_a_sentence_says_so(client: TestClient, name: str, code: str, says: str) -> None:
    reply = client.get(f"/v1/pictures/{name}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, code)
    assert says in reply.json()["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_file_that_is_no_picture_is_named_and_nothing_is_drawn(
    client: TestClient, gateway: FakeGateway, method: str
) -> None:
    gateway.registry.pictures["demo/sketch"] = b"<svg onload='alert(1)'/>"
    reply = client.request(method, ADDRESS)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "no_picture")
    assert "'cover.png' is not a readable" in reply.json()["error"]["message"]
    assert gateway.drafts == []


@pytest.mark.parametrize(
    ("sides", "drawn"), [((64, 96), (None, None)), ((1024, 1024), (512, 512)), ((832, 1216), (320, 512))]
)
def test_one_is_drawn_small_after_all_who_wait_and_kept(
    client: TestClient,
    gateway: FakeGateway,
    sides: tuple[int, int],
    drawn: tuple[int | None, int | None],
) -> None:
    defaults = Defaults(width=sides[0], height=sides[1])
    gateway.registry.served = (BASE.model_copy(update={"defaults": defaults}),)
    reply = client.post(ADDRESS)
    assert size_of(reply.content)[0] == "WEBP"
    draft = gateway.draft
    assert (draft.model, draft.prompt, draft.priority, draft.seed) == ("demo/sketch", "sks", "batch", 0)
    assert ((draft.width, draft.height), draft.prompt_syntax, draft.num_images) == (drawn, "plain", 1)
    for method in ("POST", "GET"):
        assert client.request(method, ADDRESS).content == reply.content
    assert len(gateway.drafts) == 1


@pytest.mark.parametrize(("example", "prompt"), [("a fox in ink", "a fox in ink"), (None, "sks")])
def test_the_prompt_is_the_cards_example_or_else_the_trigger_words(
    client: TestClient, gateway: FakeGateway, example: str | None, prompt: str
) -> None:
    row = gateway.registry.rows["demo/sketch"]
    adapter = replace(row.adapter, example_prompt=example)
    gateway.registry.rows["demo/sketch"] = replace(row, adapter=adapter)
    assert client.post(ADDRESS).status_code == 200
    assert gateway.draft.prompt == prompt


def test_one_is_drawn_once_however_many_ask(url: str, gateway: FakeGateway) -> None:
    gateway.is_stuck = True
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http, ThreadPoolExecutor(2) as threads:
        replies = [threads.submit(http.post, ADDRESS)]
        assert gateway.started.wait(60)
        known = len(gateway.registry.tokens)
        replies.append(threads.submit(http.post, ADDRESS))
        while len(gateway.registry.tokens) == known:  # until it has found none
            time.sleep(0.01)
        gateway.release()
        assert len({reply.result().content for reply in replies}) == 1
    assert len(gateway.drafts) == 1


def test_none_is_drawn_where_the_owner_of_the_service_wants_none(gateway: FakeGateway) -> None:
    with TestClient(create_app(gateway, IngressSettings(draw_pictures=False))) as client:
        reply = client.post(ADDRESS)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "no_picture")
    assert "`ingress.draw_pictures`" in reply.json()["error"]["message"]
    assert gateway.drafts == []


def test_a_drawn_picture_counts_against_its_callers_key(gateway: FakeGateway) -> None:
    gateway.registry.rows["demo/other"] = replace(gateway.registry.rows["demo/sketch"], id="demo/other")
    key = ApiKey(name="team", sha256=digest_of("sesame"), limits=KeyLimits(images_per_minute=1))
    with TestClient(create_app(gateway, IngressSettings(), access=Access(keys=lambda: (key,)))) as client:
        client.headers["authorization"] = "Bearer sesame"
        assert client.post(ADDRESS).status_code == 200
        assert client.post(ADDRESS).status_code == 200, "it is kept"
        assert client.post("/v1/pictures/demo/other").json()["error"]["code"] == "key_limit_reached"
        assert gateway.drafts[-1].key == "team"
