"""Bases whose weights are packed, or to be packed while they are loaded.

Owns which of them can be served here, and how diffusers is told to pack a denoiser. Loads the packages that pack only
where something is to be packed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.quantization_config import BitsAndBytesConfig, TorchAoConfig

from serve_app.config import BaseModelConfig
from serve_app.errors import BaseUnusable
from serve_app.families.config_files import missing_packer, packed_parts, packing_in, unusable_packing
from serve_app.families.quantised import Quantization


def check_part(config: BaseModelConfig, part: str, folder: Path, device: torch.device, *, is_to_pack: bool) -> None:
    """Refuse a part, in the folder of a base or its own, whose packed weights cannot be served.

    Raises:
        BaseUnusable: they are packed in another way, its package is missing, the device cannot compute with them, or
            they are to be packed once more.
    """
    if (reason := unusable_packing(folder, part)) is not None:
        raise BaseUnusable(config.id, reason)
    packed = packing_in(folder, part)
    if packed is not None and is_to_pack:
        raise BaseUnusable(config.id, f"its part '{part}' is {packed} already; leave out 'quantization'")
    _check_device(config.id, packed, device)


def packing_of(
    config: BaseModelConfig, folder: Path, denoiser: str, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return how diffusers is to pack the parts of a base while it loads them; nothing where none is asked for.

    Raises:
        BaseUnusable: a package or a GPU is missing, or a part in the folder is as `check_part` refuses it.
    """
    asked = config.quantization
    for part in set(packed_parts(folder)) - config.part_sources.keys():
        check_part(config, part, folder, device, is_to_pack=part == denoiser and asked is not None)
    if asked is None:
        return {}
    if (reason := missing_packer(asked)) is not None:
        raise BaseUnusable(config.id, reason)
    _check_device(config.id, asked, device)
    return {denoiser: _settings(asked, dtype)}


def _check_device(base_id: str, quantization: Quantization | None, device: torch.device) -> None:
    if quantization == "nf4" and device.type != "cuda":
        raise BaseUnusable(base_id, "bitsandbytes packs weights as nf4 on GPUs only, and this replica has none")


def _settings(quantization: Quantization, dtype: torch.dtype) -> Any:
    if quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )

    kind = Int8WeightOnlyConfig if quantization == "int8" else Float8WeightOnlyConfig
    # By default it would change how all matrices of the process are multiplied.
    return TorchAoConfig(kind(set_inductor_config=False))
