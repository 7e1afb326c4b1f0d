"""The bars that the embedded demo models must hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from serve_app.demo.checker import Request, adherence, sample_requests
from serve_app.demo.drawing import draw, load_base
from serve_app.demo.embedded import FAMILIES, STYLE_NAMES, adapter_id, base_id, embedded_root
from serve_app.demo.measure import measure_effect
from serve_app.demo.styles import STYLES

PAIRS = 12

# What they hold changes with the weights alone.
pytestmark = [pytest.mark.slow, pytest.mark.soak]


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """A base with the pictures of fifty seeded requests."""

    family: str
    pipeline: DiffusionPipeline
    requests: list[Request]
    pictures: Tensor


@pytest.fixture(scope="module", params=FAMILIES)
def drawn(request: pytest.FixtureRequest) -> BatchOutput:
    pipeline = load_base(base_id(request.param))
    requests = sample_requests(50)
    pictures = draw(pipeline, [r.prompt for r in requests], [r.seed for r in requests])
    return BatchOutput(request.param, pipeline, requests, pictures)


def test_a_base_draws_the_shape_and_both_colours_asked_for(drawn: BatchOutput) -> None:
    assert adherence(drawn.pictures, [r.wanted for r in drawn.requests]) >= 0.85


def test_the_checker_refuses_pictures_of_other_requests(drawn: BatchOutput) -> None:
    others = [r.wanted for r in drawn.requests[1:]] + [drawn.requests[0].wanted]

    assert adherence(drawn.pictures, others) <= 0.1


@pytest.mark.parametrize("style", STYLE_NAMES)
def test_an_adapter_shows_and_grows_with_its_scale(drawn: BatchOutput, style: str) -> None:
    folder = embedded_root() / adapter_id(drawn.family, style)

    effect = measure_effect(drawn.pipeline, folder, STYLES[style], drawn.requests[:PAIRS], drawn.pictures[:PAIRS])

    assert effect.told_apart >= 0.9
    assert effect.growing >= 0.9


@pytest.mark.parametrize("prompt", ["", "an elephant in the snow"])
def test_unknown_words_still_give_a_clean_picture(drawn: BatchOutput, prompt: str) -> None:
    pictures = draw(drawn.pipeline, [prompt] * 4, [1, 2, 3, 4])

    contrast = pictures.amax((1, 2, 3)) - pictures.amin((1, 2, 3))
    roughness = (pictures[..., 1:] - pictures[..., :-1]).abs().mean((1, 2, 3))

    assert all(float(value) > 0.3 for value in contrast)
    assert all(math.isfinite(float(value)) and float(value) < 0.08 for value in roughness)


def test_the_same_seed_gives_the_same_picture(drawn: BatchOutput) -> None:
    first, again, other = (draw(drawn.pipeline, ["a red circle on a white background"], [s]) for s in (5, 5, 6))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
