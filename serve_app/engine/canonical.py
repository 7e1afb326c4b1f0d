"""The canonical form of an admitted adapter: one flat aligned body and a table, read back in one pass.

Owns the layout: a preamble (magic, table length, body length), a JSON table, and at the next page a body in which
every tensor is aligned. Files are this service's own, written after admission; a damaged one is recognised, so that
the adapter can be admitted again.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.adapter import (
    Coverage,
    Delta,
    Dora,
    Hadamard,
    Kronecker,
    LowRank,
    ParsedAdapter,
    bytes_of,
    dtype_named,
)
from serve_app.errors import LoraplexError

MAGIC = b"LPXADPT1"
PREAMBLE = struct.Struct("<8sQQ")
TENSOR_ALIGNMENT = 64
BODY_ALIGNMENT = 4096
KINDS: dict[str, type[Delta]] = {kind.__name__: kind for kind in (LowRank, Dora, Hadamard, Kronecker)}


@dataclass(eq=False)
class DamagedCanonicalFile(LoraplexError):
    """A canonical file is cut short or not ours; admit its source again."""

    digest: str
    code = "damaged_canonical_file"
    template = "a prepared adapter file is damaged ({digest})"


def write_canonical(adapter: ParsedAdapter, path: Path) -> None:
    """Write an adapter so that it appears under `path` whole or not at all."""
    body = _Body()
    layers = [[component, module, _describe(delta, body)] for component, module, delta in adapter.layers()]
    coverage = adapter.coverage
    table = {
        "digest": adapter.digest,
        "coverage": [coverage.layers_matched, coverage.layers_in_file, coverage.unmatched, coverage.ranks],
        "layers": layers,
    }
    text = json.dumps(table, separators=(",", ":")).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(PREAMBLE.pack(MAGIC, len(text), body.size))
            file.write(text)
            file.write(b"\0" * (_body_start(len(text)) - PREAMBLE.size - len(text)))
            for chunk in body.chunks():
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_canonical(path: Path, *, pinned: bool = False) -> ParsedAdapter:
    """Read a canonical file; its tensors are views of one host buffer, page-locked where `pinned`.

    Raises:
        DamagedCanonicalFile: the file is cut short or is not one of ours.
    """
    with path.open("rb", buffering=0) as file:
        preamble = file.read(PREAMBLE.size)
        if len(preamble) < PREAMBLE.size or not preamble.startswith(MAGIC):
            raise DamagedCanonicalFile(path.stem)
        _, table_size, body_size = PREAMBLE.unpack(preamble)
        start = _body_start(table_size)
        if os.fstat(file.fileno()).st_size != start + body_size:
            raise DamagedCanonicalFile(path.stem)
        try:
            table = json.loads(file.read(table_size))
        except ValueError:
            raise DamagedCanonicalFile(path.stem) from None
        file.seek(start)
        body = torch.empty(body_size, dtype=torch.uint8, pin_memory=pinned)
        _fill(file, body, path)
    components: dict[str, dict[str, Delta]] = {}
    for component, module, description in table["layers"]:
        components.setdefault(component, {})[module] = _rebuild(description, body)
    matched, in_file, unmatched, ranks = table["coverage"]
    return ParsedAdapter(
        table["digest"], components, Coverage(matched, in_file, tuple(unmatched), (ranks[0], ranks[1]))
    )


class _Body:
    """Places tensors one after another, aligned."""

    def __init__(self) -> None:
        self.size = 0
        self._placed: list[tuple[int, Tensor]] = []

    def place(self, tensor: Tensor) -> int:
        offset = -(-self.size // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        self._placed.append((offset, tensor))
        self.size = offset + tensor.nbytes
        return offset

    def chunks(self) -> Iterator[bytes | memoryview]:
        position = 0
        for offset, tensor in self._placed:
            yield b"\0" * (offset - position)
            yield bytes_of(tensor.detach().contiguous())
            position = offset + tensor.nbytes


def _describe(delta: Delta, body: _Body) -> dict[str, Any]:
    described: dict[str, Any] = {"kind": type(delta).__name__}
    for field in fields(delta):
        value = getattr(delta, field.name)
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            value = {"at": body.place(value), "shape": list(value.shape), "dtype": dtype}
        elif isinstance(value, LowRank):
            value = _describe(value, body)
        described[field.name] = value
    return described


def _rebuild(described: dict[str, Any], body: Tensor) -> Any:
    values: dict[str, Any] = {}
    for key, value in described.items():
        if key == "kind":
            continue
        if isinstance(value, dict):
            value = _rebuild(value, body) if "kind" in value else _view(value, body)
        values[key] = value
    return KINDS[described["kind"]](**values)


def _view(place: dict[str, Any], body: Tensor) -> Tensor:
    dtype, shape = dtype_named(place["dtype"]), torch.Size(place["shape"])
    size = shape.numel() * dtype.itemsize
    return body[place["at"] : place["at"] + size].view(dtype).view(shape)


def _body_start(table_size: int) -> int:
    return -(-(PREAMBLE.size + table_size) // BODY_ALIGNMENT) * BODY_ALIGNMENT


def _fill(file: FileIO, body: Tensor, path: Path) -> None:
    """Read the body; one call, more only where the system returns less than asked."""
    view, filled = bytes_of(body), 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise DamagedCanonicalFile(path.stem)
        filled += count
