"""The clients that people have, against the real service."""

from __future__ import annotations

import io

import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from tests.service import Service

PROMPT = "a red circle on a blue background"


@pytest.fixture
def client(service: Service) -> InferenceClient:
    return InferenceClient(model=service.url)


def test_text_to_image(client: InferenceClient, service: Service) -> None:
    image = client.text_to_image(PROMPT, seed=7)
    assert np.array_equal(np.asarray(image.convert("RGB")), service.draw(PROMPT, seed=7))


def test_text_to_image_with_an_adapter(client: InferenceClient, service: Service) -> None:
    image = client.text_to_image(PROMPT, seed=7, extra_body={"lora_adapter": "demo/sdxl-sepia"})
    styled = service.draw(PROMPT, model="demo/sdxl-sepia", seed=7)
    assert np.array_equal(np.asarray(image.convert("RGB")), styled)


def test_text_to_image_with_the_lora_header(service: Service) -> None:
    client = InferenceClient(model=service.url, headers={"lora": "demo/sd15-night"})
    image = client.text_to_image(PROMPT, seed=7)
    styled = service.draw(PROMPT, model="demo/sd15-night", seed=7)
    assert np.array_equal(np.asarray(image.convert("RGB")), styled)


def test_image_to_image(client: InferenceClient, service: Service) -> None:
    source = Image.fromarray(service.draw(PROMPT, seed=7))
    encoded = io.BytesIO()
    source.save(encoded, "PNG")
    image = client.image_to_image(encoded.getvalue(), prompt="a red circle on a white background", strength=0.5)
    assert image.size == (64, 64)


def test_image_to_image_without_any_parameter(client: InferenceClient, service: Service) -> None:
    encoded = io.BytesIO()
    Image.fromarray(service.draw(PROMPT, seed=7)).save(encoded, "PNG")
    assert client.image_to_image(encoded.getvalue()).size == (64, 64)


def test_a_refusal_shows_its_sentence(client: InferenceClient) -> None:
    with pytest.raises(HfHubHTTPError, match="unknown parameter 'stepz'"):
        client.text_to_image(PROMPT, extra_body={"stepz": 3})


def test_the_lora_header_holds_for_image_to_image_too(service: Service) -> None:
    plain = service.draw(PROMPT, model="demo/sdxl", seed=7)
    encoded = io.BytesIO()
    Image.fromarray(plain).save(encoded, "PNG")
    asked = {"prompt": PROMPT, "strength": 0.6, "seed": 7}
    images = [
        np.asarray(
            InferenceClient(model=service.url, headers={"lora": lora})
            .image_to_image(encoded.getvalue(), **asked)
            .convert("RGB")
        ).astype(int)
        for lora in ("", "demo/sdxl-night")
    ]
    # Night darkens.
    assert images[1].mean() < images[0].mean()
