"""What lies beside an adapter and how strongly it acts, from the wire to the image."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save

from tests.hub_server import HubServer
from tests.service import EMBEDDED, Service

PROMPT = "a <s0> square on a <s1> background"
QUICK = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def taught(hub: HubServer) -> str:
    """An adapter on the Hub with words of its own; `acme/sdxl-sepia` is the same without them."""
    folder = EMBEDDED / "demo" / "sdxl-sepia"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    random = np.random.default_rng(0)
    rows: dict[str, np.ndarray] = {}
    for place, component in enumerate(("text_encoder", "text_encoder_2")):
        width = json.loads((EMBEDDED / "demo" / "sdxl" / component / "config.json").read_text())["hidden_size"]
        rows[f"text_encoders_{place}"] = random.standard_normal((2, width)).astype(np.float32)
    hub.push("acme/taught", {**files, "embeddings.safetensors": save(rows)})
    # Other weights: two ids of the same bytes would be one adapter that is named twice.
    other = (EMBEDDED / "demo" / "sdxl-night" / "pytorch_lora_weights.safetensors").read_bytes()
    too = {**files, "pytorch_lora_weights.safetensors": other, "embeddings.safetensors": save(rows)}
    hub.push("acme/taught-too", too)
    return "acme/taught"


def test_an_adapters_words_are_known_to_its_own_requests_alone(service: Service, taught: str) -> None:
    base = service.draw(PROMPT, model="demo/sdxl", seed=3, **QUICK)
    plain = service.draw(PROMPT, model="acme/sdxl-sepia", seed=3, **QUICK)
    first = service.draw(PROMPT, model=taught, seed=3, **QUICK)
    assert not np.array_equal(first, plain)
    assert np.array_equal(
        service.draw("a red square", model=taught, seed=3, **QUICK),
        service.draw("a red square", model="acme/sdxl-sepia", seed=3, **QUICK),
    )
    assert np.array_equal(service.draw(PROMPT, model="acme/sdxl-sepia", seed=3, **QUICK), plain)
    assert np.array_equal(service.draw(PROMPT, model="demo/sdxl", seed=3, **QUICK), base)
    assert np.array_equal(service.draw(PROMPT, model=taught, seed=3, **QUICK), first)


def test_two_adapters_with_words_in_one_request_are_refused(service: Service, taught: str) -> None:
    reply = service.ask(PROMPT, model="demo/sdxl", loras=[taught, "acme/taught-too"])
    assert (reply.status_code, reply.json()["code"]) == (400, "malformed_request")
    assert "acme/taught and acme/taught-too each bring words of their own" in reply.json()["error"]


def test_separate_scales_reach_the_weights(service: Service) -> None:
    def drawn(scale: object) -> tuple[str, bytes]:
        reply = service.ask(
            "a red square", model="demo/sdxl", seed=1, **QUICK, loras=[{"id": "acme/sdxl-sepia", "scale": scale}]
        )
        assert reply.status_code == 200, reply.text
        return reply.headers["x-adapters"].split(";")[1], reply.content

    assert drawn({"unet": 0.5, "text_encoder": 0.5}) == drawn(0.5)
    text, apart = drawn({"denoiser": 0, "text_encoder": 1})
    assert text == "0/1"
    assert apart != drawn({"denoiser": 1, "text_encoder": 0})[1]
