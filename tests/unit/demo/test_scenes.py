"""Scenes, their pictures and their captions."""

from __future__ import annotations

import random

import pytest
import torch

from serve_app.demo.checker import read_picture, sample_requests, shows
from serve_app.demo.scenes import (
    COLOUR_NAMES,
    SHAPES,
    SIZES,
    Wanted,
    caption,
    plain_scene,
    render,
    sample_scenes,
)


@pytest.mark.parametrize("side", [32, 64, 128])
def test_pictures_have_the_asked_size_and_stay_in_range(side: int) -> None:
    pictures = render(sample_scenes(20, random.Random(1)), side)

    assert pictures.shape == (20, 3, side, side)
    assert float(pictures.min()) >= 0
    assert float(pictures.max()) <= 1


def test_the_checker_reads_every_drawn_scene_right() -> None:
    scenes = sample_scenes(200, random.Random(2))

    for scene, picture in zip(scenes, render(scenes), strict=True):
        seen = read_picture(picture)
        assert (seen.shape, seen.foreground, seen.background, seen.size) == (
            scene.shape,
            scene.foreground,
            scene.background,
            scene.size,
        )


def test_the_checker_sees_nothing_in_a_plain_picture() -> None:
    seen = read_picture(torch.full((3, 64, 64), 0.96))

    assert seen.background == "white"
    assert seen.shape is None


def test_the_checker_judges_only_what_was_asked() -> None:
    picture = render([plain_scene("star", "red", "black")])[0]

    assert shows(picture, Wanted(shape="star"))
    assert shows(picture, Wanted())
    assert not shows(picture, Wanted(shape="star", foreground="blue"))


def test_a_caption_names_exactly_what_it_says_it_names() -> None:
    rng = random.Random(3)
    for scene in sample_scenes(300, rng):
        text, told = caption(scene, rng, filler=0)
        words = text.replace(",", "").split()
        named = {colour for colour in COLOUR_NAMES if colour in words}
        assert named == {colour for colour in (told.foreground, told.background) if colour}


def test_requests_repeat_with_their_seed_and_cover_everything() -> None:
    requests = sample_requests(50)

    assert requests == sample_requests(50)
    assert {r.wanted.shape for r in requests} == set(SHAPES)
    assert {r.wanted.foreground for r in requests} == set(COLOUR_NAMES)
    assert {r.wanted.size for r in requests} == {None, *SIZES}
