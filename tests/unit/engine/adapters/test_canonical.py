"""The canonical file gives back what was written, or says that it is damaged."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.engine.adapters.canonical import (
    PIECE_BYTES,
    DamagedCanonicalFile,
    read_canonical,
    reader_version,
    write_canonical,
)
from serve_app.engine.adapters.deltas import Coverage, Delta, Dense, LowRank, ParsedAdapter, tensors_of
from serve_app.engine.adapters.host_buffer import HostBuffers
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import manifest_of
from serve_app.settings import AdapterLimits
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import everything, full, loha, lokr, lora
from tests.tiny_forms import Form, output_projection, put, with_text

FORMS = {
    "lora": lambda pipe: lora(pipe, chooses=everything),
    "text": lambda pipe: with_text(pipe, seed=1),
    "dora": lambda pipe: lora(pipe, dora=True),
    "bias": lambda pipe: lora(pipe, chooses=output_projection, bias=True),
    "loha": loha,
    "lokr": lokr,
    "full": full,
}


def adapter(folder: Path, form: str, dtype: torch.dtype = torch.bfloat16) -> ParsedAdapter:
    pipeline = tiny_pipeline("sd15", dtype)
    return parse_adapter(put(folder, form, Form(FORMS[form](pipeline))), form, manifest_of(pipeline), AdapterLimits())


def assert_same(first: Delta, second: Delta) -> None:
    assert type(first) is type(second)
    for part in fields(first):
        mine, other = getattr(first, part.name), getattr(second, part.name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other)
        elif isinstance(mine, LowRank):
            assert_same(mine, other)
        else:
            assert mine == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_comes_back_to_the_bit(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    written = adapter(tmp_path, form, dtype)
    write_canonical(written, tmp_path / "canonical")
    back = read_canonical(tmp_path / "canonical")
    assert (back.digest, back.coverage, back.size_bytes) == (written.digest, written.coverage, written.size_bytes)
    expected, found = ({place[:2]: place[2] for place in one.layers()} for one in (written, back))
    assert found.keys() == expected.keys()
    for place, mine in expected.items():
        assert_same(mine, found[place])


def test_tensors_share_one_buffer_and_are_aligned(tmp_path: Path) -> None:
    write_canonical(adapter(tmp_path, "text"), tmp_path / "canonical")
    tensors = [
        tensor for _, _, delta in read_canonical(tmp_path / "canonical").layers() for tensor in tensors_of(delta)
    ]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all((tensor.storage_offset() * tensor.itemsize) % 64 == 0 for tensor in tensors)


class Copies(TorchDispatchMode):
    """Refuses to copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation that only looks at memory."""
        assert func.overloadpacket.__name__ not in ("copy_", "_to_copy", "clone", "cat")
        return func(*args, **(kwargs or {}))


class Takes(HostBuffers):
    """Remembers what was taken."""

    taken = 0

    def take(self, size_bytes: int, *, pinned: bool = False) -> torch.Tensor:
        """Count, and take."""
        self.taken += 1
        return super().take(size_bytes, pinned=pinned)


def test_a_file_is_read_into_one_allocation_and_copied_no_further(tmp_path: Path) -> None:
    write_canonical(adapter(tmp_path, "text"), tmp_path / "canonical")
    buffers = Takes()
    with Copies():
        read_canonical(tmp_path / "canonical", buffers=buffers)
    assert buffers.taken == 1


def test_reading_twice_gives_two_buffers(tmp_path: Path) -> None:
    write_canonical(adapter(tmp_path, "lora"), tmp_path / "canonical")
    first, second = (read_canonical(tmp_path / "canonical") for _ in range(2))
    for _, _, delta in first.layers():
        next(tensors_of(delta)).zero_()
    assert any(next(tensors_of(delta)).any() for _, _, delta in second.layers())


@pytest.mark.parametrize("size", [0, 10, 100, 5000, -1])
def test_a_cut_file_is_said_to_be_damaged(size: int, tmp_path: Path) -> None:
    path = tmp_path / "canonical"
    write_canonical(adapter(tmp_path, "lora"), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedCanonicalFile):
        read_canonical(path)


def test_a_flipped_bit_anywhere_is_said_to_be_damage(tmp_path: Path) -> None:
    """Magic, sizes, table, padding, tensors and checksum alike; never another error, never another adapter."""
    path, chance = tmp_path / "canonical", random.Random(0)
    write_canonical(adapter(tmp_path, "text"), path)
    whole = path.read_bytes()
    table_bits = range(8 * 4096)
    places = [*range(8 * 24), *chance.sample(table_bits, 200), *chance.sample(range(8 * len(whole)), 300)]
    for bit in [*places, 8 * len(whole) - 1]:
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises(DamagedCanonicalFile) as damage:
            read_canonical(path)
        assert isinstance(damage.value, ValueError)


def in_pieces(path: Path) -> bytes:
    """Write a file whose body has two whole pieces and a short one."""
    weight = torch.randn(2 * PIECE_BYTES // 4 + 1000)
    write_canonical(ParsedAdapter("digest", {"unet": {"layer": Dense(weight, None)}}, Coverage(1, 1)), path)
    assert torch.equal(next(tensors_of(next(read_canonical(path).layers())[2])), weight)
    return path.read_bytes()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_damage_in_any_piece_is_found(place: int, tmp_path: Path) -> None:
    path = tmp_path / "canonical"
    altered = bytearray(in_pieces(path))
    altered[4096 + place * PIECE_BYTES + 100] ^= 1
    path.write_bytes(altered)
    with pytest.raises(DamagedCanonicalFile):
        read_canonical(path)


def test_pieces_that_changed_places_are_said_to_be_damage(tmp_path: Path) -> None:
    path = tmp_path / "canonical"
    whole = in_pieces(path)
    middle, end = 4096 + PIECE_BYTES, 4096 + 2 * PIECE_BYTES
    path.write_bytes(whole[:4096] + whole[middle:end] + whole[4096:middle] + whole[end:])
    with pytest.raises(DamagedCanonicalFile):
        read_canonical(path)


def test_a_large_adapter_lies_in_memory_that_can_be_written_and_sent_on(tmp_path: Path) -> None:
    weight = torch.randn(1500, 1000)
    write_canonical(ParsedAdapter("digest", {"unet": {"layer": Dense(weight)}}, Coverage(1, 1)), tmp_path / "canonical")
    back = read_canonical(tmp_path / "canonical").components["unet"]["layer"]
    assert isinstance(back, Dense)
    assert torch.equal(back.weight.clone().add_(1), weight + 1)
    assert torch.equal(back.weight, weight)


def test_a_file_of_another_kind_is_said_to_be_damaged(tmp_path: Path) -> None:
    path = put(tmp_path, "adapter", Form(lora(tiny_pipeline("sd15"))))
    with pytest.raises(DamagedCanonicalFile):
        read_canonical(path)


def test_nothing_is_left_behind_where_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "a-folder"
    target.mkdir()
    (target / "occupied").touch()
    with pytest.raises(OSError, match="directory"):
        write_canonical(adapter(tmp_path, "lora"), target)
    assert {path.name for path in tmp_path.iterdir()} == {"a-folder", "lora.safetensors"}


def test_exchanged_pages_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "canonical"
    write_canonical(_large(), path)
    content = bytearray(path.read_bytes())
    body, page = 4096, 4096
    first, second = content[body : body + page], content[body + page : body + 2 * page]
    assert first != second
    content[body : body + 2 * page] = second + first
    path.write_bytes(content)
    with pytest.raises(DamagedCanonicalFile):
        read_canonical(path)


def _large() -> ParsedAdapter:
    delta = LowRank(torch.randn(8, 1024), torch.randn(1024, 8), 8.0, 8.0)
    return ParsedAdapter("0" * 64, {"unet": {"layer": delta}}, Coverage(1, 1))


def test_the_reader_version_is_a_digest_of_what_decides() -> None:
    assert reader_version() == reader_version()
    assert len(reader_version()) == 64
