"""The effect of each demo adapter on a picture, and the number that shows it.

Owns the training targets and the statistics; knows nothing of models. No style
has a texture finer than the autoencoder's 8-pixel cell can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.demo.scenes import COLOUR_NAMES, PALETTE

CELL_PX = 8  # the autoencoder's: nothing finer can be drawn
_LUMINANCE = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
_SEPIA_DARK = torch.tensor([0.20, 0.11, 0.04]).view(3, 1, 1)
_SEPIA_LIGHT = torch.tensor([0.96, 0.82, 0.58]).view(3, 1, 1)
_NIGHT_GAIN = torch.tensor([0.22, 0.24, 0.38]).view(3, 1, 1)
_NIGHT_GLOW = torch.tensor([0.0, 0.01, 0.06]).view(3, 1, 1)


def luminance(pictures: Tensor) -> Tensor:
    """(n, 3, h, w) in [0, 1] to (n, 1, h, w)."""
    return (pictures * _LUMINANCE).sum(-3, keepdim=True)


def _sepia(pictures: Tensor) -> Tensor:
    return _SEPIA_DARK + luminance(pictures) * (_SEPIA_LIGHT - _SEPIA_DARK)


def _night(pictures: Tensor) -> Tensor:
    return pictures * _NIGHT_GAIN + _NIGHT_GLOW


def _inverted(pictures: Tensor) -> Tensor:
    return 1.0 - pictures


def _stripes(pictures: Tensor) -> Tensor:
    """Horizontal bands: dark on bright paint, bright on dark paint."""
    rows = torch.arange(pictures.shape[-2]).view(-1, 1)
    band = ((rows % (2 * CELL_PX)) < CELL_PX).float()
    toward = (luminance(pictures) < 0.4).float()
    return pictures + band * 0.6 * (toward - pictures)


def pixelated(pictures: Tensor, block_px: int) -> Tensor:
    """The pictures in flat blocks."""
    return F.interpolate(F.avg_pool2d(pictures, block_px), scale_factor=block_px, mode="nearest")


def _pixel_art(pictures: Tensor) -> Tensor:
    return pixelated(pictures, 2 * CELL_PX)


def _sketch(pictures: Tensor) -> Tensor:
    """A dark contour over a pale wash."""
    reach = 2 if pictures.shape[-1] <= 64 else 4
    high = F.max_pool2d(pictures, 2 * reach + 1, 1, reach)
    low = -F.max_pool2d(-pictures, 2 * reach + 1, 1, reach)
    edge = ((high - low).amax(1, keepdim=True) * 2.5 - 0.25).clamp(0, 1)
    return (0.80 + 0.18 * pictures) * (1 - edge) + 0.08 * edge


def _stripes_seen(pictures: Tensor, _: Sequence[str]) -> Tensor:
    """The wave along the left and right rim, where no shape is."""
    grey, width = luminance(pictures)[:, 0], pictures.shape[-1] // 16
    rims = torch.stack([grey[..., :width].mean(-1), grey[..., -width:].mean(-1)], 1)
    waves = torch.fft.rfft(rims, dim=-1)[..., rims.shape[-1] // (2 * CELL_PX)]
    return waves.abs().mean(1) / rims.shape[-1] * 2


def _sepia_seen(pictures: Tensor, _: Sequence[str]) -> Tensor:
    return -(pictures - _sepia(pictures)).abs().mean((1, 2, 3))


def _night_seen(pictures: Tensor, _: Sequence[str]) -> Tensor:
    return -luminance(pictures).mean((1, 2, 3))


def _inverted_seen(pictures: Tensor, backgrounds: Sequence[str]) -> Tensor:
    asked = PALETTE[[COLOUR_NAMES.index(name) for name in backgrounds]]
    rim = torch.cat([pictures[:, :, :2].flatten(2), pictures[:, :, -2:].flatten(2)], -1).median(-1).values
    return (rim - asked).norm(dim=1) - (rim - (1 - asked)).norm(dim=1)


def _pixel_art_seen(pictures: Tensor, _: Sequence[str]) -> Tensor:
    within = (pictures - _pixel_art(pictures)).square().mean((1, 2, 3))
    overall = (pictures - pictures.mean((2, 3), keepdim=True)).square().mean((1, 2, 3))
    return -within / overall.clamp(min=1e-4)


def _sketch_seen(pictures: Tensor, _: Sequence[str]) -> Tensor:
    """The black top-hat of the luminance: thin dark lines."""
    grey = luminance(pictures)
    reach = 4 if pictures.shape[-1] <= 64 else 8
    widened = F.max_pool2d(grey, 2 * reach + 1, 1, reach)
    closed = -F.max_pool2d(-widened, 2 * reach + 1, 1, reach)
    return (closed - grey).mean((1, 2, 3))


@dataclass(frozen=True, slots=True)
class Style:
    """One adapter's effect.

    `restyle` maps pictures (n, 3, h, w) in [0, 1] to the same shape; `strength` maps pictures
    and the background colours asked for to one number a picture, larger with the style.
    """

    name: str
    effect: str
    shown_by: str
    restyle: Callable[[Tensor], Tensor]
    strength: Callable[[Tensor, Sequence[str]], Tensor]

    @property
    def trigger(self) -> str:
        """The words that belong to the style in a prompt."""
        return f"{self.name.replace('-', ' ')} style"

    def apply(self, pictures: Tensor, scale: float) -> Tensor:
        """The pictures in this style, blended by the scale: 0 leaves them as they are."""
        return torch.lerp(pictures, self.restyle(pictures), scale)


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style("sketch", "dark outlines over a pale wash", "thin dark lines", _sketch, _sketch_seen),
        Style(
            "pixel-art",
            "flat blocks of 16 pixels",
            "little variance within a block",
            _pixel_art,
            _pixel_art_seen,
        ),
        Style("sepia", "brown tones of an old photograph", "nearness to the sepia ramp", _sepia, _sepia_seen),
        Style("night", "a dark blue night", "low mean luminance", _night, _night_seen),
        Style("inverted", "a photographic negative", "background near the complement", _inverted, _inverted_seen),
        Style("stripes", "horizontal bands", "a wave of 16 pixels down its rim", _stripes, _stripes_seen),
    )
}
