"""Which form of a reply the Accept header asks for (RFC 9110, section 12.5.1).

Owns reading Accept and choosing; pure. Must not know how images are encoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from serve_app.core import ImageFormat
from serve_app.errors import NotAcceptable

FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
# Not registered, but browsers and people write it.
_ALIASES = {"image/jpg": "image/jpeg", "*": "*/*"}


@dataclass(frozen=True, slots=True)
class MediaRange:
    """One entry of an Accept header; `specificity` is 2 for a type, 1 for `image/*`, 0 for `*/*`."""

    media_type: str
    quality: float
    position: int

    @property
    def specificity(self) -> int:
        """How exactly the entry names a type."""
        return 2 - self.media_type.count("*")

    def matches(self, media_type: str) -> bool:
        """Whether the entry covers a type."""
        if self.media_type == "*/*":
            return True
        if self.media_type.endswith("/*"):
            return media_type.startswith(self.media_type[:-1])
        return self.media_type == media_type


def media_ranges(accept: str) -> tuple[MediaRange, ...]:
    """Return the entries of an Accept header in their order; one with an unreadable q is dropped."""
    ranges: list[MediaRange] = []
    for position, entry in enumerate(accept.split(",")):
        name, *parameters = (part.strip() for part in entry.split(";"))
        quality = _quality(parameters)
        if name and quality is not None:
            lowered = name.lower()
            ranges.append(MediaRange(_ALIASES.get(lowered, lowered), quality, position))
    return tuple(ranges)


def _quality(parameters: list[str]) -> float | None:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                quality = float(value)
            except ValueError:
                return None
            return quality if 0 <= quality <= 1 else None
    return 1.0


def choose_format(accept: str | None) -> ImageFormat:
    """Return the image format to answer with.

    The highest q wins; among equals a format named outright beats a wildcard, then the header's order
    decides. A wildcard alone, or no header, means JPEG.

    Raises:
        NotAcceptable: every format is excluded.
    """
    if accept is None or not accept.strip():
        return FORMATS[0]
    ranges = media_ranges(accept)
    ranked: list[tuple[float, int, int, int]] = []
    for index, name in enumerate(FORMATS):
        matching = [entry for entry in ranges if entry.matches(f"image/{name}")]
        if not matching:
            continue
        # The most specific entry speaks for a type: `image/*, image/png;q=0` excludes PNG.
        best = max(matching, key=lambda entry: (entry.specificity, entry.quality))
        if best.quality > 0:
            ranked.append((-best.quality, -best.specificity, best.position, index))
    if not ranked:
        raise NotAcceptable(accept=accept[:200], choices=", ".join(f"image/{name}" for name in FORMATS))
    return FORMATS[min(ranked)[-1]]


def prefers_page(accept: str | None) -> bool:
    """Whether `text/html` comes first in an Accept header, as browsers send it."""
    ranges = sorted(media_ranges(accept or ""), key=lambda entry: (-entry.quality, entry.position))
    return bool(ranges) and ranges[0].media_type == "text/html" and ranges[0].quality > 0
