"""How adapter files spell the layers of a base: prefixes, parts of a layer, and the names of other implementations.

One table for the catalog, which sees a header alone, and for the engine, which has the base's layers beside it. Pure:
names in, names out. A new spelling is a new row here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from serve_app.families.original_names import Row, rows_of, unet_name

# The end of a key -> the part of the layer that the tensor is; a longer ending stands before one that it ends with.
PARTS: Mapping[str, str] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    "_lora1.down.weight": "down1",
    "_lora1.up.weight": "up1",
    "_lora2.down.weight": "down2",
    "_lora2.up.weight": "up2",
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
    ".w_norm": "diff",
    ".b_norm": "diff_b",
}
# The catalog takes for an adapter: a file with one of each, or one with whole differences.
INPUT_PARTS = frozenset(("down", "hada_w1_b", "lokr_w1", "lokr_w1_b", "diff"))
OUTPUT_PARTS = frozenset(("up", "hada_w1_a", "lokr_w2", "lokr_w2_a", "diff"))
# Methods that are known and not served: what a key holds, and the method's name.
UNSERVED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.oft_(?:blocks|diag)$|oft_R"), "OFT or BOFT"),
    (re.compile(r"\.boft_|\.boft$"), "BOFT"),
    (re.compile(r"\.on_input$|\.ia3_l|\.ia3_|^(?:lycoris|lora_(?:unet|transformer|te\d?))_[^.]+\.weight$"), "IA3"),
    (re.compile(r"\.(?:a1|a2|b1|b2|bm)\.weight$"), "GLoRA"),
    (re.compile(r"^(?:unet|text_encoder):\d+:(?:up|down)$"), "the form of cloneofsimo's first trainer"),
    (re.compile(r"_norm\.scale$|lora_controlnet"), "control LoRA"),
    (re.compile(r"modules_to_save"), "whole modules"),
    (re.compile(r"vera_lambda_|\.lora_embedding_|\.lora_ga"), "another method of peft's"),
)
# The name of peft's adapter within a key: `.lora_A.default.weight`.
_ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)[^.]{1,64}(\.weight|\.bias|)$")


@dataclass(frozen=True, slots=True)
class Prefix:
    """How a file says which component a layer is of; `separator` divides the names of the modules behind it."""

    text: str
    component: str
    separator: str = "."


DENOISER, CLIP_L, CLIP_G, THIRD, T5 = "denoiser", "text_encoder", "text_encoder_2", "text_encoder_3", "t5"
WRAPPERS = ("base_model.model.",)
# A longer prefix stands before one that it begins with.
PREFIXES: tuple[Prefix, ...] = (
    Prefix("model.diffusion_model.", DENOISER),
    Prefix("diffusion_model.", DENOISER),
    Prefix("unet.", "unet"),
    Prefix("transformer.", "transformer"),
    Prefix("text_encoder.", CLIP_L),
    Prefix("text_encoder_2.", CLIP_G),
    Prefix("text_encoder_3.", THIRD),
    Prefix("text_encoders.clip_l.transformer.", CLIP_L),
    Prefix("text_encoders.clip_g.transformer.", CLIP_G),
    Prefix("text_encoders.t5xxl.transformer.", T5),
    Prefix("lora_unet__", DENOISER, "_"),
    Prefix("lora_unet_", DENOISER, "_"),
    Prefix("lora_transformer_", DENOISER, "_"),
    Prefix("lycoris_", DENOISER, "_"),
    Prefix("lora_te_", CLIP_L, "_"),
    Prefix("lora_te1_", CLIP_L, "_"),
    Prefix("lora_te2_", CLIP_G, "_"),
    Prefix("lora_te3_", THIRD, "_"),
)
BARE = Prefix("", DENOISER)


@dataclass(frozen=True, slots=True)
class LayerName:
    """The meaning of a name of a file in a base.

    Several `modules` are the parts of a fused projection, in the order of its outputs. `swaps_halves` says that the
    other implementation keeps shift and scale the other way round; `is_dotted` that the name is diffusers' own.
    """

    component: str
    modules: tuple[str, ...]
    swaps_halves: bool = False
    is_dotted: bool = False


def split_key(key: str) -> tuple[str, str] | None:
    """Return a layer's name and the part of it that a tensor is, or None where the ending is no part of an adapter."""
    key = _ADAPTER_NAME.sub(r".\1\2", key)
    for ending, part in PARTS.items():
        if key.endswith(ending) and len(key) > len(ending):
            stem = key.removesuffix(ending)
            # XLabs numbers the streams behind the layer's name.
            return (f"{stem}{part[-1]}", part[:-1]) if part in ("down1", "up1", "down2", "up2") else (stem, part)
    return None


def unserved_method(key: str) -> str | None:
    """Return the name of the method that a key belongs to, where it is one that is not served."""
    return next((name for pattern, name in UNSERVED if pattern.search(key)), None)


def split_prefix(stem: str) -> tuple[Prefix, str]:
    """Return how a layer's name says its component, and the rest of it."""
    prefix = BARE
    while True:
        for wrapper in WRAPPERS:
            stem = stem.removeprefix(wrapper)
        found = next((row for row in PREFIXES if stem.startswith(row.text)), None) if prefix is BARE else None
        if found is None:
            return prefix, stem
        prefix, stem = found, stem.removeprefix(found.text)


_TEXT_FOLDER = re.compile(r"(?:.*/)?(text_encoder(?:_[23])?)/[^/]+")


def text_folder(file: str) -> str:
    """Return the text encoder that a file's folder is named after, or nothing."""
    match = _TEXT_FOLDER.fullmatch(file)
    return match[1] if match else ""


def in_folder(key: str, component: str) -> str:
    """Return a name of a file that lies in the folder of a component: one that names none itself is of that one."""
    return f"{component}.{key}" if component and split_prefix(key)[0] is BARE else key


class SpellingIndex:
    """Finds the layers of one base by any of their spellings.

    `components` are the base's modules by component, the denoiser's `denoiser`; `layers_per_block` is the UNet's.
    """

    def __init__(
        self, components: Mapping[str, Iterable[str]], denoiser: str, layers_per_block: int | None = None
    ) -> None:
        self._denoiser = denoiser
        self._dotted: dict[str, dict[str, LayerName]] = {}
        self._underscored: dict[str, dict[str, LayerName]] = {}
        for component, modules in components.items():
            names = tuple(modules)
            if component == denoiser:
                known = _denoiser_names(component, names, layers_per_block)
            else:
                known = _text_names(component, names)
            self._dotted[component] = known
            spellings = Counter(name.replace(".", "_") for name in known)
            self._underscored[component] = {
                name.replace(".", "_"): layer for name, layer in known.items() if spellings[name.replace(".", "_")] == 1
            }

    def find(self, stem: str) -> LayerName | None:
        """Return what a layer's name means, or None."""
        prefix, rest = split_prefix(stem)
        component = self._denoiser if prefix.component == DENOISER else prefix.component
        if component not in self._dotted:
            return None
        if prefix.separator == "_":
            return self._underscored[component].get(rest.replace(".", "_"))
        return self._dotted[component].get(rest) or self._dotted[component].get(without_processor(rest))

    def spellings(self, component: str) -> Mapping[str, LayerName]:
        """Return every dotted name that is known for a component's layers."""
        return self._dotted[component]


def without_processor(module: str) -> str:
    """Return the name of a layer that early diffusers kept in its attention processor."""
    module = module.replace(".processor.", ".")
    return f"{module}.0" if module.endswith(".to_out") else module


def _denoiser_names(component: str, modules: tuple[str, ...], layers_per_block: int | None) -> dict[str, LayerName]:
    present = frozenset(modules)
    known: dict[str, LayerName] = {}
    if layers_per_block is not None:
        with_attention = {int(m.split(".")[1]) for m in modules if re.match(r"up_blocks\.\d+\.attentions\.", m)}
        for module in modules:
            original = unet_name(module, layers_per_block, with_attention)
            if original is not None:
                known[original] = LayerName(component, (module,))
    for row in rows_of(present):
        known.setdefault(row.name, _layer_of(row, component))
    # Diffusers' own names are put last: they win over a name of another implementation.
    return known | {module: LayerName(component, (module,), is_dotted=True) for module in modules}


def _layer_of(row: Row, component: str) -> LayerName:
    return LayerName(component, row.modules, row.swaps_halves)


_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _text_names(component: str, modules: tuple[str, ...]) -> dict[str, LayerName]:
    """Text encoders lost their `text_model.` level in newer transformers; files and bases may be of either age."""
    level = "text_model."
    known: dict[str, LayerName] = {}
    for module in modules:
        bare = module.removeprefix(level)
        parent, _, last = bare.rpartition(".")
        older = f"{parent}.{_OLD_TEXT[last]}" if last in _OLD_TEXT else bare
        for name in (bare, level + bare, older, level + older, older + ".0" if older.endswith("to_out") else older):
            known.setdefault(name, LayerName(component, (module,), is_dotted=True))
        if older.endswith("to_out"):
            known.setdefault(f"{level}{older}.0", LayerName(component, (module,), is_dotted=True))
    return known
