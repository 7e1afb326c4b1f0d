"""From the names in a file to the layers of a base.

Owns the groups that a file's tensors form and which layers of the base each is for. Names come from one table
(`serve_app.families.spellings`); no converter of a library sees a file. Must not know what the parts compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from serve_app.engine.adapters.safetensors_file import shown
from serve_app.engine.base.manifest import BaseManifest
from serve_app.families.spellings import PARTS, LayerName, SpellingIndex, split_key, split_prefix
from serve_app.refusals import MalformedFile


@dataclass(slots=True)
class LayerTensors:
    """The tensors that a file holds for one of its layers, by part, and what the layer's name means in the base."""

    stem: str
    parts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    layer_name: LayerName | None = None


@dataclass(frozen=True, slots=True)
class NamedLayers:
    """A file's tensors, each in exactly one place.

    `layers` are those that the base has, `unmatched` those that it does not, `unknown` the keys that are no part of
    a layer.
    """

    layers: tuple[LayerTensors, ...]
    unmatched: tuple[LayerTensors, ...]
    unknown: tuple[str, ...]

    @property
    def tensors(self) -> int:
        """How many tensors lie in all three."""
        return sum(len(layer.parts) for layer in (*self.layers, *self.unmatched)) + len(self.unknown)


def name_layers(tensors: Mapping[str, Tensor], manifest: BaseManifest, name: str) -> NamedLayers:
    """Find the layers of the base for each layer of the file.

    Raises:
        MalformedFile: two of its tensors are the same part of a layer, or two of its layers the same of the base.
    """
    layers, unknown = _group(tensors, name)
    index = SpellingIndex(manifest.modules(), manifest.denoiser, manifest.layers_per_block)
    for layer in layers:
        layer.layer_name = index.find(layer.stem)
    _refuse_duplicates(layers, name)
    named = NamedLayers(
        tuple(layer for layer in layers if layer.layer_name is not None),
        tuple(layer for layer in layers if layer.layer_name is None),
        unknown,
    )
    assert named.tensors == len(tensors)
    return named


def is_of_denoiser(layer: LayerTensors, manifest: BaseManifest) -> bool:
    """Say whether a layer's name claims to be one of the denoiser's."""
    prefix, _ = split_prefix(layer.stem)
    return prefix.component in ("denoiser", manifest.denoiser, "unet", "transformer")


def _group(tensors: Mapping[str, Tensor], name: str) -> tuple[list[LayerTensors], tuple[str, ...]]:
    """Sort a file's tensors by layer, in the file's order."""
    layers: dict[str, LayerTensors] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        found = split_key(key)
        if key in PARTS:
            raise MalformedFile(name, f"its tensor {shown(key)} names no layer")
        if found is None:
            unknown.append(key)
            continue
        stem, part = found
        parts = layers.setdefault(stem, LayerTensors(stem)).parts
        if part in parts:
            raise MalformedFile(name, f"its layer {shown(stem)} has one part twice, the second time as {shown(key)}")
        parts[part] = tensor
    return list(layers.values()), tuple(unknown)


def _refuse_duplicates(layers: list[LayerTensors], name: str) -> None:
    stems: dict[tuple[str, str], str] = {}
    for layer in layers:
        for module in layer.layer_name.modules if layer.layer_name is not None else ():
            assert layer.layer_name is not None
            first = stems.setdefault((layer.layer_name.component, module), layer.stem)
            if first != layer.stem:
                raise MalformedFile(name, f"{shown(first)} and {shown(layer.stem)} are the same layer of the base")
