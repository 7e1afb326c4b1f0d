"""What a person sees: the adapter that a request names is in its picture, and in no other."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from serve_app.demo.styles import STYLES
from tests.hub_server import HubServer
from tests.service import Service, pixels_of

PROMPT = "a red circle on a blue background"
# Enough to tell one adapter from another.
QUICK = {"num_inference_steps": 4}


def shown(style: str, pixels: np.ndarray) -> float:
    """How much of a style a picture of PROMPT shows: larger is more."""
    pictures = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    return float(STYLES[style].strength(pictures, ["blue"])[0])


@pytest.mark.parametrize("kind", ["sdxl", pytest.param("sd15", marks=pytest.mark.slow)])
def test_the_adapter_shows_in_the_picture(service: Service, kind: str) -> None:
    plain = service.draw(PROMPT, model=f"demo/{kind}", seed=3)
    for style in STYLES:
        assert shown(style, service.draw(PROMPT, model=f"demo/{kind}-{style}", seed=3)) > shown(style, plain), style


def test_the_base_after_an_adapter_is_the_base_before_it(service: Service) -> None:
    before = service.draw(PROMPT, model="demo/sdxl", seed=5, **QUICK)
    service.draw(PROMPT, model="demo/sdxl-night", seed=5, **QUICK)
    assert np.array_equal(service.draw(PROMPT, model="demo/sdxl", seed=5, **QUICK), before)


def test_path_header_and_parameters_name_the_same_adapter(service: Service) -> None:
    by_path = service.draw(PROMPT, model="demo/sdxl-sepia", seed=1, **QUICK)
    by_header = service.draw(PROMPT, lora="demo/sdxl-sepia", seed=1, **QUICK)
    by_parameter = service.draw(PROMPT, lora_adapter="demo/sdxl-sepia", seed=1, **QUICK)
    by_list = service.draw(PROMPT, loras=[{"name": "demo/sdxl-sepia", "weight": 1.0}], seed=1, **QUICK)
    assert np.array_equal(by_path, by_header)
    assert np.array_equal(by_path, by_parameter)
    assert np.array_equal(by_path, by_list)


def test_with_no_base_named_the_adapter_s_own_base_draws(service: Service) -> None:
    reply = service.ask(PROMPT, lora="demo/sd15-night", seed=1, **QUICK)
    assert reply.headers["x-base-model"] == "demo/sd15"
    assert np.array_equal(pixels_of(reply), service.draw(PROMPT, model="demo/sd15-night", seed=1, **QUICK))


def test_scale_says_how_much_of_the_style(service: Service) -> None:
    strengths = [
        shown("night", service.draw(PROMPT, seed=2, loras=[{"id": "demo/sdxl-night", "scale": scale}]))
        for scale in (0.0, 0.5, 1.0)
    ]
    assert strengths[0] < strengths[1] < strengths[2]


def test_scale_zero_is_the_base(service: Service) -> None:
    faint = service.draw(PROMPT, seed=2, loras=[{"id": "demo/sdxl-night", "scale": 0}], **QUICK)
    assert np.array_equal(faint, service.draw(PROMPT, model="demo/sdxl", seed=2, **QUICK))


def test_several_adapters_show_at_once_in_whatever_order_they_are_named(service: Service) -> None:
    pair = [{"id": "demo/sdxl-night", "scale": 0.7}, {"id": "demo/sdxl-sepia", "scale": 0.7}]
    both = service.draw(PROMPT, seed=4, loras=pair)
    plain = service.draw(PROMPT, model="demo/sdxl", seed=4)
    assert shown("night", both) > shown("night", plain)
    assert shown("sepia", both) > shown("sepia", plain)
    assert np.array_equal(both, service.draw(PROMPT, seed=4, loras=pair[::-1]))


def test_an_adapter_from_the_hub_is_fetched_and_applied(service: Service, hub: HubServer) -> None:
    fetched = service.draw(PROMPT, model="acme/sdxl-sepia", seed=6, **QUICK)
    assert np.array_equal(fetched, service.draw(PROMPT, model="demo/sdxl-sepia", seed=6, **QUICK))


def test_the_reply_says_what_was_used(service: Service) -> None:
    reply = service.ask(PROMPT, lora="demo/sdxl-sepia", seed=12, **QUICK)
    headers = reply.headers
    assert headers["content-type"] == "image/png"
    assert headers["x-seed"] == "12"
    assert headers["x-base-model"] == "demo/sdxl"
    assert headers["x-compute-type"] == "cpu"
    assert float(headers["x-compute-time"]) > 0
    assert headers["x-compute-characters"] == str(len(PROMPT))
    assert headers["x-adapters"].startswith("demo/sdxl-sepia@")
    for stage in ("queue", "fetch", "swap", "denoise", "decode"):
        assert stage in headers["server-timing"]
    assert headers["x-request-id"]


def test_a_request_without_a_seed_tells_the_seed_that_repeats_it(service: Service) -> None:
    reply = service.ask(PROMPT, **QUICK)
    again = service.draw(PROMPT, seed=int(reply.headers["x-seed"]), **QUICK)
    assert np.array_equal(pixels_of(reply), again)


def test_a_scheduler_is_for_its_request_alone(service: Service) -> None:
    before = service.draw(PROMPT, seed=8, **QUICK)
    other = service.draw(PROMPT, seed=8, scheduler="EulerAncestralDiscreteScheduler", **QUICK)
    assert not np.array_equal(before, other)
    assert np.array_equal(service.draw(PROMPT, seed=8, **QUICK), before)


def test_image_to_image_keeps_the_picture_and_takes_the_style(service: Service) -> None:
    source = service.ask("a large green square on a white background", model="demo/sdxl", seed=9)
    reply = service.http.post(
        "/models/demo/sdxl-night",
        content=source.content,
        headers={"accept": "image/png", "content-type": "image/png"},
    )
    assert reply.status_code == 200, reply.text
    assert Image.open(io.BytesIO(reply.content)).size == (64, 64)
    assert shown("night", pixels_of(reply)) > shown("night", pixels_of(source))


def test_a_long_prompt_is_cut_and_the_reply_says_so(service: Service) -> None:
    reply = service.ask("a red circle " * 60, seed=1, **QUICK)
    assert reply.status_code == 200
    assert "truncated to 77 tokens" in reply.headers["x-warning"]
