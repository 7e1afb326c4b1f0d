"""A prompt's syntax and the adapters that it names, settled at the ingress."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import pytest

from serve_app.catalog.catalog import Catalog, build_sources
from serve_app.config import AppConfig, Environment
from serve_app.core import (
    AdapterRef,
    GenerationRequest,
    GenerationResult,
    PipelineOptions,
    PixelImage,
    Scale,
    Scales,
    Timings,
    UnresolvedRequest,
)
from serve_app.demo.embedded import embedded_root
from serve_app.deployments.ingress.canaries import Canaries
from serve_app.deployments.ingress.dispatch import ServiceGateway
from serve_app.deployments.ingress.resolve_defaults import resolve_defaults
from serve_app.errors import BadRequest, BaseMismatch, MalformedRequest, ModelNotFound, OutOfBounds
from serve_app.families.table import FAMILIES

CONFIG = {
    "bases": [
        {"id": "demo/sd15", "source": {"embedded": "demo/sd15"}},
        {"id": "demo/sdxl", "source": {"embedded": "demo/sdxl"}, "prompt_syntax": "a1111"},
    ],
    "adapters": {"embedded": True, "hub": {"enabled": False}},
}
KEYS = {"artist": "comfyui", "writer": "plain"}


async def settled(tmp_path: Path, **asked: Any) -> GenerationRequest:
    """Return what a replica is asked for a request."""
    config = AppConfig.model_validate(CONFIG)
    sources = build_sources(config, Environment(cache_dir=tmp_path), embedded_root=embedded_root())
    seen: list[GenerationRequest] = []

    async def dispatch(request: GenerationRequest) -> GenerationResult:
        seen.append(request)
        return GenerationResult("r", request.base_id, (PixelImage(1, 1, b"abc"),), (5,), (), Timings(), 0.1, "cpu", 1)

    gateway = ServiceGateway(
        Catalog(config, sources, clock=time.monotonic),
        cast(Any, dispatch),
        registry=cast(Any, None),
        draw_seed=lambda: 5,
        is_ready=cast(Any, None),
        canaries=Canaries(config, is_running=cast(Any, None), family_of=cast(Any, None)),
        on_refusal=lambda code: None,
        prompt_syntax_of=lambda key: cast(Any, KEYS.get(key or "")),
    )
    await gateway.generate(UnresolvedRequest(**{"prompt": "a cat", **asked}), request_id="r")
    return seen[0]


def uses(request: GenerationRequest) -> dict[str, Scale]:
    return {use.spec.id: use.scale for use in request.adapters}


TAGGED = "a cat <lora:demo/sd15-sepia:0.8><lora:demo/sd15-night>"


async def test_adapters_of_a_prompt_are_adapters_of_the_request(tmp_path: Path) -> None:
    request = await settled(
        tmp_path, prompt=TAGGED, adapters=(AdapterRef("demo/sd15-sketch", 0.5),), prompt_syntax="a1111"
    )
    assert (request.base_id, request.prompt, request.prompt_syntax) == ("demo/sd15", "a cat ", "a1111")
    assert uses(request) == {"demo/sd15-sepia": 0.8, "demo/sd15-night": 1.0, "demo/sd15-sketch": 0.5}


async def test_they_decide_the_base_as_named_ones_do(tmp_path: Path) -> None:
    request = await settled(tmp_path, prompt="<lora:demo/sdxl-sepia:1:0.5>", prompt_syntax="comfyui")
    assert request.base_id == "demo/sdxl"
    assert uses(request) == {"demo/sdxl-sepia": Scales(denoiser=0.5, text_encoder=1.0)}


async def test_a_plain_prompt_is_left_as_it_is(tmp_path: Path) -> None:
    text = "a (cat:1.3) <lora:demo/sd15-sepia:0.8> [x|y]"
    for asked in ({}, {"prompt_syntax": "plain", "model": "demo/sdxl"}, {"key": "writer", "model": "demo/sdxl"}):
        request = await settled(tmp_path, prompt=text, negative_prompt=text, **asked)
        assert (request.prompt, request.negative_prompt, request.prompt_syntax) == (text, text, "plain")
        assert request.adapters == ()


@pytest.mark.parametrize(
    ("asked", "syntax"),
    [
        ({}, "plain"),
        ({"model": "demo/sdxl"}, "a1111"),
        ({"model": "demo/sdxl-night"}, "a1111"),
        ({"model": "demo/sdxl", "key": "artist"}, "comfyui"),
        ({"model": "demo/sdxl", "key": "artist", "prompt_syntax": "plain"}, "plain"),
        ({"key": "artist", "prompt_syntax": "a1111"}, "a1111"),
    ],
)
async def test_the_request_decides_then_its_key_then_the_base(
    tmp_path: Path, asked: dict[str, Any], syntax: str
) -> None:
    assert (await settled(tmp_path, **asked)).prompt_syntax == syntax


async def test_a_bases_own_syntax_finds_adapters_and_keeps_the_base(tmp_path: Path) -> None:
    request = await settled(tmp_path, prompt="a cat <lora:demo/sdxl-sepia:0.3>", model="demo/sdxl-night")
    assert uses(request) == {"demo/sdxl-sepia": 0.3, "demo/sdxl-night": 1.0}
    with pytest.raises(BaseMismatch, match=r"demo/sd15-sepia was made for demo/sd15"):
        await settled(tmp_path, prompt="<lora:demo/sd15-sepia:0.3>", model="demo/sdxl")


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"prompt": TAGGED + TAGGED}, MalformedRequest, "demo/sd15-sepia is named twice"),
        ({"prompt": TAGGED, "adapters": (AdapterRef("demo/sd15-night"),)}, MalformedRequest, "is named twice"),
        ({"negative_prompt": TAGGED}, MalformedRequest, "'negative_prompt' names an adapter"),
        ({"prompt": "<lora:demo/none:1>"}, ModelNotFound, "demo/none"),
        ({"prompt": "<lora:demo/sd15-night:99>"}, OutOfBounds, "scale of demo/sd15-night"),
        ({"prompt": "<lora:demo/sd15-night:nan>"}, OutOfBounds, "scale of demo/sd15-night"),
        ({"prompt": "<lora:a>" * 900}, OutOfBounds, "over 64 adapters in the prompt"),
        ({"negative_prompt": "(red:99)"}, OutOfBounds, "weight of red"),
        ({"prompt": "(red:1.2.3)"}, MalformedRequest, "'prompt' has the weight '1.2.3'"),
        ({"options": PipelineOptions(prompt_2="a dog")}, MalformedRequest, "'prompt_2' goes with"),
    ],
)
async def test_what_a_prompt_may_not_say_is_refused_here(
    tmp_path: Path, asked: dict[str, Any], error: type[BadRequest], said: str
) -> None:
    with pytest.raises(error, match=said):
        await settled(tmp_path, prompt_syntax="a1111", **asked)


def test_families_that_clip_alone_reads_take_weights_and_others_say_what_they_take() -> None:
    taking = {name for name, family in FAMILIES.items() if family.weighs_words}
    assert taking == {
        "StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline",
        "StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusionXLImg2ImgPipeline",
    }  # fmt: skip
    base = AppConfig.model_validate(CONFIG).bases[0]
    draft = UnresolvedRequest("a cat", prompt_syntax="a1111")
    for name in ("FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionInstructPix2PixPipeline"):
        with pytest.raises(MalformedRequest, match="demo/sd15 takes no 'prompt_syntax' but 'plain'"):
            resolve_defaults(draft, base, (), request_id="r", seed=1, family=FAMILIES[name])
