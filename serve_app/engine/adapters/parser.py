"""An adapter file of any known form -> `ParsedAdapter`, checked against a base's manifest.

Owns the order of the checks and what counts as fitting. Must not touch a live model: it works from the manifest
alone, so that it can run in another process.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from serve_app.engine.adapters.deltas import Coverage, Delta, ParsedAdapter
from serve_app.engine.adapters.formats import TargetLayer, build_delta, inner_width
from serve_app.engine.adapters.inversion import with_words
from serve_app.engine.adapters.metadata import read_scalings
from serve_app.engine.adapters.naming import NamedLayers, name_layers
from serve_app.engine.adapters.safetensors_file import TensorFile, read_tensor_file, shown
from serve_app.engine.base.manifest import BaseManifest
from serve_app.refusals import MalformedFile, NoLayerMatches, NotAnAdapter, UnsupportedMethod
from serve_app.settings import AdapterLimits

UNMATCHED_SHOWN = 20
# Below this share of matching layers a file is taken to be made for another base.
LEAST_COVERAGE = 0.5
# Ways of adapting that are recognised, and refused: the end of a key, or a part of it, and what it is.
UNSERVED = {
    ".oft_blocks": "OFT",
    ".oft_diag": "OFT",
    "oft_R": "OFT",
    ".boft": "BOFT",
    ".on_input": "IA3",
    ".w_norm": "changes of norms",
    ".b_norm": "changes of norms",
    "query_norm.scale": "control LoRA",
    "lora_controlnet": "control LoRA",
    "bundle_emb.": "embeddings inside the adapter's file",
    "modules_to_save": "whole modules",
}


def parse_adapter(
    path: Path, name: str, manifest: BaseManifest, limits: AdapterLimits, embeddings: Path | None = None
) -> ParsedAdapter:
    """Parse one file and check it against a base; `name` is what errors call the adapter.

    `embeddings` is the file with the adapter's own words, where it has one.

    A file may name layers that the base does not have: they are reported in `coverage`. A file is taken to be for
    another base, and refused, when fewer than half of its layers exist here; a layer that exists with other widths
    refuses the file at once.

    Raises:
        RefusedAdapter: one of its subclasses, saying which tensor or layer, and why. Nothing else is raised for
            what a file may contain.
    """
    file = read_tensor_file(path, name, limits)
    tensors = _served_tensors(file, name)
    scalings = read_scalings(file.metadata, manifest.components, name)
    named = name_layers(tensors, manifest, name)
    _check_coverage(named, manifest, name)
    components: dict[str, dict[str, Delta]] = {}
    for (component, module), layer_tensors in named.layers.items():
        layer = manifest.layer(component, module)
        assert layer is not None
        place = TargetLayer(name, component, module, layer, limits.max_rank)
        delta = build_delta(layer_tensors.parts, scalings.get(component), place)
        components.setdefault(component, {})[module] = delta
    ordered = {component: components[component] for component in manifest.components if component in components}
    adapter = ParsedAdapter(file.digest, ordered, Coverage(0, 0))
    ranks = [inner_width(delta) for _, _, delta in adapter.layers()]
    coverage = Coverage(
        layers_matched=len(named.layers),
        layers_in_file=len(named.layers) + len(named.unmatched),
        unmatched=tuple(shown(stem) for stem in named.unmatched[:UNMATCHED_SHOWN]),
        ranks=(min(ranks), max(ranks)),
    )
    adapter = ParsedAdapter(file.digest, ordered, coverage)
    return adapter if embeddings is None else with_words(adapter, embeddings, name, manifest, limits)


def _served_tensors(file: TensorFile, name: str) -> dict[str, Tensor]:
    """Refuse a method that is understood but not served, by its name; leave out such changes that are all zeros."""
    served: dict[str, Tensor] = {}
    for key, tensor in file.tensors.items():
        method = next((what for mark, what in UNSERVED.items() if mark in key), None)
        if key.endswith(".diff_b") and not tensor.any():
            continue
        if method is None:
            served[key] = tensor
        elif tensor.any():
            raise UnsupportedMethod(name, f"it uses {method} (tensor {shown(key)}), which is not served")
    return served


def _check_coverage(named: NamedLayers, manifest: BaseManifest, name: str) -> None:
    if not named.layers and not named.unmatched:
        raise NotAnAdapter(name, "its file holds no adapter layers")
    total = len(named.layers) + len(named.unmatched)
    if len(named.layers) < total * LEAST_COVERAGE or not named.layers:
        raise NoLayerMatches(
            name,
            f"{len(named.layers)} of its {total} layers exist in this base ({manifest.pipeline}); "
            f"the first that does not is {shown(named.unmatched[0])}; it was made for another base",
        )
    if named.unknown:
        raise MalformedFile(name, f"its tensor {shown(named.unknown[0])} is no part of an adapter")
