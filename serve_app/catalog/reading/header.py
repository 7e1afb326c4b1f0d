"""Safetensors headers: the facts of an adapter before its weights are read.

Pure: bytes in, values out. Owns the checks of the header against its file (lengths, offsets, limits) and the
reading of structure: method, rank, which components, which widths. Widths tell families apart where key names
mislead. Must not know which bases are served.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from serve_app.families.spellings import INPUT_PARTS, OUTPUT_PARTS, in_folder, split_key, unserved_method
from serve_app.families.structure import (
    UNET_FAMILIES,
    component_of,
    depths_of,
    families_of,
    hidden_width,
    published,
    stated_family,
)

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 * 1024 * 1024
# The header of nearly every adapter fits, so that one request is enough.
FIRST_RANGE_BYTES = 128 * 1024
MAX_NAME_CHARACTERS = 512
# More than any limit of a base lets in; as many take a second to look through.
MAX_TENSORS = 100_000

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

_CROSS_ATTENTION = re.compile(r"attn2[._](?:processor\.)?to_[kv]$")
_SELF_ATTENTION = re.compile(r"attn1[._](?:processor\.)?to_[qkv]$")
# The parts whose first dimension is a rank, in the order in which they tell it.
_RANKED = ("down", "hada_w1_b")


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


@dataclass(frozen=True, slots=True)
class HeaderFacts:
    """The structure of an adapter file.

    `components` holds "unet", "transformer" and "text_encoder" as far as the file has layers for them.
    `text_width` is the input width of the cross-attention's `to_k`, `hidden_widths` those of self-attention:
    None and empty where the file has no such layers. `families` are those of transformers that the layers' names
    fit, `depths` how many blocks of each kind they need; `family` is the one family that is certain, if any.
    `stem` is the name of a layer, for messages, `unserved_method` what a file without pairs holds instead.
    """

    has_pairs: bool
    methods: frozenset[str]
    components: frozenset[str]
    text_width: int | None
    hidden_widths: frozenset[int]
    max_rank: int
    layers: int
    tensors: int
    family: str | None
    families: frozenset[str] = frozenset()
    depths: tuple[tuple[str, int], ...] = ()
    stem: str = ""
    unserved_method: str | None = None


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


def read_head(read_prefix: Callable[[int], bytes]) -> bytes:
    """Return a remote file's bytes up to the end of its header; `read_prefix` returns so many first bytes of it."""
    head = read_prefix(FIRST_RANGE_BYTES)
    try:
        wanted = LENGTH_BYTES + header_length(head)
    except MalformedHeader:
        return head
    if len(head) < wanted and len(head) == FIRST_RANGE_BYTES:
        head = read_prefix(wanted)
    return head[:wanted]


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
    if file_bytes is not None:
        _check_size(tensors.values(), file_bytes - LENGTH_BYTES - length)
    return SafetensorsHeader(tensors, _texts(metadata))


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


def joined(headers: Iterable[tuple[str, SafetensorsHeader]]) -> SafetensorsHeader:
    """Return the headers of files that are one adapter as that of one file.

    Each comes with the text encoder whose folder the file lies in, or nothing.

    Raises:
        MalformedHeader: two of them hold one tensor.
    """
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for component, header in headers:
        own = {in_folder(key, component): entry for key, entry in header.tensors.items()}
        if twice := tensors.keys() & own.keys():
            raise MalformedHeader(f"two of its files hold the tensor {min(twice)[:100]}")
        tensors |= own
        metadata |= header.metadata
    if len(tensors) > MAX_TENSORS:
        raise MalformedHeader(f"its files hold over {MAX_TENSORS} tensors")
    return SafetensorsHeader(tensors, metadata)


def describe(header: SafetensorsHeader) -> HeaderFacts:
    """Return what the names and shapes of a file say it is."""
    layers: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in header.tensors.items():
        found = split_key(key)
        if found is not None:
            layers.setdefault(found[0], {})[found[1]] = entry
    reading = {stem: parts for stem, parts in layers.items() if INPUT_PARTS & parts.keys()}
    widths = {stem: _in_width(parts) for stem, parts in reading.items()}
    components = {stem: component_of(stem) for stem in reading}
    in_unet = {stem: width for stem, width in widths.items() if components[stem] == "unet"}
    text_width = max((width for stem, width in in_unet.items() if _CROSS_ATTENTION.search(stem)), default=None)
    blocks = {hidden_width(stem, width) for stem, width in widths.items()} - {None}
    blocks |= {width for stem, width in in_unet.items() if _SELF_ATTENTION.search(stem)}
    hidden = frozenset(width for width in blocks if width is not None)
    stated = stated_family(header.metadata)
    families = frozenset[str]() if in_unet else families_of(widths)
    return HeaderFacts(
        has_pairs=bool(reading) and any(OUTPUT_PARTS & parts.keys() for parts in layers.values()),
        methods=_methods(layers),
        components=frozenset(component for component in components.values() if component is not None),
        text_width=text_width,
        hidden_widths=hidden,
        max_rank=max((_rank(parts) for parts in reading.values()), default=0),
        layers=len(reading),
        tensors=len(header.tensors),
        family=UNET_FAMILIES.get(text_width or 0) or _certain(families, hidden, stated),
        families=families,
        depths=tuple(depths_of(widths).items()),
        stem=next(iter(reading), ""),
        unserved_method=None if reading else next(filter(None, map(unserved_method, header.tensors)), None),
    )


def _certain(families: frozenset[str], hidden: frozenset[int], stated: str | None) -> str | None:
    """Return the one family that a file can be for: by its structure, else by what its trainer wrote into it."""
    possible = published(families, hidden)
    if len(possible) == 1:
        return next(iter(possible))
    return stated if not families or stated in families else None


def _in_width(parts: Mapping[str, TensorEntry]) -> int:
    """Return how many values an output of the layer reads: the channels, where it is a convolution."""
    if "lokr_w1" in parts or "lokr_w1_b" in parts:
        halves = (parts.get("lokr_w1") or parts.get("lokr_w1_b"), parts.get("lokr_w2") or parts.get("lokr_w2_b"))
        return prod(half.shape[1] for half in halves if half is not None and len(half.shape) > 1)
    shape = next(parts[part].shape for part in ("down", "hada_w1_b", "diff") if part in parts)
    return shape[1] if len(shape) > 1 else prod(shape)


def _rank(parts: Mapping[str, TensorEntry]) -> int:
    shape = next((parts[part].shape for part in _RANKED if part in parts), ())
    return shape[0] if shape else 0


def _methods(layers: Mapping[str, Mapping[str, TensorEntry]]) -> frozenset[str]:
    marks = {"down": "lora", "hada_w1_b": "loha", "lokr_w1": "lokr", "lokr_w1_b": "lokr", "diff": "full"}
    marks |= {"magnitude": "dora", "dora_scale": "dora"}
    return frozenset(marks[part] for parts in layers.values() for part in parts if part in marks)
