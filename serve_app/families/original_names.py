"""The names that the first implementations of each family gave to layers: rows beside diffusers' names.

A row is instantiated for every block that a base has, and counts where all of its modules exist. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple


class Row(NamedTuple):
    """A layer's name elsewhere, and the layer, or the layers that it fuses, in diffusers; {i} is a block's number."""

    name: str
    modules: tuple[str, ...]
    swaps_halves: bool = False


def _row(name: str, *modules: str, swaps_halves: bool = False) -> Row:
    return Row(name, modules, swaps_halves)


def _qkv(block: str, names: tuple[str, str, str]) -> tuple[str, ...]:
    return tuple(f"{block}.{name}" for name in names)


_OWN, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_IMAGE, _TEXT = "double_blocks.{i}.img_", "double_blocks.{i}.txt_"

# FLUX.1, FLUX.2 and Chroma as Black Forest Labs name them; names that a family lacks drop out.
BFL: tuple[Row, ...] = (
    _row(f"{_IMAGE}attn.qkv", *_qkv(f"{_DOUBLE}.attn", _OWN)),
    _row(f"{_TEXT}attn.qkv", *_qkv(f"{_DOUBLE}.attn", _ADDED)),
    _row(f"{_IMAGE}attn.proj", f"{_DOUBLE}.attn.to_out.0"),
    _row(f"{_TEXT}attn.proj", f"{_DOUBLE}.attn.to_add_out"),
    _row(f"{_IMAGE}mlp.0", f"{_DOUBLE}.ff.net.0.proj"),
    _row(f"{_IMAGE}mlp.2", f"{_DOUBLE}.ff.net.2"),
    _row(f"{_TEXT}mlp.0", f"{_DOUBLE}.ff_context.net.0.proj"),
    _row(f"{_TEXT}mlp.2", f"{_DOUBLE}.ff_context.net.2"),
    _row(f"{_IMAGE}mlp.0", f"{_DOUBLE}.ff.linear_in"),
    _row(f"{_IMAGE}mlp.2", f"{_DOUBLE}.ff.linear_out"),
    _row(f"{_TEXT}mlp.0", f"{_DOUBLE}.ff_context.linear_in"),
    _row(f"{_TEXT}mlp.2", f"{_DOUBLE}.ff_context.linear_out"),
    _row(f"{_IMAGE}mod.lin", f"{_DOUBLE}.norm1.linear"),
    _row(f"{_TEXT}mod.lin", f"{_DOUBLE}.norm1_context.linear"),
    _row(f"{_IMAGE}attn.norm.query_norm.scale", f"{_DOUBLE}.attn.norm_q"),
    _row(f"{_IMAGE}attn.norm.key_norm.scale", f"{_DOUBLE}.attn.norm_k"),
    _row(f"{_TEXT}attn.norm.query_norm.scale", f"{_DOUBLE}.attn.norm_added_q"),
    _row(f"{_TEXT}attn.norm.key_norm.scale", f"{_DOUBLE}.attn.norm_added_k"),
    _row("single_blocks.{i}.linear1", *_qkv(f"{_SINGLE}.attn", _OWN), f"{_SINGLE}.proj_mlp"),
    _row("single_blocks.{i}.linear2", f"{_SINGLE}.proj_out"),
    _row("single_blocks.{i}.linear1", f"{_SINGLE}.attn.to_qkv_mlp_proj"),
    _row("single_blocks.{i}.linear2", f"{_SINGLE}.attn.to_out"),
    _row("single_blocks.{i}.modulation.lin", f"{_SINGLE}.norm.linear"),
    _row("single_blocks.{i}.norm.query_norm.scale", f"{_SINGLE}.attn.norm_q"),
    _row("single_blocks.{i}.norm.key_norm.scale", f"{_SINGLE}.attn.norm_k"),
    # XLabs writes its own names over the same blocks.
    _row("double_blocks.{i}.processor.qkv1", *_qkv(f"{_DOUBLE}.attn", _OWN)),
    _row("double_blocks.{i}.processor.qkv2", *_qkv(f"{_DOUBLE}.attn", _ADDED)),
    _row("double_blocks.{i}.processor.proj1", f"{_DOUBLE}.attn.to_out.0"),
    _row("double_blocks.{i}.processor.proj2", f"{_DOUBLE}.attn.to_add_out"),
    _row("single_blocks.{i}.processor.qkv", *_qkv(f"{_SINGLE}.attn", _OWN)),
    _row("single_blocks.{i}.processor.proj", f"{_SINGLE}.proj_out"),
    _row("img_in", "x_embedder"),
    _row("txt_in", "context_embedder"),
    _row("final_layer.linear", "proj_out"),
    _row("final_layer.adaLN_modulation.1", "norm_out.linear", swaps_halves=True),
    *(
        _row(f"{first}.{half}_layer", f"{group}.{embedder}.linear_{number}")
        for group in ("time_text_embed", "time_guidance_embed")
        for first, embedder in (
            ("time_in", "timestep_embedder"),
            ("vector_in", "text_embedder"),
            ("guidance_in", "guidance_embedder"),
        )
        for half, number in (("in", 1), ("out", 2))
    ),
    _row("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    _row("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    _row("single_stream_modulation.lin", "single_stream_modulation.linear"),
    _row("distilled_guidance_layer.layers.{i}.in_layer", "distilled_guidance_layer.layers.{i}.linear_1"),
    _row("distilled_guidance_layer.layers.{i}.out_layer", "distilled_guidance_layer.layers.{i}.linear_2"),
)
_X, _CONTEXT = "joint_blocks.{i}.x_block", "joint_blocks.{i}.context_block"
# SD3 and SD3.5 as Stability names them.
MMDIT: tuple[Row, ...] = (
    _row(f"{_X}.attn.qkv", *_qkv(f"{_DOUBLE}.attn", _OWN)),
    _row(f"{_X}.attn2.qkv", *_qkv(f"{_DOUBLE}.attn2", _OWN)),
    _row(f"{_CONTEXT}.attn.qkv", *_qkv(f"{_DOUBLE}.attn", _ADDED)),
    _row(f"{_X}.attn.proj", f"{_DOUBLE}.attn.to_out.0"),
    _row(f"{_X}.attn2.proj", f"{_DOUBLE}.attn2.to_out.0"),
    _row(f"{_CONTEXT}.attn.proj", f"{_DOUBLE}.attn.to_add_out"),
    _row(f"{_X}.mlp.fc1", f"{_DOUBLE}.ff.net.0.proj"),
    _row(f"{_X}.mlp.fc2", f"{_DOUBLE}.ff.net.2"),
    _row(f"{_CONTEXT}.mlp.fc1", f"{_DOUBLE}.ff_context.net.0.proj"),
    _row(f"{_CONTEXT}.mlp.fc2", f"{_DOUBLE}.ff_context.net.2"),
    _row(f"{_X}.adaLN_modulation.1", f"{_DOUBLE}.norm1.linear"),
    _row(f"{_CONTEXT}.adaLN_modulation.1", f"{_DOUBLE}.norm1_context.linear"),
    _row("x_embedder.proj", "pos_embed.proj"),
    _row("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    _row("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    _row("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    _row("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
)
# Z-Image and Lumina 2 as their authors and ComfyUI name them.
NEXT_DIT: tuple[Row, ...] = tuple(
    row
    for blocks in ("layers.{i}", "noise_refiner.{i}", "context_refiner.{i}")
    for row in (
        _row(f"{blocks}.attention.qkv", *_qkv(f"{blocks}.attention", _OWN)),
        _row(f"{blocks}.attention.out", f"{blocks}.attention.to_out.0"),
        _row(f"{blocks}.attention.qkv", *_qkv(f"{blocks}.attn", _OWN)),
        _row(f"{blocks}.attention.out", f"{blocks}.attn.to_out.0"),
        _row(f"{blocks}.feed_forward.w1", f"{blocks}.feed_forward.linear_1"),
        _row(f"{blocks}.feed_forward.w2", f"{blocks}.feed_forward.linear_2"),
        _row(f"{blocks}.feed_forward.w3", f"{blocks}.feed_forward.linear_3"),
    )
)
WAN: tuple[Row, ...] = (
    *(
        _row(f"blocks.{{i}}.{attention}_attn.{short}", f"blocks.{{i}}.attn{number}.{long}")
        for attention, number in (("self", 1), ("cross", 2))
        for short, long in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    ),
    _row("blocks.{i}.cross_attn.k_img", "blocks.{i}.attn2.add_k_proj"),
    _row("blocks.{i}.cross_attn.v_img", "blocks.{i}.attn2.add_v_proj"),
    _row("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj"),
    _row("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2"),
    _row("head.head", "proj_out"),
    _row("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    _row("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    _row("time_projection.1", "condition_embedder.time_proj"),
    _row("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    _row("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
)
ROWS: tuple[Row, ...] = (*BFL, *MMDIT, *NEXT_DIT, *WAN)


def rows_of(modules: Collection[str]) -> Iterator[Row]:
    """Yield the rows that hold for a base with these modules, one for each of its blocks."""
    numbers = {int(number) for module in modules for number in re.findall(r"\.(\d+)\.", module)}
    last_context = _last_context_block(modules)
    for row in ROWS:
        for number in sorted(numbers) if "{i}" in row.name else (0,):
            found = tuple(module.replace("{i}", str(number)) for module in row.modules)
            if all(module in modules for module in found):
                # SD3's last block ends the text stream: its modulation has a scale and a shift alone.
                swaps = row.swaps_halves or found == (last_context,)
                yield Row(row.name.replace("{i}", str(number)), found, swaps)


def _last_context_block(modules: Collection[str]) -> str | None:
    for module in modules:
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.norm1_context\.linear", module)
        if match is not None and f"transformer_blocks.{match[1]}.attn.to_add_out" not in modules:
            return module
    return None


_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}
_UNET_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def unet_name(module: str, layers_per_block: int, with_attention: Collection[int]) -> str | None:
    """Return the original implementation's name of a UNet's layer; `with_attention` are the up blocks that have any."""
    if module in _UNET_OUTER:
        return _UNET_OUTER[module]
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", module)
    if match is None:
        return _middle_name(module)
    side, block, kind, place, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    first = 1 + block * (layers_per_block + 1) if side == "down" else block * (layers_per_block + 1)
    blocks = "input_blocks" if side == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{blocks}.{first + layers_per_block}.0.op"
    if kind == "upsamplers":
        return f"{blocks}.{first + layers_per_block}.{2 if block in with_attention else 1}.conv"
    if kind == "attentions":
        return f"{blocks}.{first + place}.1.{rest}"
    return f"{blocks}.{first + place}.0.{_RESNET[rest]}" if rest in _RESNET else None


def _middle_name(module: str) -> str | None:
    match = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module)
    if match is None:
        return None
    if match[1] == "attentions":
        return f"middle_block.1.{match[3]}"
    return f"middle_block.{0 if match[2] == '0' else 2}.{_RESNET[match[3]]}" if match[3] in _RESNET else None
