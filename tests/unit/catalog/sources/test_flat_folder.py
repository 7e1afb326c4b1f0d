from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from serve_app.catalog.sources.file_digests import FileDigests
from serve_app.catalog.sources.flat_folder import FlatFolderSource, FlatRoot
from serve_app.core import AdapterSpec
from serve_app.errors import ModelNotFound
from serve_app.refusals import MalformedFile
from tests.unit.catalog.builders import lora, write_files


class CountedDigests(FileDigests):
    """Counts the files that are read."""

    def __init__(self, kept_in: Path | None = None) -> None:
        super().__init__(kept_in)
        self.read: list[str] = []

    def _write(self, path: Path, mark: str, digest: str) -> None:
        self.read.append(path.name)
        super()._write(path, mark, digest)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    sidecar = {"activation text": "inkwash", "preferred weight": 0.7, "sd version": "SD1"}
    write_files(
        tmp_path / "Lora",
        {
            "top.safetensors": lora(),
            "styles/Ink Wash v1.0 (final).safetensors": lora(rank=8),
            "styles/Ink Wash v1.0 (final).json": json.dumps(sidecar).encode(),
            "styles/deep/er/würfel.safetensors": lora(),
            "styles/words_emb.safetensors": lora(),
            "styles/notes.txt": b"x",
            ".hidden/no.safetensors": lora(),
        },
    )
    write_files(tmp_path, {"outside.safetensors": lora()})
    return tmp_path / "Lora"


def source(*roots: Path, digests: FileDigests | None = None, max_folders: int | None = None) -> FlatFolderSource:
    return FlatFolderSource([FlatRoot(root, max_folders) for root in roots], digests=digests or FileDigests())


INK = "styles/Ink Wash v1.0 (final)"


async def spec_of(flat: FlatFolderSource, model: str) -> AdapterSpec:
    listing = await flat.find(model, None)
    assert listing is not None
    filename = listing.files[0].name
    revision = await flat.resolve_revision(listing, filename)
    return AdapterSpec(model, "demo/sd", revision, filename, "flat", listing.location, 0)


async def test_each_file_is_an_adapter_by_its_path_without_the_ending(root: Path):
    flat = source(root)
    assert set(await flat.marks()) == {"top", INK, "styles/deep/er/würfel"}
    for model in await flat.marks():
        spec = await spec_of(flat, model)
        assert await flat.download(spec) == root / f"{model}.safetensors"


async def test_sidecars_say_what_a_card_would(root: Path):
    listing = await source(root).find(INK, None)
    assert listing is not None
    assert (listing.card.defaults.trigger_words, listing.card.defaults.scale) == ("inkwash", 0.7)
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in listing.card.base_hints


async def test_above_repositories_only_the_files_are_names(root: Path):
    flat = source(root, max_folders=1)
    assert set(await flat.marks()) == {"top", INK}
    assert await flat.find("styles/deep/er/würfel", None) is None


@pytest.mark.parametrize(
    "model",
    [
        "missing",
        "../outside",
        "styles/../top",
        "/top",
        "",
        "styles",
        "top/",
        "styles//x",
        ".hidden/no",
        " top",
        "to\np",
    ],
)
async def test_a_name_that_is_not_there_or_climbs_finds_nothing(root: Path, model: str):
    assert await source(root).find(model, None) is None


async def test_a_link_that_leads_out_of_the_root_is_refused_and_one_within_is_followed(root: Path):
    os.symlink(root.parent / "outside.safetensors", root / "out.safetensors")
    os.symlink(root / "top.safetensors", root / "in.safetensors")
    os.symlink(root / "nothing", root / "broken.safetensors")
    flat = source(root)
    assert await flat.find("out", None) is None
    assert await flat.find("in", None) is not None
    assert "broken" not in await flat.marks()


async def test_the_tokens_beside_a_file_belong_to_it(root: Path):
    write_files(root, {"top_emb.safetensors": lora()})
    listing = await source(root).find("top", None)
    assert listing is not None
    assert [file.name for file in listing.files] == ["top.safetensors", "top_emb.safetensors"]
    assert "top_emb" not in await source(root).marks()


async def test_the_first_root_that_has_a_name_wins_with_its_own_sidecars(root: Path, tmp_path: Path):
    other = write_files(tmp_path / "other", {"top.safetensors": lora(rank=2), f"{INK}.json": b"{}"})
    flat = source(other, root)
    assert await flat.download(await spec_of(flat, "top")) == other / "top.safetensors"
    listing = await flat.find(INK, None)
    assert listing is not None
    assert listing.card.defaults.scale == 0.7


async def test_a_mark_changes_with_the_file_and_with_its_sidecars(root: Path):
    flat = source(root)
    seen = [(await flat.marks())[INK]]
    for change in ({f"{INK}.json": b'{"preferred weight": 1}'}, {f"{INK}.safetensors": lora(rank=2)}):
        write_files(root, change)
        seen.append((await flat.marks())[INK])
    (root / f"{INK}.json").unlink()
    seen.append((await flat.marks())[INK])
    assert len(set(seen)) == 4
    (root / f"{INK}.safetensors").unlink()
    assert INK not in await flat.marks()


async def test_listing_reads_no_file_and_a_digest_is_computed_when_first_asked_for(root: Path, tmp_path: Path):
    digests = CountedDigests(tmp_path / "cache" / "digests.sqlite3")
    flat = source(root, digests=digests)
    await flat.marks()
    assert digests.read == []
    before = await spec_of(flat, "top")
    await flat.download(before)
    assert digests.read == ["top.safetensors"]
    again = CountedDigests(tmp_path / "cache" / "digests.sqlite3")
    assert await spec_of(source(root, digests=again), "top") == before
    assert again.read == []
    (root / "top.safetensors").write_bytes(lora(rank=2))
    with pytest.raises(MalformedFile, match="changed"):
        await flat.download(before)
    assert (await spec_of(source(root, digests=again), "top")).revision != before.revision


async def test_a_damaged_file_of_digests_costs_reading_again_and_nothing_else(root: Path, tmp_path: Path):
    (tmp_path / "digests.sqlite3").write_bytes(b"not a database" * 100)
    digests = CountedDigests(tmp_path / "digests.sqlite3")
    flat = source(root, digests=digests)
    spec = await spec_of(flat, "top")
    assert await flat.download(spec) == root / "top.safetensors"
    assert digests.read == ["top.safetensors"]


async def test_a_revision_is_the_beginning_of_the_digest(root: Path):
    flat = source(root)
    revision = (await spec_of(flat, "top")).revision
    for asked, is_there in ((revision[:8], True), ("v2", False)):
        listing = await flat.find("top", asked)
        assert listing is not None
        if is_there:
            assert await flat.resolve_revision(listing, "top.safetensors") == revision
        else:
            with pytest.raises(ModelNotFound, match="newest only"):
                await flat.resolve_revision(listing, "top.safetensors")
