"""The contact sheet: the same prompts through a base and each of its adapters.

`python -m serve_app.demo.sheet OUT.png`
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from serve_app.demo.drawing import draw, load_base
from serve_app.demo.embedded import FAMILIES, SIDE_PX, STYLE_NAMES, adapter_id, base_id, embedded_root

PROMPTS = {
    "sd15": ("a large red circle on a yellow background", "a large green triangle on a white background"),
    "sdxl": ("a large yellow star on a blue background", "a large pink square on a black background"),
}
_SEED = 7
_TILE_PX = 2 * SIDE_PX
_GAP_PX, _HEAD_PX, _LEFT_PX = 6, 24, 190


def contact_sheet(root: Path | None = None) -> Image.Image:
    """Prompts down, base and adapters across."""
    columns = len(STYLE_NAMES) + 1
    rows = sum(len(prompts) for prompts in PROMPTS.values())
    step = _TILE_PX + _GAP_PX
    sheet = Image.new("RGB", (_LEFT_PX + columns * step, _HEAD_PX + rows * step), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(("base alone", *STYLE_NAMES)):
        pen.text((_LEFT_PX + column * step, 6), name, fill="black")
    top = _HEAD_PX
    for family in FAMILIES:
        for prompt, pictures in zip(PROMPTS[family], _rows(family, root), strict=True):
            pen.text((8, top + _TILE_PX // 3), _label(family, prompt), fill="black")
            for column, picture in enumerate(pictures):
                sheet.paste(_tile(picture), (_LEFT_PX + column * step, top))
            top += step
    return sheet


def _rows(family: str, root: Path | None) -> list[list[Tensor]]:
    """For each prompt of the family its picture from the base and from each adapter."""
    pipeline = load_base(base_id(family), root)
    prompts = PROMPTS[family]
    seeds = [_SEED] * len(prompts)
    columns = [draw(pipeline, prompts, seeds)]
    for style in STYLE_NAMES:
        pipeline.load_lora_weights((root or embedded_root()) / adapter_id(family, style), adapter_name="style")
        columns.append(draw(pipeline, prompts, seeds))
        pipeline.unload_lora_weights()
    return [[column[i] for column in columns] for i in range(len(prompts))]


def _label(family: str, prompt: str) -> str:
    subject, _, background = prompt.partition(" on ")
    return f"{base_id(family)}\n\n{subject}\non {background}"


def _tile(picture: Tensor) -> Image.Image:
    image = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
    return image.resize((_TILE_PX, _TILE_PX), Image.Resampling.LANCZOS)


def main() -> None:
    """Write the sheet to the path on the command line."""
    parser = argparse.ArgumentParser(description="Draw the contact sheet of the demo models.")
    parser.add_argument("out", type=Path, help="PNG file to write")
    contact_sheet().save(parser.parse_args().out)


if __name__ == "__main__":
    main()
