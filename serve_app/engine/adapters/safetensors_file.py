"""An untrusted safetensors file -> its tensors, its metadata and its digest.

Owns the checks of the container itself: that it is safetensors and nothing else, that its header tells the truth and
that its sizes are within limits. Must not know what the tensors mean. The bytes that are parsed are the very bytes
that are hashed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.adapters.deltas import bytes_of
from serve_app.engine.adapters.host_buffer import HostBuffers
from serve_app.families.spellings import in_folder, text_folder
from serve_app.refusals import MalformedFile, NotAnAdapter, RefusedAdapter, UnsafeFile
from serve_app.settings import AdapterLimits

MAX_HEADER_BYTES = 16 * 1024**2
MAX_KEY_CHARACTERS = 512
MAX_DIMENSIONS = 4
# Counters and flags of trainers are read too; that factors are floats is checked where they are used.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
READ_BYTES = 8 * 1024**2
# Files follow one another in the process that reads them; few are larger, and it should stay small between them.
BUFFERS = HostBuffers(max_idle_bytes=256 * 1024**2)


@dataclass(frozen=True, slots=True, eq=False)
class TensorFile:
    """The content of one safetensors file; `tensors` share one buffer; `digest` is the file's sha256 in hex."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    digest: str


@dataclass(frozen=True, slots=True)
class FilePart:
    """One of an adapter's files; `component` is the text encoder whose folder it lies in, or nothing."""

    path: Path
    component: str = ""


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def shown(text: str) -> str:
    """Return a name from a file, made fit to be shown: printable and short."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return printable if len(printable) <= 100 else printable[:97] + "..."


def parts_of(names: Sequence[str], paths: Sequence[Path]) -> list[FilePart]:
    """Return an adapter's files, by their names in its repository."""
    return [FilePart(path, text_folder(name)) for name, path in zip(names, paths, strict=True)]


def read_tensor_files(parts: Sequence[FilePart], name: str, limits: AdapterLimits) -> list[TensorFile]:
    """Read and check the files of one adapter; a name in the folder of a text encoder is one of that encoder's.

    Raises:
        RefusedAdapter: as for one file, or together they are over a limit or hold a tensor twice.
    """
    size_bytes = sum(part.path.stat().st_size for part in parts)
    if size_bytes > limits.max_file:
        limit = limits.max_file.human_readable()
        raise RefusedAdapter(name, f"its files have {size_bytes} bytes, over the limit of {limit}")
    found: list[TensorFile] = []
    known: set[str] = set()
    for part in parts:
        file = read_tensor_file(part.path, name, limits)
        tensors = {in_folder(key, part.component): tensor for key, tensor in file.tensors.items()}
        if twice := known & tensors.keys():
            raise MalformedFile(name, f"two of its files hold the tensor {shown(min(twice))}")
        known |= tensors.keys()
        found.append(replace(file, tensors=tensors))
    if len(known) > limits.max_tensors:
        raise RefusedAdapter(name, f"it has {len(known)} tensors, over the limit of {limits.max_tensors}")
    return found


def read_tensor_file(path: Path, name: str, limits: AdapterLimits) -> TensorFile:
    """Read and check one file.

    Raises:
        UnsafeFile: it is a pickle or an archive.
        MalformedFile: it is no safetensors file, or its header does not describe its body.
        NotAnAdapter: it holds no tensor.
        RefusedAdapter: it is over a size limit.
    """
    buffer, digest = _read_hashed(path, name, limits)
    header_size = _header_size(buffer, name)
    header = _parse_header(buffer[8 : 8 + header_size].numpy().tobytes(), name)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedFile(name, "its metadata is not a table of texts")
    if not header:
        raise NotAnAdapter(name, "its file holds no tensor")
    if len(header) > limits.max_tensors:
        raise RefusedAdapter(name, f"it has {len(header)} tensors, over the limit of {limits.max_tensors}")
    body = buffer[8 + header_size :]
    entries = sorted(
        (_entry(key, value, name) for key, value in header.items()), key=lambda entry: (entry.start, entry.end)
    )
    _check_layout(entries, body.numel(), name)
    return TensorFile({entry.key: _view(body, entry) for entry in entries}, metadata, digest)


def _read_hashed(path: Path, name: str, limits: AdapterLimits) -> tuple[Tensor, str]:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limits.max_file:
            limit = limits.max_file.human_readable()
            raise RefusedAdapter(name, f"its file has {size} bytes, over the limit of {limit}")
        if size == 0:
            raise MalformedFile(name, "its file is empty")
        buffer = BUFFERS.take(size)
        view, filled = bytes_of(buffer), 0
        while filled < size:
            count = file.readinto(view[filled : filled + READ_BYTES])
            if not count:
                raise MalformedFile(name, "its file ends before its size")
            digest.update(view[filled : filled + count])
            filled += count
    return buffer, digest.hexdigest()


def _header_size(buffer: Tensor, name: str) -> int:
    head = buffer[:9].numpy().tobytes()
    size = struct.unpack("<Q", head[:8])[0] if len(head) == 9 else 0
    if len(head) == 9 and head[8:9] == b"{" and 2 <= size <= min(MAX_HEADER_BYTES, buffer.numel() - 8):
        return size
    if head[:2] == b"PK" or (head[:1] == b"\x80" and len(head) > 1 and head[1] in range(1, 6)):
        raise UnsafeFile(name, "its file is a pickle or an archive, which can run code; publish it as safetensors")
    raise MalformedFile(name, "its file is not safetensors: it begins with no header of a plausible size")


def _parse_header(text: bytes, name: str) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise MalformedFile(name, "its header names one key twice")
        return table

    try:
        header = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError):
        raise MalformedFile(name, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise MalformedFile(name, "its header is not a table")
    return header


def _entry(key: str, value: Any, name: str) -> _Entry:
    if len(key) > MAX_KEY_CHARACTERS:
        raise MalformedFile(name, f"a tensor's name has {len(key)} characters; the limit is {MAX_KEY_CHARACTERS}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise MalformedFile(name, f"its header does not describe tensor {shown(key)}")
    dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise MalformedFile(name, f"tensor {shown(key)} has type {shown(str(dtype_name))}, which is not read")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise MalformedFile(name, f"tensor {shown(key)} has an impossible shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise MalformedFile(name, f"tensor {shown(key)} has impossible offsets")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise MalformedFile(name, f"tensor {shown(key)} has a shape that does not fit its bytes")
    return _Entry(key, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _check_layout(entries: list[_Entry], body_size: int, name: str) -> None:
    """Tensors must fill the body without gap or overlap, as the format demands."""
    position = 0
    for entry in entries:
        if entry.start != position:
            raise MalformedFile(name, f"tensor {shown(entry.key)} overlaps another, or leaves a gap")
        position = entry.end
    if position != body_size:
        raise MalformedFile(name, f"its header describes {position} bytes of tensors, but its body has {body_size}")


def _view(body: Tensor, entry: _Entry) -> Tensor:
    piece = body[entry.start : entry.end]
    if piece.data_ptr() % entry.dtype.itemsize or piece.storage_offset() % entry.dtype.itemsize:
        piece = piece.clone()
    return piece.view(entry.dtype).reshape(entry.shape)
