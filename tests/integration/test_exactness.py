"""Shuffled requests over both demo bases, changed at random steps: each image is its adapter's alone, bit by bit."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from cluster.local_service import base_handle
from tests.service import BASES, EMBEDDED, STYLES, Service

MODELS = [*BASES, *(f"{base}-{style}" for base in BASES for style in STYLES)]
AT_ONCE = 5  # for each base
PROMPTS = ("a red circle on a blue background", "a green square on a white background")
# Sides, steps and numbers of images.
SHAPES = ((64, 6, 1), (64, 12, 1), (96, 4, 1), (64, 8, 2), (48, 6, 4))

# Of the first test this is also the time in which cluster and service start and all is drawn.
pytestmark = pytest.mark.timeout(1200)


@dataclass(frozen=True)
class Asked:
    model: str
    prompt: str
    seed: int
    side: int
    steps: int
    images: int


@dataclass(frozen=True)
class Answer:
    pixels: list[np.ndarray]
    batch_size: int


def any_requests(count: int) -> list[Asked]:
    """Return requests for every model, each with two prompts; of many, some come again."""
    rng = random.Random(5)
    distinct = [
        Asked(model, prompt, 11 + turn, *rng.choice(SHAPES)) for turn, prompt in enumerate(PROMPTS) for model in MODELS
    ]
    asked = (distinct * (count // len(distinct) + 1))[:count]
    rng.shuffle(asked)
    return asked


async def draw_all(url: str, asked: list[Asked]) -> list[Answer]:
    places = {base: asyncio.Semaphore(AT_ONCE) for base in BASES}
    async with httpx.AsyncClient(base_url=url, timeout=900, trust_env=False) as client:

        async def draw(one: Asked) -> Answer:
            body = {
                "model": one.model, "prompt": one.prompt, "n": one.images, "size": f"{one.side}x{one.side}",
                "seed": one.seed, "num_inference_steps": one.steps,
            }  # fmt: skip
            async with places[one.model.partition("-")[0]]:
                reply = await client.post("/v1/images/generations", json=body)
            assert reply.status_code == 200, reply.text
            return Answer(images_of(reply.json()), int(reply.headers["x-batch-size"]))

        return await asyncio.gather(*(draw(one) for one in asked))


def on_each_base(method: str, *args: Any) -> dict[str, Any]:
    handles = {base: base_handle(base) for base in BASES}
    return {base: getattr(handle, method).remote(*args).result() for base, handle in handles.items()}


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    """The service, whose devices give each step to any request."""
    on_each_base("choose_any_turn", True)
    yield service.url
    on_each_base("choose_any_turn", False)


@pytest.mark.parametrize("count", [len(MODELS), pytest.param(300, marks=[pytest.mark.slow, pytest.mark.soak])])
def test_whatever_a_device_turns_to_between_two_steps_each_image_is_the_one_diffusers_draws_alone(
    url: str, count: int
) -> None:
    asked = any_requests(count)
    before, changes = on_each_base("checksum"), changes_so_far()
    answers = asyncio.run(draw_all(url, asked))
    assert on_each_base("checksum") == before
    torch.set_num_threads(1)
    for one in dict.fromkeys(asked):
        expected = drawn_by_diffusers(one)
        for answer in (answer for other, answer in zip(asked, answers, strict=True) if other == one):
            assert len(answer.pixels) == one.images
            for image, reference in zip(answer.pixels, expected, strict=True):
                difference = np.abs(image.astype(int) - reference.astype(int)).max()
                assert difference <= (0 if answer.batch_size == 1 else 1), (one, answer.batch_size)
    for base, now in changes_so_far().items():
        drawn = sum(one.model.startswith(base) for one in asked)
        assert now - changes[base] > drawn, "runs were set aside in mid-image"


def changes_so_far() -> dict[str, int]:
    """How often each base's device has changed its adapters."""
    return {base: state.changes for base, state in on_each_base("state").items()}


@functools.cache
def diffusers_pipeline(model: str) -> DiffusionPipeline:
    base, _, style = model.partition("-")
    pipeline = DiffusionPipeline.from_pretrained(EMBEDDED / base)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    if style:
        pipeline.load_lora_weights(EMBEDDED / model)
        pipeline.fuse_lora()
    return pipeline


def drawn_by_diffusers(one: Asked) -> list[np.ndarray]:
    pipeline = diffusers_pipeline(one.model)
    return [
        np.asarray(
            pipeline(
                one.prompt,
                width=one.side,
                height=one.side,
                num_inference_steps=one.steps,
                guidance_scale=3.0,
                generator=torch.Generator().manual_seed(one.seed + number),
            ).images[0]
        )
        for number in range(one.images)
    ]


def images_of(reply: dict[str, Any]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))) for image in reply["data"]]
