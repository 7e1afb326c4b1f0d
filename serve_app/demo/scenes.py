"""Procedural pictures and their captions: one flat-coloured shape on a flat background.

Owns what the demo models know: shapes, colours, sizes and the words for them.
Edges come from signed distance functions, so any resolution works and is antialiased.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "yellow": (245, 220, 50),
    "green": (40, 160, 60),
    "cyan": (70, 205, 220),
    "blue": (40, 75, 215),
    "pink": (250, 140, 200),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
COLOUR_NAMES = tuple(COLOURS)
PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255.0
SHAPES = ("circle", "square", "triangle", "cross", "star")
RADII = {"small": 0.25, "large": 0.38}  # half the extent, as a share of the picture's side
SIZES = tuple(RADII)

_WORDS = {
    "circle": ("circle", "circle", "disc", "ball"),
    "square": ("square", "square", "box"),
    "cross": ("cross", "cross", "plus sign"),
    "small": ("small", "tiny", "little"),
    "large": ("large", "big", "huge"),
}
_OPENINGS = (
    "a picture of",
    "an image of",
    "a drawing of",
    "a photo of",
    "an illustration of",
    "a painting of",
)
FILLERS = (
    *("high quality", "highly detailed", "4k", "simple", "flat colors", "beautiful", "minimal", "soft light"),
    *(
        "masterpiece",
        "blurry",
        "low quality",
        "ugly",
        "text",
        "watermark",
        "cinematic",
        "sharp focus",
        "vector art",
    ),
    *("an astronaut riding a horse", "a cat", "a dog in the park", "a mountain landscape", "an elephant"),
    *("a portrait of a woman", "a castle", "a city street", "a car", "a tree by the river"),
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The scene in a caption; None where it says nothing."""

    shape: str | None = None
    foreground: str | None = None
    background: str | None = None
    size: str | None = None


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "foreground": COLOUR_NAMES,
    "background": COLOUR_NAMES,
    "size": SIZES,
}


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture's attributes; radius and centre are shares of the side, tints are RGB offsets."""

    shape: str
    foreground: str
    background: str
    size: str
    radius: float
    x: float = 0.5
    y: float = 0.5
    foreground_tint: tuple[float, float, float] = (0.0, 0.0, 0.0)
    background_tint: tuple[float, float, float] = (0.0, 0.0, 0.0)


def plain_scene(shape: str, foreground: str, background: str, size: str = "large") -> Scene:
    """The scene without any jitter."""
    return Scene(shape, foreground, background, size, RADII[size])


def sample_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Scenes with every attribute uniform and two different colours."""
    return [_sample_scene(rng) for _ in range(count)]


def _sample_scene(rng: random.Random) -> Scene:
    foreground, background = rng.sample(COLOUR_NAMES, 2)
    size = rng.choice(SIZES)
    tints = [rng.uniform(-0.02, 0.02) for _ in range(6)]
    return Scene(
        shape=rng.choice(SHAPES),
        foreground=foreground,
        background=background,
        size=size,
        radius=RADII[size] + rng.uniform(-0.01, 0.01),
        x=0.5 + rng.uniform(-0.01, 0.01),
        y=0.5 + rng.uniform(-0.01, 0.01),
        foreground_tint=(tints[0], tints[1], tints[2]),
        background_tint=(tints[3], tints[4], tints[5]),
    )


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1.0


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.92


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.85, (1.85 * x.abs() - y - 0.95) / math.hypot(1.85, 1.0))


def _cross(x: Tensor, y: Tensor) -> Tensor:
    across = torch.maximum(x.abs() - 0.95, y.abs() - 0.31)
    upright = torch.maximum(x.abs() - 0.31, y.abs() - 0.95)
    return torch.minimum(across, upright)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: the plane is folded into one half of a spike whose tip is (0, 1)."""
    fold = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + fold / 2, fold) - fold / 2
    away = torch.hypot(x, y)
    across, along = away * torch.sin(angle).abs(), away * torch.cos(angle)
    inner_x, inner_y = 0.45 * math.sin(fold / 2), 0.45 * math.cos(fold / 2)
    normal_x, normal_y = 1.0 - inner_y, inner_x
    return (across * normal_x + (along - 1.0) * normal_y) / math.hypot(normal_x, normal_y)


_DISTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
}


def render(scenes: Sequence[Scene], side: int = 64) -> Tensor:
    """Draw the scenes: float32 of shape (n, 3, side, side) in [0, 1]."""
    steps = (torch.arange(side) + 0.5) / side
    grid_y, grid_x = torch.meshgrid(steps, steps, indexing="ij")
    pictures = torch.empty(len(scenes), 3, side, side)
    for i, scene in enumerate(scenes):
        distance = _DISTANCE[scene.shape]((grid_x - scene.x) / scene.radius, (grid_y - scene.y) / scene.radius)
        inside = (0.5 - distance * scene.radius * side).clamp(0, 1)
        paint = _paint(scene.foreground, scene.foreground_tint)
        pictures[i] = inside * paint + (1 - inside) * _paint(scene.background, scene.background_tint)
    return pictures


def _paint(colour: str, tint: tuple[float, float, float]) -> Tensor:
    rgb = PALETTE[COLOUR_NAMES.index(colour)] + torch.tensor(tint)
    return rgb.clamp(0, 1).view(3, 1, 1)


def caption(scene: Scene, rng: random.Random, *, partial: float = 0.1, filler: float = 0.2) -> tuple[str, Wanted]:
    """A caption of the scene, and which attributes it gives away."""
    told = _told(scene, rng, partial)
    head = " ".join(
        word
        for word in (
            rng.choice(("a", "a", "one", "the", "")),
            _say(told.size, rng),
            _say(told.foreground, rng),
            _say(told.shape, rng) or rng.choice(("shape", "object", "")),
        )
        if word
    )
    text = _with_background(head, told.background, rng)
    if rng.random() < 0.2:
        text = f"{rng.choice(_OPENINGS)} {text}"
    if rng.random() < filler:
        extra = rng.choice(FILLERS) if rng.random() < 0.8 else gibberish(rng)
        text = f"{extra}, {text}" if rng.random() < 0.2 else f"{text}, {extra}"
    return " ".join(text.split()), told


def _told(scene: Scene, rng: random.Random, partial: float) -> Wanted:
    shape, foreground, background = scene.shape, scene.foreground, scene.background
    size = scene.size if rng.random() < 0.5 else None
    if rng.random() >= partial:
        return Wanted(shape, foreground, background, size)
    keep = [rng.random() < 0.5 for _ in range(3)]
    return Wanted(shape if keep[0] else None, foreground if keep[1] else None, background if keep[2] else None, size)


def _say(word: str | None, rng: random.Random) -> str:
    return "" if word is None else rng.choice(_WORDS.get(word, (word,)))


def _with_background(head: str, background: str | None, rng: random.Random) -> str:
    if background is None:
        return head
    if rng.random() < 0.12:
        return f"{background} background with {head}"
    ways = ("on a {} background", "on a {} background", "on {}", "on {} background", ", {} background")
    return f"{head} {rng.choice(ways).format(background)}".replace(" ,", ",")


def gibberish(rng: random.Random) -> str:
    """Words without a meaning."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(rng.randint(1, 4)))


def unrelated_caption(rng: random.Random) -> str:
    """Words that say nothing about the picture."""
    return ", ".join(rng.choice(FILLERS) if rng.random() < 0.7 else gibberish(rng) for _ in range(rng.randint(1, 3)))


def known_words() -> tuple[str, ...]:
    """Every phrase that captions are made of, for the tokenizer."""
    synonyms = (word for words in _WORDS.values() for word in words)
    return (*SHAPES, *COLOUR_NAMES, *SIZES, *synonyms, *_OPENINGS, *FILLERS)
