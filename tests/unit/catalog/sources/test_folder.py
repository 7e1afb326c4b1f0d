from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from serve_app.catalog.sources.folder import FolderSource
from serve_app.core import AdapterSpec
from serve_app.errors import ModelNotFound
from serve_app.refusals import MalformedFile
from tests.unit.catalog.builders import WEIGHTS, adapter_files, lora, write_files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_files(tmp_path / "root" / "me" / "sketch", adapter_files("demo/sd"))
    write_files(tmp_path / "outside" / "secret", adapter_files("demo/sd"))
    return tmp_path / "root"


async def spec_of(folder: FolderSource, model: str) -> AdapterSpec:
    listing = await folder.find(model, None)
    if listing is None:
        raise ModelNotFound(model)
    revision = await folder.resolve_revision(listing, WEIGHTS)
    return AdapterSpec(model, "demo/sd", revision, WEIGHTS, "folder", listing.location, 0)


async def test_a_repository_is_found_with_its_card_and_files(root: Path):
    listing = await FolderSource((root,)).find("me/sketch", None)
    assert listing is not None
    assert listing.card.base_models == ("demo/sd",)
    assert {file.name for file in listing.files} == {"README.md", WEIGHTS}
    assert listing.file(WEIGHTS).size_bytes == len(lora())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "model",
    ["me/missing", "missing/sketch", "../outside/secret", "me/../me/sketch", "/etc/passwd", "me", "me/sketch/x", ""],
)
async def test_an_id_that_is_not_there_or_climbs_finds_nothing(root: Path, model: str):
    assert await FolderSource((root,)).find(model, None) is None


async def test_a_link_that_leads_out_of_the_root_is_refused(root: Path):
    os.symlink(root.parent / "outside" / "secret", root / "me" / "linked")
    folder = FolderSource((root,))
    assert await folder.find("me/linked", None) is None
    (root / "me" / "sketch" / WEIGHTS).unlink()
    os.symlink(root.parent / "outside" / "secret" / WEIGHTS, root / "me" / "sketch" / WEIGHTS)
    listing = await folder.find("me/sketch", None)
    assert listing is not None
    assert listing.file(WEIGHTS) is None
    with pytest.raises(ModelNotFound):
        await folder.header(listing, WEIGHTS)


async def test_a_link_within_the_root_is_followed(root: Path):
    os.symlink(root / "me" / "sketch", root / "me" / "alias")
    listing = await FolderSource((root,)).find("me/alias", None)
    assert listing is not None
    assert listing.file(WEIGHTS) is not None


async def test_the_revision_is_the_digest_of_the_weights_and_changes_with_them(root: Path):
    folder = FolderSource((root,))
    before = await spec_of(folder, "me/sketch")
    assert len(before.revision) == 40
    assert await folder.download(before) == root / "me" / "sketch" / WEIGHTS
    (root / "me" / "sketch" / WEIGHTS).write_bytes(lora(rank=8))
    after = await spec_of(folder, "me/sketch")
    assert after.revision != before.revision
    with pytest.raises(MalformedFile, match="changed"):
        await folder.download(before)


async def test_a_revision_that_the_folder_does_not_hold_is_not_found(root: Path):
    folder = FolderSource((root,))
    revision = (await spec_of(folder, "me/sketch")).revision
    for asked in (revision, revision[:12], "main"):
        listing = await folder.find("me/sketch", asked)
        assert listing is not None
        assert await folder.resolve_revision(listing, WEIGHTS) == revision
    listing = await folder.find("me/sketch", "v2")
    assert listing is not None
    with pytest.raises(ModelNotFound, match="v2"):
        await folder.resolve_revision(listing, WEIGHTS)


async def test_a_file_that_is_gone_is_not_found(root: Path):
    folder = FolderSource((root,))
    spec = await spec_of(folder, "me/sketch")
    (root / "me" / "sketch" / WEIGHTS).unlink()
    with pytest.raises(ModelNotFound):
        await folder.download(spec)


async def test_the_first_root_that_has_an_id_wins(root: Path, tmp_path: Path):
    other = tmp_path / "other"
    write_files(other / "me" / "sketch", adapter_files("big"))
    listing = await FolderSource((other, root)).find("me/sketch", None)
    assert listing is not None
    assert listing.card.base_models == ("big",)


async def test_ids_are_listed_and_missing_roots_are_empty(root: Path, tmp_path: Path):
    (root / "stray.txt").write_text("not a folder")
    assert await FolderSource((tmp_path / "missing", root)).ids() == ("me/sketch",)


async def test_a_truncated_file_is_malformed_and_no_path_is_told(root: Path):
    (root / "me" / "sketch" / WEIGHTS).write_bytes(lora()[:-3])
    folder = FolderSource((root,))
    listing = await folder.find("me/sketch", None)
    assert listing is not None
    with pytest.raises(MalformedFile, match="truncated") as refusal:
        await folder.header(listing, WEIGHTS)
    assert str(root) not in str(refusal.value)


async def test_a_repository_that_is_moved_away_while_it_is_read_is_not_found_or_is_whole(root: Path, tmp_path: Path):
    folder = FolderSource((root,))
    there, away = root / "me", tmp_path / "away"
    is_over = threading.Event()

    def move() -> None:
        while not is_over.is_set():
            there.rename(away)
            away.rename(there)

    async def is_whole() -> bool:
        await folder.ids()
        try:
            await folder.read_small("me/sketch", None, "README.md")
            listing = await folder.find("me/sketch", None)
            if listing is None or listing.file(WEIGHTS) is None:
                return False
            await folder.header(listing, WEIGHTS)
            path = await folder.download(await spec_of(folder, "me/sketch"))
        except (ModelNotFound, MalformedFile):
            return False
        return path.name == WEIGHTS

    mover = threading.Thread(target=move)
    mover.start()
    try:
        for _ in range(150):
            await is_whole()
    finally:
        is_over.set()
        mover.join()
    assert await is_whole()
