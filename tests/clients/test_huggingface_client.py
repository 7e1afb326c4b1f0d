"""What `huggingface_hub` sends and shows beside what `test_other_clients.py` tries, against the real service."""

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


def test_image_to_image_without_any_parameter(client: InferenceClient, service: Service) -> None:
    encoded = io.BytesIO()
    Image.fromarray(service.draw(PROMPT, seed=7)).save(encoded, "PNG")
    assert client.image_to_image(encoded.getvalue()).size == (64, 64)


def test_a_refusal_shows_its_sentence(client: InferenceClient) -> None:
    with pytest.raises(HfHubHTTPError, match="unknown parameter 'stepz'"):
        client.text_to_image(PROMPT, extra_body={"stepz": 3})
