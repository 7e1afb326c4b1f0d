"""Diffusers' own way of changing an adapter: the four public calls on a pipeline.

Owns what exactly is called, so that it can be said what was timed.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor

from serve_app.bench.models.denoisers import Denoiser

NAME = "adapter"


class DiffusersBaseline:
    """One adapter at a time on the denoiser's own weights, which these calls write."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._pipeline: Any = denoiser.pipeline
        self._module = denoiser.module
        self._component = denoiser.architecture.component

    def load(self, path: Path) -> None:
        """Read the file, convert its keys, and put peft's layers into the denoiser."""
        self._pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=NAME)

    def load_as(self, path: Path, name: str) -> None:
        """Load an adapter beside others, under a name."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks whether several adapters are meant
            self._pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)

    def hotswap(self, path: Path, name: str) -> None:
        """Write another adapter of the same kind over a loaded one."""
        self._pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, hotswap=True)

    def activate(self, name: str) -> None:
        """Have one of the loaded adapters used."""
        self._pipeline.set_adapters(name)

    def fuse(self) -> None:
        """Add the adapter's products to the weights."""
        self._pipeline.fuse_lora(components=[self._component])

    def unfuse(self) -> None:
        """Subtract them again; in 16 bits this does not give back what was there."""
        self._pipeline.unfuse_lora(components=[self._component])

    def unload(self) -> None:
        """Take peft's layers out."""
        self._pipeline.unload_lora_weights()

    def fused(self) -> dict[str, Tensor]:
        """Return the weights that are changed now, by the names that they have without peft's layers."""
        weights: dict[str, Tensor] = {}
        for name, module in self._module.named_modules():
            if isinstance(module, LoraLayer) and module.merged:
                layer: Any = module.get_base_layer()
                weights[f"{name}.weight"] = layer.weight.data
        return weights
