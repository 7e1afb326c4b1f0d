"""Does a picture show what the prompt says?  Judged from its pixels, without any model.

The background is the median of the rim, the foreground the median of the pixels
that differ most from it; both are named after the nearest colour. The shape is the
one whose outline overlaps the foreground best, both cut to their bounding boxes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.demo.scenes import COLOUR_NAMES, PALETTE, RADII, SHAPES, SIZES, Wanted, plain_scene, render

_CUT_PX = 32
_LEAST_CONTRAST = 0.12
_LEAST_PIXELS = 12


@dataclass(frozen=True, slots=True)
class DetectedScene:
    """The scene in a picture; None where there is nothing to see."""

    background: str
    foreground: str | None = None
    shape: str | None = None
    size: str | None = None


def read_picture(picture: Tensor) -> DetectedScene:
    """Name what one picture, (3, h, w) in [0, 1], shows."""
    rim = _rim_colour(picture)
    background = _colour_name(rim)
    distance = (picture - rim.view(3, 1, 1)).norm(dim=0)
    if float(distance.max()) < _LEAST_CONTRAST:
        return DetectedScene(background)
    mask = _foreground(distance)
    if int(mask.sum()) < _LEAST_PIXELS:
        return DetectedScene(background)
    core = mask & (distance > 0.8 * distance[mask].median())
    cut, radius = _cut_out(mask)
    overlap = torch.minimum(cut, _OUTLINES).sum((1, 2)) / torch.maximum(cut, _OUTLINES).sum((1, 2))
    size = min(SIZES, key=lambda name: abs(RADII[name] - radius))
    return DetectedScene(
        background, _colour_name(picture[:, core].median(1).values), SHAPES[int(overlap.argmax())], size
    )


def shows(picture: Tensor, wanted: Wanted) -> bool:
    """Whether the picture has every shape and colour that was asked for; the size is not judged."""
    seen = read_picture(picture)
    return all(getattr(wanted, name) in (None, getattr(seen, name)) for name in ("shape", "foreground", "background"))


def _rim_colour(picture: Tensor, width: int = 2) -> Tensor:
    sides = (picture[:, :width], picture[:, -width:], picture[:, :, :width], picture[:, :, -width:])
    return torch.cat([side.flatten(1) for side in sides], 1).median(1).values


def _colour_name(rgb: Tensor) -> str:
    return COLOUR_NAMES[int((PALETTE - rgb).norm(dim=1).argmin())]


def _foreground(distance: Tensor) -> Tensor:
    """Pixels more than half as far from the rim's colour as the furthest ones, lone pixels dropped."""
    furthest = distance.flatten().kthvalue(int(distance.numel() * 0.985)).values
    mask = distance > 0.5 * furthest
    return mask & (F.avg_pool2d(mask.float()[None, None], 3, 1, 1)[0, 0] > 0.3)


def _cut_out(mask: Tensor) -> tuple[Tensor, float]:
    """The mask cut to its bounding box and scaled, and half its extent as a share of the side."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    box = mask[top:bottom, left:right].float()[None, None]
    radius = max(bottom - top, right - left) / 2 / mask.shape[1]
    return F.interpolate(box, size=(_CUT_PX, _CUT_PX), mode="bilinear", align_corners=False)[0, 0], radius


def _outlines() -> Tensor:
    pictures = render([plain_scene(shape, "white", "black") for shape in SHAPES], 192)
    return torch.stack([_cut_out(_foreground(picture.norm(dim=0)))[0] for picture in pictures])


_OUTLINES = _outlines()


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, the seed of its picture, and what it asks for."""

    prompt: str
    seed: int
    wanted: Wanted


def sample_requests(count: int, seed: int = 2024) -> list[Request]:
    """Seeded prompts in which every shape comes round and every other one names a size."""
    rng = random.Random(seed)
    return [_request(i, rng) for i in range(count)]


def _request(index: int, rng: random.Random) -> Request:
    foreground, background = rng.sample(COLOUR_NAMES, 2)
    shape, size = SHAPES[index % len(SHAPES)], rng.choice(SIZES) if index % 2 else None
    words = " ".join(word for word in (size, foreground, shape) if word)
    return Request(f"a {words} on a {background} background", 1000 + index, Wanted(shape, foreground, background, size))


def adherence(pictures: Tensor, wanted: Sequence[Wanted]) -> float:
    """Share of the pictures that show the shape and both colours asked for."""
    return sum(shows(picture, one) for picture, one in zip(pictures, wanted, strict=True)) / len(wanted)
