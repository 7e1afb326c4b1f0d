"""An adapter file of any known form -> `ParsedAdapter`, checked against a base's manifest.

Owns the order of the checks and what counts as fitting. Must not touch a live model: it works from the manifest
alone, so that it can run in another process.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import Coverage, Delta, Dense, Dora, LowRank, ParsedAdapter, tensors_of
from serve_app.engine.adapters.formats import TargetLayer, build_delta, inner_width
from serve_app.engine.adapters.inversion import bundled_ti_tokens, with_ti_tokens
from serve_app.engine.adapters.metadata import Scaling, read_scalings, read_settings
from serve_app.engine.adapters.naming import LayerTensors, NamedLayers, is_of_denoiser, name_layers
from serve_app.engine.adapters.projections import as_floats, fold_alpha, split_projection
from serve_app.engine.adapters.safetensors_file import FilePart, TensorFile, read_tensor_files, shown
from serve_app.engine.base.manifest import BaseManifest
from serve_app.families.spellings import split_prefix, unserved_method
from serve_app.refusals import MalformedFile, NoLayerMatches, NotAnAdapter, UnsupportedMethod
from serve_app.settings import AdapterLimits

UNMATCHED_SHOWN = 20
# Below this share of matching layers a file is taken to be made for another base.
LEAST_COVERAGE = 0.5
_KINDS = {"Dora": "DoRA", "Hadamard": "LoHa", "Kronecker": "LoKr"}


def parse_adapter(
    files: Path | Sequence[FilePart],
    name: str,
    manifest: BaseManifest,
    limits: AdapterLimits,
    embeddings: Path | None = None,
    settings: str | None = None,
) -> ParsedAdapter:
    """Parse a file, or those that are one adapter together, and check it against a base.

    `name` is what errors call the adapter. `embeddings` is the file with its own words, `settings` the text of peft's
    `adapter_config.json`, where there is one.

    Every tensor of the file is part of a change, or counted and named in `coverage` as unmatched, or the file is
    refused. A file is taken to be for another base, and refused, when fewer than half of its layers exist here; a
    layer that exists with other widths refuses the file at once.

    Raises:
        RefusedAdapter: one of its subclasses, saying which tensor or layer, and why. Nothing else is raised for
            what a file may contain.
    """
    parts = [FilePart(files)] if isinstance(files, Path) else files
    read = read_tensor_files(parts, name, limits)
    tensors, bundled = bundled_ti_tokens({key: tensor for file in read for key, tensor in file.tensors.items()})
    _refuse_unserved(tensors, name)
    scalings = _read_scalings(parts, read, settings, manifest, name)
    digests = [*(file.digest for file in read), *filter(None, (settings,))]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    named = name_layers(tensors, manifest, name)
    _check_coverage(named, manifest, name)
    changes = _build(named.layers, manifest, scalings, name, limits)
    _refuse_without_effect(changes, name)
    if not manifest.fuses:
        _refuse_what_must_be_fused(changes, name)
    components = {component: changes[component] for component in manifest.components if component in changes}
    ranks = [inner_width(delta) for modules in changes.values() for delta in modules.values()]
    unmatched = [*(layer.stem for layer in named.unmatched), *named.unknown]
    coverage = Coverage(
        layers_matched=len(named.layers),
        layers_in_file=len(named.layers) + len(unmatched),
        unmatched=tuple(shown(stem) for stem in unmatched[:UNMATCHED_SHOWN]),
        ranks=(min(ranks), max(ranks)),
    )
    adapter = ParsedAdapter(digest, components, coverage)
    if embeddings is None and not bundled:
        return adapter
    return with_ti_tokens(adapter, bundled, embeddings, name, manifest, limits)


def _read_scalings(
    parts: Sequence[FilePart], files: Sequence[TensorFile], settings: str | None, manifest: BaseManifest, name: str
) -> dict[str, Scaling]:
    """Return the scaling of each component: as its file says, else as the settings beside it do."""
    found: dict[str, Scaling] = {}
    for part, file in zip(parts, files, strict=True):
        own = read_scalings(file.metadata, manifest.components, part.component or manifest.denoiser, name)
        if any(found.get(component, scaling) != scaling for component, scaling in own.items()):
            raise MalformedFile(name, "its files contradict each other on how they are scaled")
        found |= own
    beside = {} if settings is None or (found and len(parts) == 1) else read_settings(settings, manifest, name)
    return beside | found


def _build(
    layers: Sequence[LayerTensors],
    manifest: BaseManifest,
    scalings: Mapping[str, Scaling],
    name: str,
    limits: AdapterLimits,
) -> dict[str, dict[str, Delta]]:
    """Return component -> module -> change."""
    changes: dict[str, dict[str, Delta]] = defaultdict(dict)
    is_transformer = manifest.layers_per_block is None
    for tensors in layers:
        named, parts = tensors.layer_name, as_floats(tensors.parts)
        assert named is not None
        targets: list[TargetLayer] = []
        for module in named.modules:
            layer = manifest.layer(named.component, module)
            assert layer is not None
            targets.append(TargetLayer(name, named.component, module, layer, limits.max_rank))
        scaling = scalings.get(named.component)
        prefix, _ = split_prefix(tensors.stem)
        if is_transformer and scaling is None and not (named.is_dotted and prefix.separator == "."):
            parts = fold_alpha(parts)
        split = split_projection(parts, targets, swaps_halves=named.swaps_halves)
        for target, own in zip(targets, split, strict=True):
            changes[target.component][target.module] = build_delta(own, scaling, target)
    return changes


def _refuse_unserved(tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse a method that is understood but not served, by its name; nothing but zeros changes nothing."""
    for key, tensor in tensors.items():
        method = unserved_method(key)
        if method is not None and tensor.double().any():
            raise UnsupportedMethod(name, f"it uses {method} (tensor {shown(key)}), which is not served")


def _check_coverage(named: NamedLayers, manifest: BaseManifest, name: str) -> None:
    if not named.layers and not named.unmatched:
        raise NotAnAdapter(name, "its file holds no adapter layers")
    of_denoiser = [layer for layer in (*named.layers, *named.unmatched) if is_of_denoiser(layer, manifest)]
    counted = of_denoiser or [*named.layers, *named.unmatched]
    matched = sum(layer.layer_name is not None for layer in counted)
    if not named.layers or matched < len(counted) * LEAST_COVERAGE:
        missing = next(layer.stem for layer in counted if layer.layer_name is None)
        raise NoLayerMatches(
            name,
            f"{matched} of its {len(counted)} layers exist in this base ({manifest.pipeline}); the first that does "
            f"not is {shown(missing)}: it was made for another base, or its layer names are in a spelling that is "
            "not read",
        )
    if len(named.unknown) > named.tensors - len(named.unknown):
        raise MalformedFile(name, f"most of its tensors are no part of an adapter, such as {shown(named.unknown[0])}")
    for key in named.unknown:
        _refuse_whole_weights(key, manifest, name)


def _refuse_whole_weights(key: str, manifest: BaseManifest, name: str) -> None:
    """Refuse a tensor that would replace a weight of the base: to leave it out would be half of the adapter."""
    prefix, rest = split_prefix(key)
    component = manifest.denoiser if prefix.component == "denoiser" else prefix.component
    module, _, parameter = rest.rpartition(".")
    module = module.removesuffix(".base_layer")
    if parameter in ("weight", "bias") and manifest.layer(component, module) is not None:
        raise MalformedFile(name, f"its tensor {shown(key)} is a whole weight of the base, which no adapter replaces")


def _refuse_without_effect(changes: Mapping[str, Mapping[str, Delta]], name: str) -> None:
    if not any(_has_effect(delta) for modules in changes.values() for delta in modules.values()):
        raise NotAnAdapter(name, "it changes nothing: every factor or every alpha is zero")


def _refuse_what_must_be_fused(changes: Mapping[str, Mapping[str, Delta]], name: str) -> None:
    """Refuse a change that is no product of two factors, for only such a one can lie beside a quantised layer."""
    for component, modules in changes.items():
        for module, delta in modules.items():
            if not isinstance(delta, LowRank) or delta.shift is not None:
                kind = _KINDS.get(type(delta).__name__, "a whole difference of its weight or bias")
                raise UnsupportedMethod(
                    name,
                    f"its change of layer {component}.{module} is {kind}, which must be fused into full weights; this "
                    "base is quantised and takes LoRA factors alone",
                )


def _has_effect(delta: Delta) -> bool:
    if isinstance(delta, Dora):
        return True
    if isinstance(delta, Dense):
        return any(bool(tensor.any()) for tensor in tensors_of(delta))
    biases = (getattr(delta, part, None) for part in ("bias", "shift"))
    if any(bias is not None and bool(bias.any()) for bias in biases):
        return True
    factors = [tensor for tensor in tensors_of(delta) if tensor.ndim > 1]
    return delta.alpha != 0 and all(bool(torch.count_nonzero(factor)) for factor in factors)
