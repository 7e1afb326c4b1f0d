"""Quantised weights: how diffusers is told to pack a denoiser, and the plain tensors in packed parameters.

Owns all that depends on the packages that pack. Loads them, and diffusers, only where something is to be packed, since
the manifest of a base is read in processes that have neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
    import diffusers

    if quantization == "nf4":
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )  # fmt: skip
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind = Int8WeightOnlyConfig if quantization == "int8" else Float8WeightOnlyConfig
    # By default it would change how all matrices of the process are multiplied.
    return diffusers.TorchAoConfig(kind(set_inductor_config=False))


def is_packed(parameter: Tensor) -> bool:
    """Say whether a parameter holds fewer bits than its values have."""
    return is_traceable_wrapper_subclass(parameter) or hasattr(parameter, "quant_state")


def is_quantised(component: nn.Module) -> bool:
    """Say whether some layer of a component is quantised."""
    return any(map(is_packed, component.parameters()))


def plain_tensors(component: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a component by name, those that are packed in pieces."""
    for name, tensor in (*component.named_parameters(), *component.named_buffers()):
        yield from _pieces(name, tensor.data)
        if (state := getattr(tensor, "quant_state", None)) is not None:  # bitsandbytes' scales
            yield from _of_state(name, state)


def _pieces(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    wrapped: Any = tensor
    for part in wrapped.__tensor_flatten__()[0]:
        yield from _pieces(f"{name}.{part}", getattr(wrapped, part))


def _of_state(name: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    fields: Mapping[str, Any] = vars(state)
    for part, value in fields.items():
        if isinstance(value, Tensor):
            yield f"{name}.{part}", value
        elif part == "state2" and value is not None:
            yield from _of_state(f"{name}.{part}", value)
