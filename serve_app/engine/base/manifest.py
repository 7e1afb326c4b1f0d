"""The layers of a base model that adapters may touch: names, kinds and shapes, without the weights.

Owns `BaseManifest`, which lets a file be checked against a base in another process. Must not know adapter files, and
must import neither diffusers nor transformers, which cost the admission process several seconds of its start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from serve_app.engine.base.packing import is_quantised

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

LayerKind = Literal["linear", "conv", "norm"]

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZER = ("text_encoder", "tokenizer")  # what a text encoder's name has that its tokenizer's spells otherwise


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer that an adapter may change: `shape` is its weight's, `dtype` torch's name without the prefix."""

    kind: LayerKind
    shape: tuple[int, ...]
    has_bias: bool
    dtype: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words of a text encoder: `width` numbers each, `dtype` torch's name without the prefix."""

    kind: Literal["clip", "t5"]
    width: int
    dtype: str


@dataclass(frozen=True, slots=True)
class BaseManifest:
    """The adaptable layers of one loaded base: component name -> module name -> layer.

    `components` are the layers that take factors, `norms` those that only whole differences change.
    `layers_per_block` is the UNet's, which numbers blocks in the original implementation; None where there is no UNet.
    `fingerprint` tells structures apart: the same fingerprint means the same layers in the same dtype.
    `fuses` says whether adapters are fused into the weights; beside quantised ones there are low-rank factors alone.
    `vocabularies` are those of the text encoders that adapters can teach words, by component, in the pipeline's order.
    """

    pipeline: str
    denoiser: str
    dtype: str
    layers_per_block: int | None
    components: Mapping[str, Mapping[str, Layer]]
    fingerprint: str
    vocabularies: Mapping[str, Vocabulary] = field(default_factory=dict[str, Vocabulary])
    norms: Mapping[str, Mapping[str, Layer]] = field(default_factory=dict[str, Mapping[str, Layer]])
    fuses: bool = True

    def layer(self, component: str, module: str) -> Layer | None:
        """Return the layer of that name, or None."""
        return self.components.get(component, {}).get(module) or self.norms.get(component, {}).get(module)

    def modules(self) -> dict[str, tuple[str, ...]]:
        """Return the names of all layers, by component."""
        return {name: (*layers, *self.norms.get(name, ())) for name, layers in self.components.items()}

    def to_json(self) -> str:
        """Return the manifest as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> BaseManifest:
        """Rebuild a manifest from `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        for kind in ("components", "norms"):
            fields[kind] = {
                component: {
                    name: Layer(layer["kind"], tuple(layer["shape"]), layer["has_bias"], layer["dtype"])
                    for name, layer in layers.items()
                }
                for component, layers in fields[kind].items()
            }
        fields["vocabularies"] = {name: Vocabulary(**facts) for name, facts in fields["vocabularies"].items()}
        return cls(**fields)


def adaptable_components(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the components that this pipeline's LoRA loader can adapt and that are loaded, in the loader's order."""
    names: list[str] = getattr(type(pipeline), "_lora_loadable_modules", [])
    found = {name: getattr(pipeline, name, None) for name in names}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def manifest_of(pipeline: DiffusionPipeline) -> BaseManifest:
    """Describe a loaded pipeline."""
    components = adaptable_components(pipeline)
    denoiser = next(iter(components))
    layers = {name: _layers_of(module) for name, module in components.items()}
    config = getattr(getattr(pipeline, "unet", None), "config", None)
    layers_per_block = getattr(config, "layers_per_block", None)
    manifest = BaseManifest(
        pipeline=type(pipeline).__name__,
        denoiser=denoiser,
        dtype=_dtype_name(_values_dtype(components[denoiser])),
        layers_per_block=layers_per_block if isinstance(layers_per_block, int) else None,
        components={name: _only(known, is_norm=False) for name, known in layers.items()},
        norms={name: _only(known, is_norm=True) for name, known in layers.items()},
        fingerprint="",
        vocabularies=_vocabularies_of(pipeline),
        fuses=not any(map(is_quantised, components.values())),
    )
    structure = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    return dataclasses.replace(manifest, fingerprint=structure)


def _only(layers: Mapping[str, Layer], *, is_norm: bool) -> dict[str, Layer]:
    return {name: layer for name, layer in layers.items() if (layer.kind == "norm") == is_norm}


def adaptable_layers(component: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a component that an adapter may change, by name: linear layers, convolutions and norms."""
    return {name: module for name, module in component.named_modules() if name and _kind_of(module) is not None}


def _kind_of(module: nn.Module) -> LayerKind | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv" if module.groups == 1 else None
    weight = module._parameters.get("weight")
    return "norm" if weight is not None and weight.ndim == 1 else None


def bytes_of_layers(components: Mapping[str, nn.Module]) -> int:
    """Return what all layers take that adapters may change, weights and biases."""
    layers = [layer for component in components.values() for layer in adaptable_layers(component).values()]
    return sum(parameter.nbytes for layer in layers for parameter in layer.parameters(recurse=False))


def _layers_of(component: nn.Module) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for name, module in adaptable_layers(component).items():
        kind, weight, has_bias = _kind_of(module), module.weight, getattr(module, "bias", None) is not None
        assert kind is not None
        assert isinstance(weight, Tensor)
        shape, dtype = tuple(weight.shape), weight.dtype
        if isinstance(module, nn.Linear) and not dtype.is_floating_point:  # packed by bitsandbytes
            shape, dtype = (module.out_features, module.in_features), _values_dtype(component)
        layers[name] = Layer(kind, shape, has_bias, _dtype_name(dtype))
    return layers


def _values_dtype(component: nn.Module) -> torch.dtype:
    """Return the dtype that a component computes in."""
    return next(parameter.dtype for parameter in component.parameters() if parameter.dtype.is_floating_point)


def _vocabularies_of(pipeline: DiffusionPipeline) -> dict[str, Vocabulary]:
    """Describe the text encoders that can be taught words as diffusers does it."""
    found: dict[str, Vocabulary] = {}
    for component in TEXT_ENCODERS if hasattr(pipeline, "load_textual_inversion") else ():
        encoder, tokenizer = getattr(pipeline, component, None), getattr(pipeline, component.replace(*TOKENIZER), None)
        kind: Any = next((kind for kind in ("clip", "t5") if _model_type(encoder).startswith(kind)), None)
        # A base whose own vocabulary has the names of learned words cannot be taught them.
        if encoder is not None and kind is not None and (tokenizer is None or "<s0>" not in tokenizer.get_vocab()):
            weight = encoder.get_input_embeddings().weight
            found[component] = Vocabulary(kind, weight.shape[1], _dtype_name(weight.dtype))
    return found


def _model_type(encoder: Any) -> str:
    return str(getattr(getattr(encoder, "config", None), "model_type", ""))


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
