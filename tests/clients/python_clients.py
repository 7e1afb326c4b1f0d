"""Draws with an adapter, and edits a picture with it, by one client; prints each image in base64 as a line of JSON.

Runs in a process of its own, with the client's packages before this project's:
`python python_clients.py CLIENT URL ADAPTER PICTURE`.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT = "a red circle on a blue background"
KEY = "none"


def huggingface_hub(url: str, adapter: str, picture: bytes) -> Iterator[tuple[str, Any]]:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=url)
    yield "generate", client.text_to_image(PROMPT, seed=7, extra_body={"lora_adapter": adapter})
    client = InferenceClient(model=url, headers={"lora": adapter})
    yield "edit", client.image_to_image(picture, prompt=PROMPT, strength=0.5, seed=7)


def litellm(url: str, adapter: str, picture: bytes) -> Iterator[tuple[str, Any]]:
    import litellm

    asked: dict[str, Any] = {"model": f"openai/{adapter}", "api_base": f"{url}/v1", "api_key": KEY}
    yield "generate", litellm.image_generation(PROMPT, extra_body={"seed": 7}, **asked).data[0].b64_json
    file = io.BytesIO(picture)
    file.name = "a.png"
    edited = litellm.image_edit(image=[file], prompt=PROMPT, extra_body={"seed": 7, "strength": 0.5}, **asked)
    yield "edit", edited.data[0].b64_json


def haystack(url: str, adapter: str, picture: bytes) -> Iterator[tuple[str, Any]]:
    from haystack.components.generators import OpenAIImageGenerator
    from haystack.utils import Secret

    client = OpenAIImageGenerator(
        model=adapter, size="auto", api_key=Secret.from_token(KEY), api_base_url=f"{url}/v1", timeout=120
    )
    yield "generate", client.run(PROMPT)["images"][0]


def langchain(url: str, adapter: str, picture: bytes) -> Iterator[tuple[str, Any]]:
    from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

    client = DallEAPIWrapper(model=adapter, size="auto", api_key=KEY, base_url=f"{url}/v1")
    yield "generate", client.run(PROMPT).removeprefix("data:image/png;base64,")


def as_base64(image: Any) -> str:
    if isinstance(image, str):
        return image
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    client, url, adapter, picture = sys.argv[1:]
    for step, image in globals()[client](url, adapter, Path(picture).read_bytes()):
        sys.stdout.write(json.dumps({"step": step, "image": as_base64(image)}) + "\n")
