"""The styles and the numbers that show them."""

from __future__ import annotations

import random

import pytest
import torch

from serve_app.demo.scenes import render, sample_scenes
from serve_app.demo.styles import STYLES

SCENES = sample_scenes(60, random.Random(4))
BACKGROUNDS = [scene.background for scene in SCENES]


@pytest.mark.parametrize("name", STYLES)
def test_a_styles_number_grows_with_its_scale(name: str) -> None:
    style, pictures = STYLES[name], render(SCENES)

    strengths = torch.stack([style.strength(style.apply(pictures, s), BACKGROUNDS) for s in (0.0, 0.5, 1.0)])

    assert bool((strengths.diff(dim=0) > 0).float().mean() > 0.97)


@pytest.mark.parametrize("name", STYLES)
def test_scale_zero_leaves_a_picture_as_it_is(name: str) -> None:
    pictures = render(SCENES[:4])

    assert torch.equal(STYLES[name].apply(pictures, 0.0), pictures)


@pytest.mark.parametrize("name", STYLES)
def test_a_restyled_picture_stays_in_range(name: str) -> None:
    restyled = STYLES[name].apply(render(SCENES), 1.0)

    assert float(restyled.min()) >= 0
    assert float(restyled.max()) <= 1
