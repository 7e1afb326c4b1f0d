"""A contact sheet: one prompt and seed with several adapters, in one picture.

Owns which images a sheet shows and how it is laid out: a row of its own for each base, the base alone first.
"""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.cli.service import Drawing, Pictures, ServiceClient
from serve_app.cli.terminal import CommandFailed
from serve_app.core import AdapterRef, UnresolvedRequest

if TYPE_CHECKING:
    from PIL import Image, ImageFont

COLUMNS = 8
MIN_TILE_PX, MAX_TILE_PX = 128, 384
_GAP_PX, _LABEL_PX, _HEAD_PX, _FONT_PX = 10, 22, 40, 13
_PAPER, _INK, _FAINT, _BLANK = "#ffffff", "#16181d", "#5b6270", "#e7e9ee"


@dataclass(frozen=True, slots=True)
class Tile:
    """One cell of a sheet: an image, or the reason why there is none. `base_id` is empty if unknown."""

    label: str
    base_id: str
    drawing: Drawing | None = None
    refusal: str = ""


def draw_tiles(
    service: ServiceClient, draft: UnresolvedRequest, pictures: Pictures | None, *, say: Callable[[str], object]
) -> list[Tile]:
    """Generate a draft with each of its adapters, or all that the service knows, and with each base alone.

    One after the other: images that share a pass on the device are not bit for bit those drawn alone. Where the draft
    has no seed, the first image's is used for all.

    Raises:
        CommandFailed: the service is away. A refused request becomes a tile without an image.
    """
    adapters = draft.adapters or _all_adapters(service, draft.model)
    base_of: dict[str, list[Tile]] = {}
    for number, adapter in enumerate(adapters, 1):
        say(f"{number} of {len(adapters)}: {adapter.id}")
        tile = _tile(service, dataclasses.replace(draft, adapters=(adapter,)), pictures, _label(adapter))
        base_of.setdefault(tile.base_id, []).append(tile)
        if tile.drawing is not None:
            draft = dataclasses.replace(draft, seed=tile.drawing.seed)
    for base_id, tiles in base_of.items():
        if base_id:
            say(f"{base_id} alone")
            alone = dataclasses.replace(draft, model=base_id, adapters=())
            tiles.insert(0, _tile(service, alone, pictures, f"{base_id} alone"))
    return [tile for tiles in base_of.values() for tile in tiles]


def compose(tiles: Sequence[Tile], prompt: str) -> Image.Image:
    """Arrange tiles in rows of at most `COLUMNS`, a new row for each base; at least one has an image."""
    from PIL import Image, ImageDraw, ImageFont

    pictures = {id(tile): _picture(tile.drawing) for tile in tiles if tile.drawing is not None}
    side = min(MAX_TILE_PX, max(MIN_TILE_PX, *(max(picture.size) for picture in pictures.values())))
    rows = _rows(tiles)
    width = _GAP_PX + max(len(row) for row in rows) * (side + _GAP_PX)
    sheet = Image.new("RGB", (width, _HEAD_PX + len(rows) * (side + _LABEL_PX + _GAP_PX)), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PX)
    seed = next(tile.drawing.seed for tile in tiles if tile.drawing is not None)
    pen.text((_GAP_PX, _GAP_PX), _fit(f"{prompt}   (seed {seed})", font, width - 2 * _GAP_PX), fill=_INK, font=font)
    for row, members in enumerate(rows):
        for column, tile in enumerate(members):
            left, top = _GAP_PX + column * (side + _GAP_PX), _HEAD_PX + row * (side + _LABEL_PX + _GAP_PX)
            if id(tile) in pictures:
                sheet.paste(_scaled(pictures[id(tile)], side), (left, top))
            else:
                pen.rectangle((left, top, left + side, top + side), fill=_BLANK)
                pen.text((left + 8, top + 8), textwrap.fill(tile.refusal, side // 8), fill=_FAINT, font=font)
            pen.text((left, top + side + 4), _fit(tile.label, font, side), fill=_FAINT, font=font)
    return sheet


def _all_adapters(service: ServiceClient, model: str | None) -> tuple[AdapterRef, ...]:
    return tuple(
        AdapterRef(known.id)
        for known in service.models()
        if known.base_id is not None and model in (None, known.base_id)
    )


def _tile(service: ServiceClient, draft: UnresolvedRequest, pictures: Pictures | None, label: str) -> Tile:
    try:
        drawing = service.draw(draft, form="png", pictures=pictures)
    except CommandFailed as failure:
        if failure.code in ("no_service", "timeout", "broken_connection", "unauthorised"):
            raise
        return Tile(label, "", refusal=str(failure))
    return Tile(label, drawing.base_id, drawing)


def _label(adapter: AdapterRef) -> str:
    return adapter.id if adapter.scale in (None, 1) else f"{adapter.id} x {adapter.scale:g}"


def _rows(tiles: Sequence[Tile]) -> list[list[Tile]]:
    rows: list[list[Tile]] = []
    for tile in tiles:
        if not rows or rows[-1][0].base_id != tile.base_id or len(rows[-1]) == COLUMNS:
            rows.append([])
        rows[-1].append(tile)
    return rows


def _picture(drawing: Drawing) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(drawing.images[0])).convert("RGB")


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    """Return a picture scaled to fit its cell, on the sheet's background."""
    from PIL import Image

    factor = side / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    place = Image.new("RGB", (side, side), _PAPER)
    place.paste(picture.resize(size, Image.Resampling.LANCZOS), ((side - size[0]) // 2, (side - size[1]) // 2))
    return place


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return a text cut to a width; its end is kept, because it tells adapters of one owner apart."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"
