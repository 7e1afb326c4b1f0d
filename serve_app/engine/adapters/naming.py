"""From the names in a file to the layers of a base.

Owns the groups that a file's tensors form (`LayerTensors`) and which layer each is for: by the exact name where the
file has it, else through diffusers' own converters. Must not know what the parts compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.adapters.safetensors_file import shown
from serve_app.engine.base.manifest import BaseManifest
from serve_app.refusals import MalformedFile, NoLayerMatches

# How the parts of a layer are spelt at the end of a key; longer spellings first where one ends another.
PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
    **{f".{part}": part for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".{part}": part for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    ".lokr_t2": "lokr_t2",
    ".diff": "diff",
    ".diff_b": "diff_b",
}
UNET_LOADERS = ("StableDiffusionLoraLoaderMixin", "StableDiffusionXLLoraLoaderMixin")
FLUX_LOADER = "FluxLoraLoaderMixin"
FLUX_FINAL = "lora_unet_final_layer_"
# What diffusers' FLUX converter takes out of a kohya file without a word.
FLUX_DROPS = ("lora_te2_", "lora_te3_", "text_encoders.t5xxl.", "text_projection", "position_embedding")


@dataclass(slots=True)
class LayerTensors:
    """The tensors that a file holds for one layer, by part."""

    stem: str
    parts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True, slots=True)
class Grouped:
    """A file's layers by stem (the key without its part), and the keys that end in no known part."""

    layers: dict[str, LayerTensors]
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NamedLayers:
    """Layers of the base with their tensors, and the stems that no layer of the base answers to."""

    layers: Mapping[tuple[str, str], LayerTensors]
    unmatched: tuple[str, ...]
    unknown: tuple[str, ...]


def group(tensors: Mapping[str, Tensor]) -> Grouped:
    """Sort a file's tensors by layer, in the file's order."""
    layers: dict[str, LayerTensors] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in PARTS if key.endswith(ending)), None)
        if ending is None or len(key) == len(ending):
            unknown.append(key)
            continue
        stem = key.removesuffix(ending)
        layers.setdefault(stem, LayerTensors(stem)).parts[PARTS[ending]] = tensor
    return Grouped(layers, tuple(unknown))


def name_layers(tensors: Mapping[str, Tensor], manifest: BaseManifest, name: str) -> NamedLayers:
    """Find the layer of the base for each layer of the file.

    Raises:
        MalformedFile: two stems mean the same layer.
        NoLayerMatches: diffusers' converter for this family does not know the file's names.
    """
    grouped = group(tensors)
    index = LayerIndex(manifest)
    found = index.find_all(grouped.layers)
    missing = [stem for stem in grouped.layers if stem not in found]
    if not grouped.unknown and missing and manifest.loader in UNET_LOADERS:
        found |= _probe(missing, index, manifest, taken=set(found.values()))
        missing = [stem for stem in grouped.layers if stem not in found]
    if grouped.unknown or (missing and manifest.loader not in UNET_LOADERS):
        converted = _convert(tensors, manifest)
        if converted is not None:
            dropped = _dropped(grouped, manifest)
            grouped = group(converted)
            found = index.find_all(grouped.layers)
            missing = [*dropped, *(stem for stem in grouped.layers if stem not in found)]
        elif not found:
            raise NoLayerMatches(name, f"its layer names do not fit the family of {manifest.pipeline}")
    _refuse_duplicates(found, name)
    layers = {place: grouped.layers[stem] for stem, place in found.items()}
    return NamedLayers(layers, tuple(missing), grouped.unknown)


class LayerIndex:
    """Finds the layer that a stem names exactly, in dotted or in kohya's underscored spelling."""

    def __init__(self, manifest: BaseManifest) -> None:
        self._manifest = manifest
        first, second = "text_encoder", "text_encoder_2"
        prefixes = {"lora_unet_": manifest.denoiser, "lora_transformer_": manifest.denoiser}
        prefixes |= {"lycoris_": manifest.denoiser, "lora_te_": first, "lora_te1_": first, "lora_te2_": second}
        self._prefixes = {prefix: name for prefix, name in prefixes.items() if name in manifest.components}
        self._underscored: dict[str, dict[str, str]] = {}
        for component, modules in manifest.components.items():
            spellings = Counter(module.replace(".", "_") for module in modules)
            self._underscored[component] = {
                module.replace(".", "_"): module for module in modules if spellings[module.replace(".", "_")] == 1
            }

    def find_all(self, stems: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Return stem -> (component, module) for the stems that name a layer."""
        found = {stem: self.find(stem) for stem in stems}
        return {stem: place for stem, place in found.items() if place is not None}

    def find(self, stem: str) -> tuple[str, str] | None:
        """Return (component, module), or None."""
        component, _, module = stem.partition(".")
        for spelling in _text_model_spellings(module, "."):
            if self._manifest.layer(component, spelling) is not None:
                return component, spelling
        for prefix, component in self._prefixes.items():
            if not stem.startswith(prefix):
                continue
            for spelling in _text_model_spellings(stem.removeprefix(prefix), "_"):
                module = self._underscored[component].get(spelling, "")
                if module:
                    return component, module
        return None


def _text_model_spellings(module: str, separator: str) -> tuple[str, str]:
    """Text encoders lost their `text_model.` level in newer transformers; files and bases may be of either age."""
    level = "text_model" + separator
    return (module, module.removeprefix(level) if module.startswith(level) else level + module)


def _probe(
    stems: list[str], index: LayerIndex, manifest: BaseManifest, taken: set[tuple[str, str]]
) -> dict[str, tuple[str, str]]:
    """Ask diffusers' converter which layers kohya's stems mean, without giving it the file's tensors.

    SDXL files number blocks as the original implementation does. Each stem gets a marker tensor, and the name under
    which its marker comes out is the layer's. Layers in `taken` are named exactly by other stems, which win.
    """
    kohya = [stem for stem in stems if stem.startswith("lora_unet_") and "." not in stem]
    names = _probe_names(kohya, manifest)
    if not names:  # one odd name spoils the conversion of all: then one stem at a time
        for stem in kohya:
            names |= _probe_names([stem], manifest)
    found = index.find_all(names.values())
    return {stem: found[name] for stem, name in names.items() if name in found and found[name] not in taken}


def _probe_names(stems: list[str], manifest: BaseManifest) -> dict[str, str]:
    """Return stem -> name in the base's family; empty where the converter knows not all of them."""
    markers = {stem: torch.empty(0) for stem in stems}
    probe = {f"{stem}.lora_{half}.weight": marker for stem, marker in markers.items() for half in ("down", "up")}
    converted, _ = _through_diffusers(probe, manifest) or ({}, {})
    stem_of = {id(marker): stem for stem, marker in markers.items()}
    return {stem_of[id(marker)]: key.partition(".lora_")[0] for key, marker in converted.items()}


def _convert(tensors: Mapping[str, Tensor], manifest: BaseManifest) -> dict[str, Tensor] | None:
    """Put a whole file through diffusers' converter, alphas included; None where it does not know the names.

    The alphas that a converter hands back are put beside their layers again; those it keeps are in its tensors.
    """
    alphas: dict[str, Any] = {}
    given = dict(tensors)
    if manifest.loader == FLUX_LOADER:
        given = _with_final_alphas(given)
    if manifest.loader in (*UNET_LOADERS, "SD3LoraLoaderMixin"):  # these converters know no alphas in this form
        alphas = {key: given.pop(key) for key in tensors if key.endswith(".alpha")}
    outcome = _through_diffusers(given, manifest)
    if outcome is None:
        return None
    converted, returned = outcome
    if manifest.loader == FLUX_LOADER:
        converted = {_denoiser_key(key, manifest): tensor for key, tensor in converted.items()}
    return converted | {key: torch.as_tensor(value) for key, value in (alphas | returned).items()}


def _with_final_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply the alphas of kohya's final layers into their factors: diffusers' FLUX converter would drop them."""
    for key in [key for key in tensors if FLUX_FINAL in key and key.endswith(".alpha")]:
        up, down = (key.removesuffix("alpha") + f"lora_{half}.weight" for half in ("up", "down"))
        if up in tensors and down in tensors and tensors[key].numel() == 1 and len(tensors[down]):
            alpha = tensors.pop(key).float()
            tensors[up] = tensors[up].float() * (alpha / len(tensors[down]))
    return tensors


def _denoiser_key(key: str, manifest: BaseManifest) -> str:
    """Give FLUX's layers outside the blocks the prefix that diffusers' converter forgets."""
    is_bare = manifest.layer(manifest.denoiser, key.partition(".lora_")[0]) is not None
    return f"{manifest.denoiser}.{key}" if is_bare else key


def _through_diffusers(
    tensors: dict[str, Tensor], manifest: BaseManifest
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the family's conversion to peft's keys and the alphas it hands back; metadata is never given to it."""
    from diffusers.loaders import lora_pipeline

    loader = getattr(lora_pipeline, manifest.loader)
    options: dict[str, Any] = {}
    if manifest.layers_per_block is not None:
        options["unet_config"] = SimpleNamespace(layers_per_block=manifest.layers_per_block)
    if manifest.loader == FLUX_LOADER:
        options["return_alphas"] = True
    try:
        outcome = loader.lora_state_dict(tensors, **options)
        converted, alphas = outcome if isinstance(outcome, tuple) else (outcome, None)
        return _to_peft(converted, manifest), alphas or {}
    except Exception:  # noqa: BLE001 - converters fail on unknown names in many ways, none of them ours to tell apart
        return None


def _to_peft(converted: Mapping[str, Tensor], manifest: BaseManifest) -> dict[str, Tensor]:
    """Bring diffusers' older spellings to peft's, component by component, as its loaders do."""
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    spelt: dict[str, Tensor] = {}
    for component in {key.partition(".")[0]: None for key in converted}:
        prefix = component + "."
        part = {key.removeprefix(prefix): value for key, value in converted.items() if key.startswith(prefix)}
        if component not in manifest.components or all(".lora_A." in key or ".lora_B." in key for key in part):
            pass
        elif component.startswith("text_encoder"):
            part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
        else:
            part = convert_unet_state_dict_to_peft(part)
        spelt |= {prefix + key: value for key, value in part.items()}
    spelt |= {key: value for key, value in converted.items() if "." not in key}
    return spelt


def _dropped(grouped: Grouped, manifest: BaseManifest) -> list[str]:
    """Return the stems that the converter is known to leave out without saying so."""
    if manifest.loader != FLUX_LOADER:
        return []
    return [stem for stem in grouped.layers if any(mark in stem for mark in FLUX_DROPS)]


def _refuse_duplicates(found: Mapping[str, tuple[str, str]], name: str) -> None:
    stems: dict[tuple[str, str], str] = {}
    for stem, place in found.items():
        if place in stems:
            raise MalformedFile(name, f"{shown(stems[place])} and {shown(stem)} are the same layer of the base")
        stems[place] = stem
