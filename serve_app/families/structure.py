"""Which families an adapter's layers can belong to: by the layers' names, in any spelling, and by their widths.

Pure: names and numbers in, family names out. Names alone fit several families at times, and then all of them are
returned; the configuration of a served base decides between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from serve_app.families.original_names import BFL, MMDIT, NEXT_DIT, WAN, Row
from serve_app.families.spellings import DENOISER, split_prefix, without_processor

_OWN = ("to_q", "to_k", "to_v", "to_out.0")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def _under(parent: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names)


_DOUBLE, _SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
_ATTENTION = _under(f"{_DOUBLE}.attn", *_OWN, *_ADDED, *_NORMS)
_FEED_FORWARD = _under(_DOUBLE, *(f"{ff}.net.{end}" for ff in ("ff", "ff_context") for end in ("0.proj", "2")))
_MODULATION = _under(_DOUBLE, "norm1.linear", "norm1_context.linear")
_SINGLES = _under(_SINGLE, "attn.to_q", "attn.to_k", "attn.to_v", "attn.norm_q", "attn.norm_k", "proj_mlp", "proj_out")
_TIME = tuple(
    f"time_text_embed.{embedder}.linear_{number}"
    for embedder in ("timestep_embedder", "text_embedder", "guidance_embedder")
    for number in (1, 2)
)
_ENDS = ("context_embedder", "norm_out.linear", "proj_out")


@dataclass(frozen=True, slots=True)
class Family:
    """A family of transformers: its layers in diffusers' names, and the widths of its published models' blocks.

    `depths` are the most blocks of a kind that they have, where that tells the family from others of the same names.
    """

    name: str
    layers: tuple[str, ...]
    widths: frozenset[int]
    rows: tuple[Row, ...] = ()
    depths: tuple[tuple[str, int], ...] = ()


FAMILIES: tuple[Family, ...] = (
    Family(
        "flux",
        (*_ATTENTION, *_FEED_FORWARD, *_MODULATION, *_SINGLES, f"{_SINGLE}.norm.linear", *_TIME, "x_embedder", *_ENDS),
        frozenset((3072,)),
        BFL,
    ),
    Family(
        "chroma",
        (
            *_ATTENTION,
            *_FEED_FORWARD,
            *_SINGLES,
            "x_embedder",
            "context_embedder",
            "proj_out",
            *_under("distilled_guidance_layer", "in_proj", "out_proj", "layers.0.linear_1", "layers.0.linear_2"),
        ),
        frozenset((3072,)),
        BFL,
    ),  # fmt: skip
    # FLUX.1's blocks, but eight that are double: 8 of its 12 billion parameters.
    Family(
        "fibo",
        (
            *_ATTENTION,
            *_FEED_FORWARD,
            *_MODULATION,
            *_SINGLES,
            f"{_SINGLE}.norm.linear",
            *(
                f"{embedder}.timestep_embedder.linear_{n}"
                for embedder in ("time_embed", "guidance_embed")
                for n in (1, 2)
            ),
            "caption_projection.0.linear",
            "x_embedder",
            *_ENDS,
        ),
        frozenset((3072,)),
        depths=(("double", 8),),
    ),  # fmt: skip
    Family(
        "flux2",
        (
            *_ATTENTION,
            *_under(_DOUBLE, *(f"{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out"))),
            *_under(f"{_SINGLE}.attn", "to_qkv_mlp_proj", "to_out", "norm_q", "norm_k"),
            *(
                f"{which}.linear"
                for which in (
                    "double_stream_modulation_img",
                    "double_stream_modulation_txt",
                    "single_stream_modulation",
                )
            ),
            *(
                f"time_guidance_embed.{embedder}.linear_{number}"
                for embedder in ("timestep_embedder", "guidance_embedder")
                for number in (1, 2)
            ),
            "x_embedder",
            *_ENDS,
        ),
        frozenset((3072, 4096, 6144)),
        BFL,
    ),  # fmt: skip
    Family(
        "sd3",
        (
            *_ATTENTION,
            *_under(f"{_DOUBLE}.attn2", *_OWN, "norm_q", "norm_k"),
            *_FEED_FORWARD,
            *_MODULATION,
            *_TIME[:4],
            "pos_embed.proj",
            *_ENDS,
        ),
        frozenset((1536, 2432)),
        MMDIT,
    ),  # fmt: skip
    Family(
        "qwen-image",
        (
            *_ATTENTION,
            *_under(
                _DOUBLE, *(f"{s}_{end}" for s in ("img", "txt") for end in ("mod.1", "mlp.net.0.proj", "mlp.net.2"))
            ),
            *_TIME[:2],
            "img_in",
            "txt_in",
            "txt_norm",
            "norm_out.linear",
            "proj_out",
        ),
        frozenset((3072,)),
    ),  # fmt: skip
    *(
        Family(
            name,
            tuple(
                layer
                for blocks in ("layers.0", "noise_refiner.0", "context_refiner.0")
                for layer in _under(blocks, *(f"{attention}.{end}" for end in (*_OWN, "norm_q", "norm_k")), *rest)
            ),
            widths,
            NEXT_DIT,
        )
        for name, attention, rest, widths in (
            (
                "z-image",
                "attention",
                ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),
                frozenset((3840,)),
            ),
            (
                "lumina2",
                "attn",
                ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3", "norm1.linear"),
                frozenset((2304,)),
            ),
        )
    ),  # fmt: skip
    Family(
        "wan",
        (
            *(f"blocks.0.attn{number}.{end}" for number in (1, 2) for end in (*_OWN, *_ADDED, "norm_q", "norm_k")),
            "blocks.0.ffn.net.0.proj",
            "blocks.0.ffn.net.2",
            "patch_embedding",
            *_under(
                "condition_embedder",
                "time_proj",
                *(
                    f"{embedder}.linear_{number}"
                    for embedder in ("time_embedder", "text_embedder")
                    for number in (1, 2)
                ),
            ),
        ),
        frozenset((1536, 3072, 5120)),
        WAN,
    ),  # fmt: skip
)
UNET_FAMILIES: Mapping[int, str] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
# Trainers' names of the base in a file's metadata, by how they begin.
_STATED = (
    ("sdxl", "sdxl"), ("stable-diffusion-xl", "sdxl"), ("sd3", "sd3"), ("stable-diffusion-3", "sd3"),
    ("sd_v1", "sd1"), ("stable-diffusion-v1", "sd1"), ("sd_v2", "sd2"), ("stable-diffusion-v2", "sd2"),
    ("flux2", "flux2"), ("flux-2", "flux2"), ("flux", "flux"), ("chroma", "chroma"), ("qwen", "qwen-image"),
    ("zimage", "z-image"), ("z-image", "z-image"), ("z_image", "z-image"), ("wan", "wan"), ("lumina", "lumina2"),
)  # fmt: skip
# Below this share of known layers a file is not taken to be of a family.
LEAST_SHARE = 0.5
_UNET = re.compile(r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)_#|mid_block_")
_TEXT = re.compile(r"^(?:text_model_|encoder_(?:layers|block)_#|text_projection)")
_BLOCKS = re.compile(r"(?:^|_)((?:single_)?(?:transformer_)?blocks|double_blocks|joint_blocks|layers)[._](\d+)(?=[._])")
_HIDDEN = re.compile(r"(?:^|_)(?:to_q|to_k|to_v|attn_qkv|attention_qkv|qkv[12]?|linear1|self_attn_[qkv])$")


def component_of(stem: str) -> str | None:
    """Return "unet", "transformer" or "text_encoder", to which a layer belongs by its name, or None."""
    prefix, rest = split_prefix(stem)
    if prefix.component not in (DENOISER, "unet", "transformer"):
        return "text_encoder"
    shape = _shape(rest)
    if _TEXT.search(shape):
        return "text_encoder"
    if _UNET.search(shape) or prefix.component == "unet":
        return "unet"
    is_known = any(shape in _names_of(family) for family in FAMILIES)
    return "transformer" if is_known or prefix.component == "transformer" or _BLOCKS.search(rest) else None


def families_of(widths: Mapping[str, int]) -> frozenset[str]:
    """Return the families that a transformer's layers fit best; `widths` is name -> what one output reads.

    None is left out for its width: the widths of a base that is served are in its configuration.
    """
    depths = depths_of(widths)
    shapes = [_shape(split_prefix(stem)[1]) for stem in widths if component_of(stem) == "transformer"]
    if not shapes:
        return frozenset()
    shares = {
        family.name: sum(shape in _names_of(family) for shape in shapes) / len(shapes)
        for family in FAMILIES
        if all(depths.get(kind, 0) <= most for kind, most in family.depths)
    }
    best = max(shares.values())
    return frozenset(name for name, share in shares.items() if share == best and share >= LEAST_SHARE)


def published(families: Iterable[str], hidden_widths: Iterable[int]) -> frozenset[str]:
    """Return those families whose published models have blocks of these widths; all of them where none is known."""
    hidden = frozenset(hidden_widths)
    names = frozenset(families)
    fitting = frozenset(family.name for family in FAMILIES if family.name in names and family.widths & hidden)
    return fitting if hidden else names


def hidden_width(stem: str, width: int) -> int | None:
    """Return the width of the blocks, where a layer's input is that."""
    return width if _HIDDEN.search(_shape(split_prefix(stem)[1])) and component_of(stem) == "transformer" else None


def depths_of(stems: Iterable[str]) -> dict[str, int]:
    """Return how many blocks of each kind a transformer needs at least to have these layers: "double" and "single"."""
    depths: dict[str, int] = {}
    for stem in stems:
        match = _BLOCKS.search(split_prefix(stem)[1])
        if match is not None and component_of(stem) == "transformer":
            kind = "single" if match[1].startswith("single") else "double"
            depths[kind] = max(depths.get(kind, 0), int(match[2]) + 1)
    return depths


def stated_family(metadata: Mapping[str, str]) -> str | None:
    """Return the family that a trainer wrote into a file's metadata."""
    for key in ("ss_base_model_version", "modelspec.architecture"):
        said = metadata.get(key, "").lower()
        for prefix, family in _STATED:
            if said.startswith(prefix):
                return family
    return None


def transformer_shape(config: Mapping[str, Any]) -> tuple[frozenset[int], dict[str, int]]:
    """Return the widths of a transformer's blocks and how many of each kind it has, by its `config.json`."""
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    width = heads * size if type(heads) is int and type(size) is int else config.get("dim", config.get("hidden_size"))
    depths = {
        kind: config[key]
        for key, kind in (("num_layers", "double"), ("n_layers", "double"), ("num_single_layers", "single"))
        if type(config.get(key)) is int
    }
    return (frozenset((width,)) if type(width) is int else frozenset()), depths


def _shape(name: str) -> str:
    """Return a name without its numbers and separators, so that one stands for all blocks."""
    return re.sub(r"(?:(?<=_)|^)\d+(?=_|$)", "#", without_processor(name).replace(".", "_"))


@cache
def _names_of(family: Family) -> frozenset[str]:
    """Return a family's layers in every spelling, without numbers."""
    own = frozenset(_shape(layer) for layer in family.layers)
    others = {
        _shape(row.name.replace("{i}", "0"))
        for row in family.rows
        if all(_shape(module.replace("{i}", "0")) in own for module in row.modules)
    }
    return own | others
