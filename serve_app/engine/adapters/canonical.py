"""The canonical form of an admitted adapter: one flat aligned body and a table, read back in one pass.

Owns the layout and its integrity: a preamble (magic, table length, body length), a JSON table, at the next page a
body in which every tensor is aligned and layers that are alike lie together, and an XXH3 checksum of what comes before
the body and of the checksums of its pieces, which several threads read. Files are this service's own, written after
admission; one that is damaged anywhere is recognised, so that the adapter can be admitted again.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from serve_app.engine.adapters.deltas import (
    Coverage,
    Delta,
    Dense,
    Direction,
    Dora,
    Hadamard,
    Kronecker,
    LowRank,
    LowRankStack,
    ParsedAdapter,
    StackedLayers,
    bytes_of,
    dtype_named,
)
from serve_app.engine.adapters.host_buffer import HostBuffers
from serve_app.engine.adapters.stacks import memory_of, row_stride, rows_of, stack_layers
from serve_app.errors import LoraplexError
from serve_app.families import spellings

MAGIC = b"LPXADPT5"
PREAMBLE = struct.Struct("<8sQQ")
TENSOR_ALIGNMENT = 64
BODY_ALIGNMENT = 4096
# A piece has a checksum of its own, and a chunk is small enough to be in the cache still when it is added to that.
PIECE_BYTES = 4 * 1024**2
CHUNK_BYTES = 1024**2
CHECKSUM_BYTES = 16
# Reading is copying and checksums, which hold no lock of Python's. More threads than these were not tried.
_READERS = ThreadPoolExecutor(4, "canonical-file")
KINDS: dict[str, type[Delta]] = {kind.__name__: kind for kind in (LowRank, Dora, Hadamard, Kronecker, Dense)}


@dataclass(eq=False)
class DamagedCanonicalFile(LoraplexError, ValueError):
    """A canonical file is cut short, altered or not ours; admit its source again."""

    digest: str
    code = "damaged_canonical_file"
    template = "a prepared adapter file is damaged ({digest})"


def reader_version() -> str:
    """Return what tells readers apart: a digest of the code that decides what a file becomes, and diffusers' version.

    Files that another reader admitted are admitted again.
    """
    digest = hashlib.sha256(version("diffusers").encode())
    for folder in (Path(__file__).parent, Path(spellings.__file__).parent):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def write_canonical(adapter: ParsedAdapter, path: Path) -> None:
    """Write an adapter so that it appears under `path` whole or not at all.

    Does not wait for the disk: the checksum shows a file torn by a crash of the machine, and the source is admitted
    again.
    """
    body = _Body()
    table = json.dumps(_table_of(adapter, body), separators=(",", ":")).encode()
    head = PREAMBLE.pack(MAGIC, len(table), body.size) + table
    head += b"\0" * (_body_start(len(table)) - len(head))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    pieces = _PieceChecksums()
    try:
        with partial.open("wb") as file:
            file.write(head)
            for chunk in body.chunks():
                pieces.update(chunk)
                file.write(chunk)
            file.write(_checksum(head, pieces.digests()))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_canonical(path: Path, *, pinned: bool = False, buffers: HostBuffers | None = None) -> ParsedAdapter:
    """Read a canonical file; its tensors are views of one host buffer, page-locked where `pinned`.

    Memory comes from `buffers`, where there are some, and goes back there.

    Raises:
        DamagedCanonicalFile: the file is cut short, altered anywhere, or not one of ours.
    """
    with path.open("rb", buffering=0) as file:
        head, table_size, body_size = _read_head(file, path)
        body = (buffers or HostBuffers(0)).take(body_size, pinned=pinned)
        digests = _fill(file, body, path)
        file.seek(-CHECKSUM_BYTES, os.SEEK_END)
        if file.read(CHECKSUM_BYTES) != _checksum(head, digests):
            raise DamagedCanonicalFile(path.stem)
    table = json.loads(head[PREAMBLE.size : PREAMBLE.size + table_size])
    matched, in_file, unmatched, ranks = table["coverage"]
    return ParsedAdapter(
        digest=table["digest"],
        components=StackedLayers(
            table["components"],
            [_stack(*described, body) for described in table["stacks"]],
            [(component, module, _rebuild(described, body)) for component, module, described in table["singles"]],
        ),
        coverage=Coverage(matched, in_file, tuple(unmatched), (ranks[0], ranks[1])),
        # Copied, so that keeping the few words alone does not keep the whole buffer alive.
        ti_tokens={component: _view(place, body).clone() for component, place in table["words"].items()},
    )


def _table_of(adapter: ParsedAdapter, body: _Body) -> dict[str, Any]:
    coverage, layers = adapter.coverage, stack_layers(adapter.components)
    return {
        "digest": adapter.digest,
        "coverage": [coverage.layers_matched, coverage.layers_in_file, coverage.unmatched, coverage.ranks],
        "components": list(layers),
        "stacks": [_describe_stack(stack, body) for stack in layers.stacks],
        "singles": [[component, module, _describe(delta, body)] for component, module, delta in layers.singles],
        "words": {component: _place(rows, body) for component, rows in adapter.ti_tokens.items()},
    }


class _Body:
    """Places tensors one after another, aligned; its size is a multiple of the alignment."""

    def __init__(self) -> None:
        self.size = 0
        self._placed: list[tuple[int, Tensor]] = []

    def place(self, tensor: Tensor) -> int:
        offset = self.size
        self._placed.append((offset, tensor))
        self.size = -(-(offset + tensor.nbytes) // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        return offset

    def chunks(self) -> Iterator[bytes | memoryview]:
        position = 0
        for offset, tensor in self._placed:
            if offset > position:
                yield b"\0" * (offset - position)
            yield bytes_of(tensor.detach().contiguous())
            position = offset + tensor.nbytes
        yield b"\0" * (self.size - position)


def _describe_stack(stack: LowRankStack, body: _Body) -> list[Any]:
    """Place a stack's matrices one after another, and say what `_stack` takes."""
    places = [_place(memory_of(rows), body) | {"shape": list(rows.shape)} for rows in (stack.downs, stack.ups)]
    return [stack.component, stack.modules, *places, stack.alpha, stack.divisor]


def _stack(component: str, modules: list[str], downs: dict[str, Any], ups: dict[str, Any], *rest: Any) -> LowRankStack:
    alpha, divisor, body = rest
    return LowRankStack(component, tuple(modules), _rows(downs, body), _rows(ups, body), alpha, divisor)


def _rows(place: dict[str, Any], body: Tensor) -> Tensor:
    count, *shape = place["shape"]
    dtype = dtype_named(place["dtype"])
    size = count * row_stride(shape, dtype) * dtype.itemsize
    return rows_of(body[place["at"] : place["at"] + size].view(dtype), count, shape)


def _describe(delta: Delta, body: _Body) -> dict[str, Any]:
    described: dict[str, Any] = {"kind": type(delta).__name__}
    for field in fields(delta):
        value = getattr(delta, field.name)
        if isinstance(value, Tensor):
            value = _place(value, body)
        elif isinstance(value, Direction):
            value = _describe(value, body)
        described[field.name] = value
    return described


def _place(tensor: Tensor, body: _Body) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"at": body.place(tensor), "shape": list(tensor.shape), "dtype": dtype}


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


def _read_head(file: FileIO, path: Path) -> tuple[bytes, int, int]:
    """Return everything before the body, and the sizes of table and body, which fit the file's own."""
    preamble = file.read(PREAMBLE.size)
    if len(preamble) < PREAMBLE.size or not preamble.startswith(MAGIC):
        raise DamagedCanonicalFile(path.stem)
    _, table_size, body_size = PREAMBLE.unpack(preamble)
    start = _body_start(table_size)
    if os.fstat(file.fileno()).st_size != start + body_size + CHECKSUM_BYTES or body_size % TENSOR_ALIGNMENT:
        raise DamagedCanonicalFile(path.stem)
    head = preamble
    while len(head) < start:
        part = file.read(start - len(head))
        if not part:
            raise DamagedCanonicalFile(path.stem)
        head += part
    return head, table_size, body_size


def _fill(file: FileIO, body: Tensor, path: Path) -> list[bytes]:
    """Read the body in pieces, several at a time; returns the checksum of each."""
    view, start = bytes_of(body), file.tell()

    def read(first: int) -> bytes:
        checksum, filled, last = xxhash.xxh3_128(), first, min(first + PIECE_BYTES, len(view))
        while filled < last:
            count = os.preadv(file.fileno(), [view[filled : min(filled + CHUNK_BYTES, last)]], start + filled)
            if not count:
                raise DamagedCanonicalFile(path.stem)
            checksum.update(view[filled : filled + count])
            filled += count
        return checksum.digest()

    # All are waited for, also where one fails: the file is open, and the buffer in use, until none reads any more.
    readings = [_READERS.submit(read, first) for first in range(0, len(view), PIECE_BYTES)]
    wait(readings)
    return [reading.result() for reading in readings]


def _checksum(head: bytes, pieces: list[bytes]) -> bytes:
    return xxhash.xxh3_128(head + b"".join(pieces)).digest()


class _PieceChecksums:
    """Checksums of the pieces of a body that comes in parts of any length."""

    def __init__(self) -> None:
        self._whole: list[bytes] = []
        self._current, self._left = xxhash.xxh3_128(), PIECE_BYTES

    def update(self, part: bytes | memoryview) -> None:
        view = memoryview(part).cast("B")
        while view:
            self._current.update(view[: self._left])
            taken = min(self._left, len(view))
            view, self._left = view[taken:], self._left - taken
            if not self._left:
                self._whole.append(self._current.digest())
                self._current, self._left = xxhash.xxh3_128(), PIECE_BYTES

    def digests(self) -> list[bytes]:
        return self._whole if self._left == PIECE_BYTES else [*self._whole, self._current.digest()]
