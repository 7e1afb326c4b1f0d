"""Digests of a base's files: those of their bytes, worked out again when a file is another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from serve_app.engine.base.digests import FileDigests


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"first")
    return path


def test_a_file_that_is_the_same_is_not_read_again(file: Path, tmp_path: Path) -> None:
    assert FileDigests(tmp_path / "kept").of(file) == sha256(b"first")
    (note,) = (tmp_path / "kept").iterdir()
    note.write_text(note.read_text().replace(sha256(b"first"), sha256(b"kept")))
    assert FileDigests(tmp_path / "kept").of(file) == sha256(b"kept")


def test_a_file_of_the_same_size_and_time_with_other_bytes_is_read_again(file: Path, tmp_path: Path) -> None:
    digests, before = FileDigests(tmp_path / "kept"), file.stat()
    digests.of(file)
    file.write_bytes(b"other")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.of(file) == sha256(b"other")


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"sha256": 3}'])
def test_a_damaged_note_is_no_matter(file: Path, tmp_path: Path, damage: str) -> None:
    digests = FileDigests(tmp_path / "kept")
    digests.of(file)
    for note in (tmp_path / "kept").iterdir():
        note.write_text(damage)
    assert digests.of(file) == sha256(b"first")


def test_a_folder_that_cannot_be_written_is_no_matter(file: Path) -> None:
    assert FileDigests(file / "no folder").of(file) == sha256(b"first")
    assert FileDigests(None).of(file) == sha256(b"first")
