"""Shuffled requests over both demo bases, changed at random steps: each image is its adapter's alone, bit by bit."""

from __future__ import annotations

import asyncio
import base64
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
from ray import serve

from serve_app.app import assemble
from serve_app.config import AppConfig
from serve_app.deployments.ingress.ingress import deployment_name
from tests.replicas.any_turns import AnyTurnReplica
from tests.service import BASES, EMBEDDED, STYLES, base_settings

AT_ONCE = 12
APP = "exact"
# One base has two replicas, over which the images of a request are spread.
REPLICAS = dict(zip(BASES, (1, 2), strict=True))
MODELS = [*BASES, *(f"{base}-{style}" for base in BASES for style in STYLES)]
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
    """Return requests for every model, each model in any of two shapes, so that many come again."""
    rng = random.Random(5)
    distinct = [
        Asked(model, PROMPTS[turn], 11 + turn, *rng.choice(SHAPES)) for model in MODELS for turn in range(len(PROMPTS))
    ]
    asked = (distinct * (count // len(distinct) + 1))[:count]
    rng.shuffle(asked)
    return asked


async def draw_all(url: str, asked: list[Asked]) -> list[Answer]:
    places = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=900, trust_env=False) as client:

        async def draw(one: Asked) -> Answer:
            body = {
                "model": one.model, "prompt": one.prompt, "n": one.images, "size": f"{one.side}x{one.side}",
                "seed": one.seed, "num_inference_steps": one.steps,
            }  # fmt: skip
            async with places:
                reply = await client.post("/v1/images/generations", json=body)
            assert reply.status_code == 200, reply.text
            return Answer(images_of(reply.json()), int(reply.headers["x-batch-size"]))

        return await asyncio.gather(*(draw(one) for one in asked))


def on_every_replica(method: str) -> dict[str, list[Any]]:
    handles = {base: serve.get_deployment_handle(deployment_name(base), APP) for base in BASES}
    return {base: handle.broadcast(method).results() for base, handle in handles.items()}


@pytest.fixture(scope="module")
def url(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service whose devices give each step to any request."""
    scaling = {base: {"min_replicas": count, "max_replicas": count} for base, count in REPLICAS.items()}
    config = AppConfig.model_validate(
        {
            "bases": [base_settings(base, autoscaling=scaling[base]) for base in BASES],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "ingress": {"replicas": 1, "num_cpus": 0.1},
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        }
    )
    serve.run(assemble(config, AnyTurnReplica), name=APP, route_prefix=f"/{APP}")
    yield f"http://127.0.0.1:{cluster}/{APP}"
    serve.delete(APP)


@pytest.mark.parametrize("count", [28, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.soak])])
def test_whatever_a_device_turns_to_between_two_steps_each_image_is_the_one_diffusers_draws_alone(
    url: str, count: int
) -> None:
    asked = any_requests(count)
    before = on_every_replica("checksum")
    answers = asyncio.run(draw_all(url, asked))
    assert on_every_replica("checksum") == before
    assert all(len(set(sums)) == 1 for sums in before.values())
    torch.set_num_threads(1)
    for one in dict.fromkeys(asked):
        expected = drawn_by_diffusers(one)
        for answer in (answer for other, answer in zip(asked, answers, strict=True) if other == one):
            assert len(answer.pixels) == one.images
            for image, reference in zip(answer.pixels, expected, strict=True):
                difference = np.abs(image.astype(int) - reference.astype(int)).max()
                assert difference <= (0 if answer.batch_size == 1 else 1), (one, answer.batch_size)
    states = on_every_replica("state")
    for base in BASES:
        drawn = sum(one.model.startswith(base) for one in asked)
        assert sum(state.changes for state in states[base]) > drawn, "runs were set aside in mid-image"
        assert all(state.steps for state in states[base]), "every replica drew"


def drawn_by_diffusers(one: Asked) -> list[np.ndarray]:
    base, _, style = one.model.partition("-")
    pipeline = DiffusionPipeline.from_pretrained(EMBEDDED / base)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    if style:
        pipeline.load_lora_weights(EMBEDDED / one.model)
        pipeline.fuse_lora()
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
