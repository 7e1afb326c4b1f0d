"""What a safetensors header tells about an adapter before its weights are read.

Pure: bytes in, values out. Owns the checks of the header against its file (lengths, offsets, limits) and the
reading of structure: method, rank, which components, which widths. Widths tell families apart where key names
mislead. Must not know which bases are served.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_NAME_CHARACTERS = 512
# More than any limit of a base lets in; as many take a second to look through.
MAX_TENSORS = 100_000

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

UNET_FAMILIES: Mapping[int, str] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_METADATA_FAMILIES = (
    ("sdxl", "sdxl"), ("stable-diffusion-xl", "sdxl"), ("sd3", "sd3"), ("stable-diffusion-3", "sd3"),
    ("sd_v1", "sd1"), ("stable-diffusion-v1", "sd1"), ("sd_v2", "sd2"), ("stable-diffusion-v2", "sd2"),
    ("flux", "flux"),
)  # fmt: skip

# The input side of a pair, in the spellings of peft, diffusers old and new, kohya, LoHa and LoKr; a full difference
# counts as both sides.
_DOWN = re.compile(
    r"(?:\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)|_lora\.down)(?:\.[A-Za-z0-9_]{1,64})?\.weight$"
    r"|\.(?P<loha>hada_w1_b)$|\.(?P<lokr>lokr_w1(?:_b)?)$|\.(?P<full>diff)$"
)
_UP = re.compile(
    r"(?:\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)|_lora\.up)(?:\.[A-Za-z0-9_]{1,64})?\.weight$"
    r"|\.hada_w1_a$|\.lokr_w2(?:_a)?$|\.diff$"
)
_CROSS_ATTENTION = re.compile(r"attn2[._](?:processor\.)?to_[kv]$")
_SELF_ATTENTION = re.compile(r"attn1[._](?:processor\.)?to_[qkv]$")
_UNET = re.compile(r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]")
_TRANSFORMER = re.compile(
    r"^(?:transformer|diffusion_model)\.|(?:double|single|single_transformer|joint|joint_transformer)_blocks[._]"
)
_TEXT_ENCODER = re.compile(r"^(?:text_encoder|lora_te|te[0-9]?_|t5)|text_model[._]")


class MalformedHeader(ValueError):
    """The header cannot be read, or does not describe its file; the text says why."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The names, dtypes, shapes and places of all tensors, and the free metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_offset: int


@dataclass(frozen=True, slots=True)
class HeaderFacts:
    """The structure of an adapter file.

    `components` holds "unet", "transformer" and "text_encoder" as far as the file has layers for them.
    `text_width` is the input width of the cross-attention's `to_k`, `hidden_widths` those of self-attention:
    None and empty where the file has no such layers.
    """

    has_pairs: bool
    methods: frozenset[str]
    components: frozenset[str]
    text_width: int | None
    hidden_widths: frozenset[int]
    max_rank: int
    layers: int
    tensors: int
    stated_family: str | None
    family: str | None


def header_length(head: bytes) -> int:
    """Return how many bytes of JSON follow the first eight.

    Raises:
        MalformedHeader: the length is missing or absurd.
    """
    if len(head) < LENGTH_BYTES:
        raise MalformedHeader("it is too short to be a safetensors file")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise MalformedHeader(f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
    return length


def parse_header(head: bytes, *, file_bytes: int | None = None) -> SafetensorsHeader:
    """Return the header at the start of a file; `file_bytes` is the whole file's size, where it is known.

    Raises:
        MalformedHeader: not safetensors, truncated, or its offsets do not describe the file.
    """
    length = header_length(head)
    text = head[LENGTH_BYTES : LENGTH_BYTES + length]
    if len(text) < length:
        raise MalformedHeader("it is truncated within its header")
    if text.count(b'"dtype"') > MAX_TENSORS:
        raise MalformedHeader(f"its header names over {MAX_TENSORS} tensors")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedHeader("its header is not JSON") from None
    if not isinstance(data, dict):
        raise MalformedHeader("its header is not a table of tensors")
    entries = cast("dict[str, Any]", data)
    metadata: Any = entries.pop("__metadata__", None)
    tensors = {name: _entry(name, value) for name, value in entries.items()}
    offset = LENGTH_BYTES + length
    if file_bytes is not None:
        _check_size(tensors.values(), file_bytes - offset)
    return SafetensorsHeader(tensors, _texts(metadata), offset)


def read_header(path: Path) -> SafetensorsHeader:
    """Return the header of a local file.

    Raises:
        MalformedHeader: not safetensors, truncated, or its offsets do not describe the file.
    """
    with path.open("rb") as file:
        head = file.read(LENGTH_BYTES)
        head += file.read(header_length(head))
    return parse_header(head, file_bytes=path.stat().st_size)


def _entry(name: str, value: Any) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise MalformedHeader("an entry of its header lacks dtype, shape or offsets") from None
    if len(name) > MAX_NAME_CHARACTERS:
        raise MalformedHeader(f"a tensor's name is over {MAX_NAME_CHARACTERS} characters")
    numbers = (*shape, begin, end)
    if not isinstance(dtype, str) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise MalformedHeader("an entry of its header has a dtype, shape or offsets that cannot be")
    bits = DTYPE_BITS.get(dtype)
    if bits is not None and prod(shape) * bits != (end - begin) * 8:
        raise MalformedHeader("an entry's offsets do not hold its shape")
    return TensorEntry(dtype, shape, begin, end)


def _check_size(tensors: Iterable[TensorEntry], data_bytes: int) -> None:
    described = max((tensor.end for tensor in tensors), default=0)
    if described > data_bytes:
        raise MalformedHeader(f"it is truncated: {described} bytes of weights are described, {data_bytes} are there")
    if described < data_bytes:
        raise MalformedHeader(f"it holds {data_bytes - described} bytes that its header does not describe")


def _texts(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        return {}
    items = cast("dict[object, object]", metadata).items()
    return {key: value for key, value in items if isinstance(key, str) and isinstance(value, str)}


def describe(header: SafetensorsHeader) -> HeaderFacts:
    """Return what the names and shapes of a file say it is."""
    downs = {
        name[: match.start()]: (match, entry)
        for name, entry in header.tensors.items()
        if (match := _DOWN.search(name)) is not None and entry.shape
    }
    has_ups = any(_UP.search(name) for name in header.tensors)
    widths = {module: _in_width(module, entry, header) for module, (_, entry) in downs.items()}
    text_width = _largest(width for module, width in widths.items() if _CROSS_ATTENTION.search(module))
    components = frozenset(component for module in downs if (component := _component(module)) is not None)
    stated = _stated_family(header.metadata)
    structural = UNET_FAMILIES.get(text_width or 0) if "unet" in components else None
    return HeaderFacts(
        has_pairs=bool(downs) and has_ups,
        methods=_methods(header.tensors, downs.values()),
        components=components,
        text_width=text_width if "unet" in components else None,
        hidden_widths=frozenset(w for m, w in widths.items() if _SELF_ATTENTION.search(m) and _UNET.search(m)),
        max_rank=max(
            (_rows(entry) for match, entry in downs.values() if match["lokr"] is None and match["full"] is None),
            default=0,
        ),
        layers=len(downs),
        tensors=len(header.tensors),
        stated_family=stated,
        family=structural or _transformer_family(downs, components) or stated,
    )


def _in_width(module: str, down: TensorEntry, header: SafetensorsHeader) -> int:
    width = down.shape[1] if len(down.shape) > 1 else _rows(down)
    if f"{module}.lokr_w1" in header.tensors or f"{module}.lokr_w1_b" in header.tensors:
        other = header.tensors.get(f"{module}.lokr_w2") or header.tensors.get(f"{module}.lokr_w2_b")
        width *= other.shape[1] if other is not None and len(other.shape) > 1 else 1
    return width


def _rows(entry: TensorEntry) -> int:
    return entry.shape[0] if entry.shape else 0


def _methods(names: Iterable[str], downs: Iterable[tuple[re.Match[str], TensorEntry]]) -> frozenset[str]:
    groups = ("loha", "lokr", "full")
    methods = {next((name for name in groups if match[name]), "lora") for match, _ in downs}
    if any("lora_magnitude_vector" in name or name.endswith(".dora_scale") for name in names):
        methods.add("dora")
    return frozenset(methods)


def _component(module: str) -> str | None:
    if _TEXT_ENCODER.search(module):
        return "text_encoder"
    # Families with blocks of their own come first: kohya calls the FLUX transformer `lora_unet_` too.
    if _UNET.search(module):
        return "unet"
    return "transformer" if _TRANSFORMER.search(module) else None


def _largest(widths: Iterable[int]) -> int | None:
    return max(widths, default=None)


def _stated_family(metadata: Mapping[str, str]) -> str | None:
    for key in ("ss_base_model_version", "modelspec.architecture"):
        said = metadata.get(key, "").lower()
        for prefix, family in _METADATA_FAMILIES:
            if said.startswith(prefix):
                return family
    return None


def _transformer_family(
    downs: Mapping[str, tuple[re.Match[str], TensorEntry]], components: frozenset[str]
) -> str | None:
    if "transformer" not in components or "unet" in components:
        return None
    modules = [module for module in downs if _component(module) == "transformer"]
    if any("img_mod" in module for module in modules):
        return "qwen-image"
    if any("single_blocks" in module or "single_transformer_blocks" in module for module in modules):
        return "flux"
    widths = {entry.shape[1] for module in modules if len((entry := downs[module][1]).shape) > 1}
    if widths & {1536, 2432}:
        return "sd3"
    return "z-image" if 3840 in widths else None
