"""Every spelling, method and family of adapter files, each with the change that it means, computed in float64.

Owns small bases of nine families, the names that tools give to some of their layers, and the formulas of the methods.
The names of other implementations are written out by hand: the product's own table must not vouch for itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from serve_app.engine.base.manifest import BaseManifest, manifest_of
from tests.tiny import tiny_pipeline

RANK, ALPHA = 4, 3.0
Truth = dict[str, Tensor]


@dataclass(frozen=True)
class Base:
    """A base of some family, and layers of it: the original implementation's name -> the modules that it stands for."""

    family: str
    component: str
    denoiser: nn.Module
    manifest: BaseManifest
    originals: Mapping[str, tuple[str, ...]]

    @property
    def modules(self) -> tuple[str, ...]:
        """The layers in diffusers' names."""
        return tuple(module for modules in self.originals.values() for module in modules)

    def weight(self, modules: Sequence[str]) -> Tensor:
        """Return the weights of some layers, one below the other, in float64."""
        return torch.cat([self.denoiser.get_submodule(module).weight.double() for module in modules])


_DOUBLE = {
    "double_blocks.0.img_attn.qkv": ("to_q", "to_k", "to_v"),
    "double_blocks.0.txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "double_blocks.1.img_attn.proj": ("to_out.0",),
}
_MMDIT = {
    "joint_blocks.0.x_block.attn.qkv": ("to_q", "to_k", "to_v"),
    "joint_blocks.0.context_block.attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "joint_blocks.1.x_block.attn.proj": ("to_out.0",),
}


def _blocks(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(f"transformer_blocks.{name.split('.')[1]}.attn.{module}" for module in modules)
        for name, modules in names.items()
    }


_SINGLE = "single_transformer_blocks.0."
_NEXT_DIT = {
    f"{blocks}.0.attention.qkv": tuple(f"{blocks}.0.ATTENTION.to_{letter}" for letter in "qkv")
    for blocks in ("layers", "noise_refiner")
} | {"layers.0.attention.out": ("layers.0.ATTENTION.to_out.0",)}
_UNET_ATTENTION = "down_blocks.{}.attentions.0.transformer_blocks.0"
ORIGINALS: dict[str, dict[str, tuple[str, ...]]] = {
    "sd15": {
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q": (f"{_UNET_ATTENTION.format(0)}.attn1.to_q",),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k": (f"{_UNET_ATTENTION.format(0)}.attn2.to_k",),
        "input_blocks.1.0.in_layers.2": ("down_blocks.0.resnets.0.conv1",),
        "input_blocks.2.0.op": ("down_blocks.0.downsamplers.0.conv",),
        "middle_block.0.emb_layers.1": ("mid_block.resnets.0.time_emb_proj",),
        "output_blocks.3.0.skip_connection": ("up_blocks.1.resnets.1.conv_shortcut",),
    },
    "sdxl": {
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k": (f"{_UNET_ATTENTION.format(1)}.attn2.to_k",),
        "input_blocks.1.0.in_layers.2": ("down_blocks.0.resnets.0.conv1",),
        "middle_block.1.transformer_blocks.0.attn1.to_q": (
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        "output_blocks.0.0.out_layers.3": ("up_blocks.0.resnets.0.conv2",),
        "output_blocks.2.2.conv": ("up_blocks.0.upsamplers.0.conv",),
        "label_emb.0.0": ("add_embedding.linear_1",),
    },
    "flux": _blocks(_DOUBLE) | {
        "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.net.0.proj",),
        "double_blocks.0.txt_mod.lin": ("transformer_blocks.0.norm1_context.linear",),
        "single_blocks.0.linear1": tuple(_SINGLE + n for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        "single_blocks.1.modulation.lin": ("single_transformer_blocks.1.norm.linear",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    },
    "chroma": _blocks(_DOUBLE) | {
        "single_blocks.0.linear2": (_SINGLE + "proj_out",),
        "distilled_guidance_layer.layers.0.in_layer": ("distilled_guidance_layer.layers.0.linear_1",),
    },
    "flux2": _blocks(_DOUBLE) | {
        "single_blocks.0.linear1": (_SINGLE + "attn.to_qkv_mlp_proj",),
        "single_blocks.0.linear2": (_SINGLE + "attn.to_out",),
        "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.linear_in",),
    },
    "sd3": _blocks(_MMDIT) | {"joint_blocks.0.x_block.mlp.fc1": ("transformer_blocks.0.ff.net.0.proj",)},
    "qwen-image": {  # its authors' names are diffusers' own
        name: (name,)
        for name in (f"transformer_blocks.{end}" for end in ("0.attn.to_q", "0.img_mod.1", "1.attn.to_k"))
    },
    "z-image": {n: tuple(m.replace("ATTENTION", "attention") for m in ms) for n, ms in _NEXT_DIT.items()},
    "wan": {
        "blocks.0.self_attn.q": ("blocks.0.attn1.to_q",),
        "blocks.0.cross_attn.o": ("blocks.0.attn2.to_out.0",),
        "blocks.0.ffn.2": ("blocks.0.ffn.net.2",),
    },
}  # fmt: skip
_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "chroma": ("ChromaTransformer2DModel", {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 64,
        "approximator_hidden_dim": 32, "approximator_layers": 1}),
    "flux2": ("Flux2Transformer2DModel", {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}),
    "qwen-image": ("QwenImageTransformer2DModel", {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}),
    "z-image": ("ZImageTransformer2DModel", {
        "in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 32, "axes_dims": [4, 4, 8], "axes_lens": [32, 32, 32]}),
    "wan": ("WanTransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 32,
        "freq_dim": 16, "ffn_dim": 64, "num_layers": 1}),
}  # fmt: skip
FAMILIES = tuple(ORIGINALS)


@functools.cache
def base_of(family: str) -> Base:
    """Return a base of a family; its weights must not be changed."""
    if family in _TRANSFORMERS:
        class_name, settings = _TRANSFORMERS[family]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser = getattr(diffusers, class_name)(**settings).requires_grad_(False)
        kind = type(class_name, (), {"_lora_loadable_modules": ["transformer"], "transformer": denoiser})
        return Base(family, "transformer", denoiser, manifest_of(kind()), ORIGINALS[family])
    pipeline: Any = tiny_pipeline(family)
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    return Base(family, component, getattr(pipeline, component), manifest_of(pipeline), ORIGINALS[family])


@dataclass(frozen=True)
class Spelling:
    """How a tool writes the name of a layer, and of the two factors of a pair."""

    stem: Callable[[str, str], str]  # (component, module)
    is_original: bool = False
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"


def _flat(prefix: str) -> Callable[[str, str], str]:
    return lambda component, module: prefix + module.replace(".", "_")


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
SPELLINGS: dict[str, Spelling] = {
    "diffusers and peft": Spelling(lambda component, module: f"{component}.{module}"),
    "bare names": Spelling(lambda component, module: module),
    "peft's save_pretrained": Spelling(lambda component, module: f"base_model.model.{module}"),
    "base_model.model.<component>": Spelling(lambda component, module: f"base_model.model.{component}.{module}"),
    "<component>.base_model.model": Spelling(lambda component, module: f"{component}.base_model.model.{module}"),
    "an adapter's name within": Spelling(
        lambda component, module: f"{component}.{module}", down="lora_A.default.weight", up="lora_B.default.weight"
    ),
    "diffusion_model, diffusers' names": Spelling(lambda component, module: f"diffusion_model.{module}"),
    "kohya, diffusers' names": Spelling(_flat("lora_unet_"), **KOHYA),
    "OneTrainer": Spelling(_flat("lora_transformer_"), **KOHYA),
    "LyCORIS": Spelling(_flat("lycoris_"), **KOHYA),
    "kohya, original names": Spelling(_flat("lora_unet_"), is_original=True, **KOHYA),
    "ComfyUI, original names": Spelling(lambda component, name: f"diffusion_model.{name}", is_original=True),
    "checkpoint, original names": Spelling(
        lambda component, name: f"model.diffusion_model.{name}", is_original=True, **KOHYA
    ),
}


def _noise(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random) * 0.1


Made = tuple[dict[str, Tensor], Tensor]  # the parts, and the change of the weight in float64
_PAIR = ("<down>", "<up>")


def _lora(weight: Tensor, random: torch.Generator) -> Made:
    down = _noise(random, RANK, *weight.shape[1:])
    up = _noise(random, len(weight), RANK, *[1] * (weight.ndim - 2))
    product = (up.double().flatten(1) @ down.double().flatten(1)).reshape(weight.shape)
    return dict(zip(_PAIR, (down, up), strict=True)), product


def _lora_with_alpha(weight: Tensor, random: torch.Generator) -> Made:
    parts, product = _lora(weight, random)
    return parts | {"alpha": torch.tensor(ALPHA)}, product * (ALPHA / RANK)


def _eight_bits(weight: Tensor, random: torch.Generator) -> Made:
    parts, _ = _lora(weight, random)
    parts = {part: (tensor * 4).to(torch.float8_e4m3fn) for part, tensor in parts.items()}
    down, up = (parts[part].double().flatten(1) for part in _PAIR)
    return parts, (up @ down).reshape(weight.shape)


def _loha(weight: Tensor, random: torch.Generator) -> Made:
    inputs = weight[0].numel()
    parts = {f"hada_w{n}_{side}": _noise(random, *shape) * 5 for n in (1, 2)
             for side, shape in (("a", (len(weight), RANK)), ("b", (RANK, inputs)))}  # fmt: skip
    first, second = (parts[f"hada_w{n}_a"].double() @ parts[f"hada_w{n}_b"].double() for n in (1, 2))
    return parts | {"alpha": torch.tensor(ALPHA)}, (first * second).reshape(weight.shape) * (ALPHA / RANK)


def _lokr(weight: Tensor, random: torch.Generator) -> Made:
    left = _noise(random, 2, 2)
    right = _noise(random, len(weight) // 2, weight.shape[1] // 2, *weight.shape[2:])
    wide = left.double()[(...,) + (None,) * (weight.ndim - 2)]
    parts = {"lokr_w1": left, "lokr_w2": right, "alpha": torch.tensor(ALPHA)}
    return parts, torch.kron(wide, right.double()).reshape(weight.shape)


def _lokr_decomposed(weight: Tensor, random: torch.Generator) -> Made:
    left, flat = _noise(random, 2, 2), weight[0].numel() // 2
    up, down = _noise(random, len(weight) // 2, RANK), _noise(random, RANK, flat)
    right = (up.double() @ down.double()).reshape(len(weight) // 2, weight.shape[1] // 2, *weight.shape[2:])
    wide = left.double()[(...,) + (None,) * (weight.ndim - 2)]
    parts = {"lokr_w1": left, "lokr_w2_a": up, "lokr_w2_b": down, "alpha": torch.tensor(ALPHA)}
    return parts, torch.kron(wide, right).reshape(weight.shape) * (ALPHA / RANK)


def _full(weight: Tensor, random: torch.Generator) -> Made:
    difference = _noise(random, *weight.shape)
    return {"diff": difference}, difference.double()


def _dora(made: Callable[[Tensor, torch.Generator], Made], *, per_input: bool = False) -> Callable[..., Made]:
    def make(weight: Tensor, random: torch.Generator) -> Made:
        parts, change = made(weight, random)
        moved = weight + change
        if per_input:
            norm = moved.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (weight.ndim - 2))
        else:
            norm = moved.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
        magnitude = (norm * (1 + 0.2 * torch.rand(norm.shape, generator=random))).float()
        return parts | {"dora_scale": magnitude}, moved * (magnitude.double() / norm) - weight

    return make


METHODS: dict[str, Callable[[Tensor, torch.Generator], Made]] = {
    "LoRA": _lora,
    "LoRA with alpha": _lora_with_alpha,
    "LoRA in eight bits": _eight_bits,
    "DoRA, a magnitude per output": _dora(_lora_with_alpha),
    "DoRA, a magnitude per input": _dora(_lora_with_alpha, per_input=True),
    "LoHa": _loha,
    "LoHa with DoRA": _dora(_loha),
    "LoKr": _lokr,
    "LoKr, decomposed": _lokr_decomposed,
    "LoKr with DoRA": _dora(_lokr),
    "full differences": _full,
}
# A magnitude per input is that of all outputs of a fused projection: no part has it alone.
INDIVISIBLE = ("DoRA, a magnitude per input",)


@functools.cache
def _made(family: str, method: str, *, is_original: bool) -> dict[str, tuple[dict[str, Tensor], Truth]]:
    """Return the layers of a file by the names that it has for them: their parts, and what these change."""
    base = base_of(family)
    names = base.originals if is_original else {module: (module,) for module in base.modules}
    made: dict[str, tuple[dict[str, Tensor], Truth]] = {}
    for number, (name, modules) in enumerate(names.items()):
        parts, change = METHODS[method](base.weight(modules), torch.Generator().manual_seed(number))
        sizes = [len(base.weight([module])) for module in modules]
        made[name] = parts, dict(zip(modules, change.split(sizes), strict=True))
    return made


def spelt(base: Base, spelling: Spelling, method: str) -> tuple[dict[str, Tensor], Truth]:
    """Return a file's tensors, and what they change: module -> difference in float64."""
    tensors: dict[str, Tensor] = {}
    truth: Truth = {}
    ends = {"<down>": spelling.down, "<up>": spelling.up}
    for name, (parts, changes) in _made(base.family, method, is_original=spelling.is_original).items():
        stem = spelling.stem(base.component, name)
        tensors |= {f"{stem}.{ends.get(part, part)}": tensor for part, tensor in parts.items()}
        truth |= changes
    return tensors, truth


def is_indivisible(base: Base, spelling: Spelling, method: str) -> bool:
    """Say whether a file of this kind must be refused, for a part of it cannot be told from the rest."""
    return spelling.is_original and method in INDIVISIBLE and any(len(m) > 1 for m in base.originals.values())
