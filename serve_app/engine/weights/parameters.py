"""The parameters of a base, and which of them make up a layer.

Owns the record of where a parameter's values lie. Must not know adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

ParameterName = tuple[str, str]


@dataclass(slots=True, eq=False)
class ParameterSlot:
    """One parameter of the base: the values it was loaded with, and the tensors that fused values go to."""

    parameter: nn.Parameter
    pristine: Tensor
    fused_buffers: list[Tensor] = field(default_factory=list)


class LayerParameters(NamedTuple):
    """The parameters of one layer."""

    weight: ParameterSlot
    bias: ParameterSlot | None


Layers = Mapping[str, Mapping[str, LayerParameters]]


def layers_of(sites: Mapping[ParameterName, ParameterSlot]) -> dict[str, dict[str, LayerParameters]]:
    """Return component -> module -> its weight and bias, for every module that has a weight."""
    layers: dict[str, dict[str, LayerParameters]] = {component: {} for component, _ in sites}
    for (component, name), site in sites.items():
        module = name.removesuffix(".weight")
        if module != name:
            layers[component][module] = LayerParameters(site, sites.get((component, f"{module}.bias")))
    return layers


def layers_among(layers: Layers, names: Mapping[str, Collection[str]]) -> dict[str, dict[str, LayerParameters]]:
    """Return the layers of these names: component -> modules."""
    return {
        component: {module: layer for module, layer in modules.items() if module in names[component]}
        for component, modules in layers.items()
    }
