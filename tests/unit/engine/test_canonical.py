"""The canonical file gives back what was written, or says that it is damaged."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from serve_app.config import AdapterLimits
from serve_app.engine.adapter import Delta, LowRank, ParsedAdapter, tensors_of
from serve_app.engine.canonical import DamagedCanonicalFile, read_canonical, write_canonical
from serve_app.engine.manifest import manifest_of
from serve_app.engine.reader import read_adapter
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import everything, loha, lokr, lora
from tests.tiny_forms import Form, output_projection, put, with_text

FORMS = {
    "lora": lambda pipe: lora(pipe, chooses=everything),
    "text": lambda pipe: with_text(pipe, seed=1),
    "dora": lambda pipe: lora(pipe, dora=True),
    "bias": lambda pipe: lora(pipe, chooses=output_projection, bias=True),
    "loha": loha,
    "lokr": lokr,
}


def adapter(folder: Path, form: str, dtype: torch.dtype = torch.bfloat16) -> ParsedAdapter:
    pipeline = tiny_pipeline("sd15", dtype)
    return read_adapter(put(folder, form, Form(FORMS[form](pipeline))), form, manifest_of(pipeline), AdapterLimits())


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
    assert [place[:2] for place in back.layers()] == [place[:2] for place in written.layers()]
    for (_, _, mine), (_, _, other) in zip(written.layers(), back.layers(), strict=True):
        assert_same(mine, other)


def test_tensors_share_one_buffer_and_are_aligned(tmp_path: Path) -> None:
    write_canonical(adapter(tmp_path, "text"), tmp_path / "canonical")
    tensors = [
        tensor for _, _, delta in read_canonical(tmp_path / "canonical").layers() for tensor in tensors_of(delta)
    ]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all((tensor.storage_offset() * tensor.itemsize) % 64 == 0 for tensor in tensors)


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
