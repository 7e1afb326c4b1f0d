"""Every form of adapter file that diffusers itself applies exactly, for each tiny family, and diffusers' own result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from serve_app.core import Scale, Scales, scale_of
from serve_app.engine.base.manifest import adaptable_components
from tests.tiny import denoiser_name, tiny_pipeline
from tests.tiny_adapters import as_kohya, attention, everything, linear, lora, text_layers, write

Weights = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Form:
    """A file's tensors, and its metadata in diffusers' form."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] | None = None


def mixed_rank(name: str) -> int:
    """Give layers ranks from 2 to 8, by name."""
    return 2 + sum(map(ord, name)) % 7


def output_projection(name: str, module: torch.nn.Module) -> bool:
    """Choose layers that have a bias."""
    return name.endswith("to_out.0")


def outside_the_sides(name: str, module: torch.nn.Module) -> bool:
    """Choose a U-Net's middle and ends, which have layers of every kind, and all of a transformer."""
    return not name.startswith(("down_blocks", "up_blocks"))


def with_text(pipeline: DiffusionPipeline, *, seed: int) -> dict[str, Tensor]:
    """Return peft keys over the denoiser and every text encoder that can be adapted."""
    tensors = lora(pipeline, seed=seed)
    for number, component in enumerate(adaptable_components(pipeline)):
        if component.startswith("text_encoder"):
            tensors |= lora(pipeline, component, chooses=text_layers, seed=seed + number)
    return tensors


def modules_in(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the module names of peft keys of one component."""
    return sorted({key.partition(".")[2].partition(".lora_")[0] for key in tensors})


def described(tensors: Mapping[str, Tensor], component: str, **settings: Any) -> dict[str, Any]:
    """Return the metadata that diffusers writes beside peft keys of one component."""
    settings = {"target_modules": modules_in(tensors), **settings}
    return {f"{component}.{key}": value for key, value in settings.items()}


def older_spelling(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Respell peft keys as early diffusers did, with attention processors."""
    respelt: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, part = key.partition(".lora_")
        half = "down" if part.startswith("A") else "up"
        parent, _, layer = module.removesuffix(".0").rpartition(".")
        processor = "" if key.startswith("text") else ".processor"
        layer = layer.replace("q_proj", "to_q").replace("k_proj", "to_k").replace("v_proj", "to_v")
        layer = layer.replace("out_proj", "to_out")
        respelt[f"{parent}{processor}.{layer}_lora.{half}.weight"] = tensor
    return respelt


def newer_spelling(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Respell peft keys as diffusers did before it took peft's."""
    respelt: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, part = key.partition(".lora_")
        middle = "lora_linear_layer" if key.startswith("text") else "lora"
        respelt[f"{module}.{middle}.{'down' if part.startswith('A') else 'up'}.weight"] = tensor
    return respelt


def flux_kohya(pipeline: DiffusionPipeline, *, rank: int = 4, alpha: float = 3.0) -> dict[str, Tensor]:
    """Return kohya's FLUX form over the double blocks, with fused query, key and value, and the text encoder."""
    random, width = torch.Generator().manual_seed(8), 64
    shapes = {"attn_qkv": (3 * width, width), "attn_proj": (width, width)}
    shapes |= {"mlp_0": (4 * width, width), "mlp_2": (width, 4 * width), "mod_lin": (6 * width, width)}
    tensors: dict[str, Tensor] = {}
    for block in range(2):
        for stream in ("img", "txt"):
            for layer, (out, inputs) in shapes.items():
                stem = f"lora_unet_double_blocks_{block}_{stream}_{layer}"
                tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, inputs, generator=random).half() * 0.1
                tensors[f"{stem}.lora_up.weight"] = torch.randn(out, rank, generator=random).half() * 0.1
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    text = lora(pipeline, "text_encoder", chooses=text_layers, seed=9)
    return tensors | as_kohya(text, alpha=alpha)


def flux_xlabs() -> dict[str, Tensor]:
    """Return the XLabs form over the double blocks."""
    random, width, rank = torch.Generator().manual_seed(9), 64, 4
    tensors: dict[str, Tensor] = {}
    for block in range(2):
        for number in (1, 2):
            for layer, out in ((f"qkv_lora{number}", 3 * width), (f"proj_lora{number}", width)):
                stem = f"double_blocks.{block}.processor.{layer}"
                tensors[f"{stem}.down.weight"] = torch.randn(rank, width, generator=random).half() * 0.1
                tensors[f"{stem}.up.weight"] = torch.randn(out, rank, generator=random).half() * 0.1
    return tensors


FORMS: dict[str, Callable[[DiffusionPipeline], Form]] = {
    "peft, attention": lambda pipe: Form(lora(pipe)),
    "peft, linear layers": lambda pipe: Form(lora(pipe, rank=8, chooses=linear, seed=1)),
    "peft, convolutions too": lambda pipe: Form(lora(pipe, chooses=everything, seed=2)),
    "peft, float32": lambda pipe: Form(lora(pipe, dtype=torch.float32, seed=3)),
    "peft, bfloat16": lambda pipe: Form(lora(pipe, dtype=torch.bfloat16, seed=3)),
    "peft, mixed rank": lambda pipe: Form(lora(pipe, rank=mixed_rank, seed=4)),
    "peft, bias": lambda pipe: Form(lora(pipe, chooses=output_projection, bias=True, seed=5)),
    "peft, text encoders": lambda pipe: Form(with_text(pipe, seed=6)),
    "peft, DoRA": lambda pipe: Form(lora(pipe, chooses=outside_the_sides, dora=True, seed=7)),
    "metadata, alpha": lambda pipe: _with_metadata(pipe, lora_alpha=8),
    "metadata, rank-stabilised": lambda pipe: _with_metadata(pipe, lora_alpha=8, use_rslora=True),
    "metadata, alpha by layer": lambda pipe: _with_metadata(
        pipe, lora_alpha=4, alpha_pattern={name: 1 + place % 5 for place, name in enumerate(modules_in(lora(pipe)))}
    ),
}
UNET_FORMS: dict[str, Callable[[DiffusionPipeline], Form]] = {
    "diffusers, older": lambda pipe: Form(older_spelling(_attention_everywhere(pipe, seed=10))),
    "diffusers, newer": lambda pipe: Form(newer_spelling(with_text(pipe, seed=11))),
    "kohya, attention": lambda pipe: Form(as_kohya(lora(pipe, rank=8, seed=12), alpha=4)),
    "kohya, convolutions": lambda pipe: Form(as_kohya(lora(pipe, chooses=_as_trained_by_kohya, seed=13), alpha=1)),
    "kohya, text encoders": lambda pipe: Form(as_kohya(with_text(pipe, seed=14), alpha=2)),
    "kohya, no alpha": lambda pipe: Form(as_kohya(lora(pipe, seed=15))),
}
FLUX_FORMS: dict[str, Callable[[DiffusionPipeline], Form]] = {
    "kohya, fused query, key and value": lambda pipe: Form(flux_kohya(pipe)),
    "XLabs": lambda pipe: Form(flux_xlabs()),
    "peft, alpha tensors": lambda pipe: Form(_with_alpha_tensors(lora(pipe, seed=16))),
}


def forms_of(family: str) -> dict[str, Callable[[DiffusionPipeline], Form]]:
    """Return the forms that diffusers applies to a family, by name."""
    return FORMS | (UNET_FORMS if family in ("sd15", "sdxl") else {}) | (FLUX_FORMS if family == "flux" else {})


def fused_by_diffusers(family: str, dtype: torch.dtype, composition: Sequence[tuple[Path, Scale]]) -> DiffusionPipeline:
    """Return a fresh pipeline with files loaded, weighed and fused by diffusers alone."""
    pipeline: Any = tiny_pipeline(family, dtype)
    names = [f"adapter_{place}" for place in range(len(composition))]
    for adapter_name, (path, _) in zip(names, composition, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that is what a second adapter is
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter_name)
    components = adaptable_components(pipeline)
    weights = [
        {name: scale_of(scale, name) for name in components} if isinstance(scale, Scales) else scale
        for _, scale in composition
    ]
    pipeline.set_adapters(names, weights)
    pipeline.fuse_lora(components=[name for name, module in components.items() if hasattr(module, "peft_config")])
    return pipeline


def weights_of(pipeline: DiffusionPipeline) -> Weights:
    """Return every weight of the adaptable components under the name it has without peft."""
    weights: Weights = {}
    for component, module in adaptable_components(pipeline).items():
        for name, tensor in module.state_dict().items():
            if "lora_" not in name:
                weights[component, name.replace(".base_layer.", ".")] = tensor.clone()
    return weights


def unequal(found: Weights, expected: Weights) -> list[tuple[str, str]]:
    """Return the names of the weights that differ in any bit."""
    assert found.keys() == expected.keys()
    return [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]


def put(folder: Path, name: str, form: Form) -> Path:
    """Write a form to a folder."""
    return write(folder / f"{name.replace(' ', '_').replace(',', '')}.safetensors", form.tensors, form.metadata)


def _with_metadata(pipeline: DiffusionPipeline, **settings: Any) -> Form:
    tensors = lora(pipeline, seed=8)
    return Form(tensors, described(tensors, denoiser_name(pipeline), r=4, **settings))


def _attention_everywhere(pipeline: DiffusionPipeline, *, seed: int) -> dict[str, Tensor]:
    tensors = with_text(pipeline, seed=seed)
    return {key: tensor for key, tensor in tensors.items() if ".fc" not in key}


def _as_trained_by_kohya(name: str, module: torch.nn.Module) -> bool:
    endings = ("conv1", "conv2", "proj_in", "proj_out", "conv_shortcut", "time_emb_proj")
    return attention(name, module) or "ff.net" in name or name.endswith(endings)


def _with_alpha_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stems = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {**tensors, **{f"{stem}.alpha": torch.tensor(1.0 + place % 3) for place, stem in enumerate(stems)}}
