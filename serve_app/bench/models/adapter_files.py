"""Adapter files over chosen layers, with random factors, in the spellings that trainers write.

Owns the two spellings: diffusers' own, and kohya's as its trainer writes it for each family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from serve_app.bench.measuring.options import Model, SwapOptions
from serve_app.bench.models.denoisers import BLOCKS, SPREAD, Outline

DRAWN_VALUES = 1 << 22
Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """Two adapters of one kind, and the first one in kohya's spelling, where that family has one to write."""

    first: Path
    second: Path
    kohya: Path | None


def write_adapter_files(outline: Outline, options: SwapOptions, folder: Path) -> AdapterFiles:
    """Write the files of a run; factors are float16, as trainers mostly save them."""
    shapes = outline.targets(options.targets)
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    factors = draw_factors(shapes, options.rank, options.seed + 1)
    _write(second, as_diffusers(draw_factors(shapes, options.rank, options.seed + 2), outline.architecture.component))
    _write(first, as_diffusers(factors, outline.architecture.component))
    if options.model is Model.FLUX:  # its kohya keys join layers whose full widths the converter knows by heart
        return AdapterFiles(first, second, None)
    kohya = folder / "kohya.safetensors"
    in_blocks = {name: pair for name, pair in factors.items() if any(block in name for block in BLOCKS)}
    layers_per_block = outline.architecture.config.get("layers_per_block", 2)
    numbered = None if options.model is Model.SD15 else layers_per_block
    _write(kohya, as_kohya(in_blocks, alpha=options.rank / 2, layers_per_block=numbered))
    return AdapterFiles(first, second, kohya)


def draw_factors(shapes: Mapping[str, torch.Size], rank: int, seed: int) -> Factors:
    """Return module name -> (down, up); drawn once and cut at other places for each layer."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(DRAWN_VALUES, generator=random).repeat(2)
    position = 0

    def take(*shape: int) -> Tensor:
        nonlocal position
        count = torch.Size(shape).numel()
        is_long = count > DRAWN_VALUES
        values = torch.randn(count, generator=random) if is_long else drawn[position : position + count]
        position = (position + count * 7 + 13) % DRAWN_VALUES
        return values.view(shape)

    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, shape in shapes.items():
        down = take(rank, *shape[1:]) * shape[1:].numel() ** -0.5
        up = take(shape[0], rank, *[1] * (len(shape) - 2)) * SPREAD
        factors[name] = (down.half(), up.half())
    return factors


def as_diffusers(factors: Factors, component: str) -> dict[str, Tensor]:
    """Spell factors as diffusers and peft write them."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        tensors[f"{component}.{name}.lora_A.weight"] = down
        tensors[f"{component}.{name}.lora_B.weight"] = up
    return tensors


def as_kohya(factors: Factors, *, alpha: float, layers_per_block: int | None) -> dict[str, Tensor]:
    """Spell factors as kohya's trainer does.

    For SDXL it numbers blocks as the original implementation did: then `layers_per_block` is the UNet's. For SD1.5
    it keeps diffusers' names: then it is None.
    """
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        original = name if layers_per_block is None else original_name(name, layers_per_block)
        stem = "lora_unet_" + original.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = down
        tensors[f"{stem}.lora_up.weight"] = up
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def original_name(name: str, layers_per_block: int) -> str:
    """Return the original implementation's name of a layer inside an attention block of a UNet."""
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.(.+)", name)
    assert found is not None, name
    side, block, at, rest = found.groups()
    if side is None:
        return f"middle_block.1.{rest}"
    position = int(block) * (layers_per_block + 1) + int(at)
    return f"input_blocks.{position + 1}.1.{rest}" if side == "down" else f"output_blocks.{position}.1.{rest}"


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
