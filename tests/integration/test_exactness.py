"""Two hundred shuffled requests: each image is the one that its adapter alone gives, and the base never moves."""

from __future__ import annotations

import asyncio
import io
import random
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from ray import serve

from serve_app.deployments.ingress.ingress import deployment_name
from tests.service import BASES, STYLES, Service, base_settings

EMBEDDED = Path(__file__).parents[2] / "serve_app" / "demo" / "hub"
REQUESTS = 200
AT_ONCE = 8
PROMPTS = ("a red circle on a blue background", "a green square on a white background")
SEEDS = (11, 12)

# Of the first test this is also the time in which cluster and service start and all is drawn.
pytestmark = pytest.mark.timeout(1200)


@dataclass(frozen=True)
class Asked:
    model: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Answer:
    pixels: np.ndarray
    batch_size: int


def all_distinct() -> list[Asked]:
    models = [*BASES, *(f"{base}-{style}" for base in BASES for style in STYLES)]
    return [Asked(model, prompt, seed) for model in models for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]


async def draw_all(url: str, asked: list[Asked], at_once: int) -> list[Answer]:
    places = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=900, trust_env=False) as client:

        async def draw(one: Asked) -> Answer:
            async with places:
                reply = await client.post(
                    f"/models/{one.model}",
                    json={"inputs": one.prompt, "parameters": {"seed": one.seed}},
                    headers={"accept": "image/png"},
                )
            assert reply.status_code == 200, reply.text
            return Answer(np.asarray(Image.open(io.BytesIO(reply.content))), int(reply.headers["x-batch-size"]))

        return await asyncio.gather(*(draw(one) for one in asked))


def checksums() -> list[str]:
    handles = [serve.get_deployment_handle(deployment_name(base), "loraplex") for base in BASES]
    return [handle.checksum.remote().result() for handle in handles]


def assert_same(answer: Answer, reference: np.ndarray) -> None:
    difference = np.abs(answer.pixels.astype(int) - reference.astype(int)).max()
    assert difference <= (0 if answer.batch_size == 1 else 1)


@pytest.fixture(scope="module")
def mixed(service: Service) -> tuple[dict[Asked, list[Answer]], list[str], list[str]]:
    """Two hundred requests in random order, eight at a time, and the bases' checksums before and after."""
    asked = all_distinct()
    stream = (asked * (REQUESTS // len(asked) + 1))[:REQUESTS]
    random.Random(5).shuffle(stream)
    before = checksums()
    answers: dict[Asked, list[Answer]] = {}
    for one, answer in zip(stream, asyncio.run(draw_all(service.url, stream, AT_ONCE)), strict=True):
        answers.setdefault(one, []).append(answer)
    return answers, before, checksums()


def test_the_base_s_weights_hash_the_same_after_200_requests(
    mixed: tuple[dict[Asked, list[Answer]], list[str], list[str]],
) -> None:
    _, before, after = mixed
    assert before == after


def test_every_image_is_that_of_a_freshly_started_service(
    mixed: tuple[dict[Asked, list[Answer]], list[str], list[str]], service: Service, tmp_path: Path
) -> None:
    from serve_app.app import build
    from serve_app.config import AppConfig

    answers = mixed[0]
    config = AppConfig.model_validate(
        {
            "bases": [base_settings(base) for base in BASES],
            "adapters": {"embedded": True, "hub": {"enabled": False}},
            "ingress": {"replicas": 1, "num_cpus": 0.1},
            "cache_dir": str(tmp_path),
        }
    )
    serve.run(build(config), name="fresh", route_prefix="/fresh")
    try:
        asked = list(answers)
        references = asyncio.run(draw_all(f"{service.url}/fresh", asked, at_once=1))
    finally:
        serve.delete("fresh")
    for one, reference in zip(asked, references, strict=True):
        assert reference.batch_size == 1
        for answer in answers[one]:
            assert_same(answer, reference.pixels)


def test_every_image_is_the_one_diffusers_itself_gives_with_that_adapter_alone(
    mixed: tuple[dict[Asked, list[Answer]], list[str], list[str]],
) -> None:
    torch.set_num_threads(1)
    for one, answers in mixed[0].items():
        reference = drawn_by_diffusers(one)
        for answer in answers:
            assert_same(answer, reference)


def drawn_by_diffusers(one: Asked) -> np.ndarray:
    base, _, style = one.model.partition("-")
    pipeline = DiffusionPipeline.from_pretrained(EMBEDDED / base)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    if style:
        pipeline.load_lora_weights(EMBEDDED / one.model)
        pipeline.fuse_lora()
    image = pipeline(
        one.prompt,
        width=64,
        height=64,
        num_inference_steps=12,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(one.seed),
    ).images[0]
    return np.asarray(image)
