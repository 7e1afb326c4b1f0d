"""Adapter repositories that must be refused, made from a good one."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FILE = "pytorch_lora_weights.safetensors"
CARD = """---
base_model: {base}
base_model_relation: adapter
tags: [lora]
---
"""


def write_broken_adapters(root: Path, embedded: Path) -> None:
    """Write `broken/<fault>` repositories below `root`, all for demo/sdxl but in one way wrong."""
    good = embedded / "demo" / "sdxl-sepia" / FILE
    tensors = load_file(good)

    def repository(name: str, base: str = "demo/sdxl") -> Path:
        folder = root / "broken" / name
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(CARD.format(base=base))
        return folder

    (repository("truncated") / FILE).write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    torch.save(tensors, repository("pickled") / "pytorch_lora_weights.bin")
    save_file(_with_nan(tensors), repository("nan") / FILE)
    save_file(_renamed(tensors), repository("no-layer") / FILE)
    # Its card says SDXL-type, its weights are those of an adapter for the other base.
    shutil.copy(embedded / "demo" / "sd15-sepia" / FILE, repository("mislabelled") / FILE)


def _with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(iter(tensors))
    return tensors | {name: torch.full_like(tensors[name], float("nan"))}


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.replace("down_blocks", "side_blocks").replace("up_blocks", "side_blocks").replace("mid_block", "side"): t
        for name, t in tensors.items()
    }
