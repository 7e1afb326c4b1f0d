"""What an adapter changes in the weights of a base, measured by fusing it, without touching the base."""

from __future__ import annotations

import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.weights.fuse import changes_bias, fuse_bias, fuse_weight
from tests.spelt_adapters import Base


def changes(base: Base, adapter: ParsedAdapter, scale: float = 1.0) -> dict[str, Tensor]:
    """Return module -> difference of its weight, and `<module>.bias` where that changes, in float64."""
    found: dict[str, Tensor] = {}
    for _, module, delta in adapter.layers():
        layer = base.denoiser.get_submodule(module)
        pristine = layer.weight
        out = torch.empty_like(pristine)
        fuse_weight(out, pristine, pristine, delta, scale)
        found[module] = out.double() - pristine.double()
        if changes_bias(delta):
            bias = torch.empty_like(layer.bias)
            fuse_bias(bias, layer.bias, delta, scale)
            found[f"{module}.bias"] = bias.double() - layer.bias.double()
    return found
