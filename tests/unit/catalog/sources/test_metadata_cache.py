from __future__ import annotations

from pathlib import Path

from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.repository import RepositoryListing
from serve_app.catalog.sources.metadata_cache import MetadataCache


def test_the_newest_is_remembered_and_the_oldest_forgotten_over_the_limit(tmp_path: Path) -> None:
    memory = MetadataCache(tmp_path, max_bytes=250, look_after_bytes=100)
    for number in range(5):
        memory.put_header("me/sketch", f"{number}" * 40, "weights.safetensors", b"x" * 100)
    found = [memory.get_header("me/sketch", f"{number}" * 40, "weights.safetensors") for number in range(5)]
    assert [content is not None for content in found] == [False, False, False, True, True]


def test_a_memory_that_cannot_write_remembers_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "listings").write_text("a file where a folder should be")
    memory = MetadataCache(tmp_path)
    memory.put(RepositoryListing("me/sketch", "hub", "me/sketch", "c" * 40, (), Card()), None)
    assert memory.get("me/sketch", None) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["listings"]
