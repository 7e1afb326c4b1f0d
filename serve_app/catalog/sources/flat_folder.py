"""Adapters as single files in local folders, as A1111 and ComfyUI keep them: `<root>/<any>/<name>.safetensors`.

Owns the way from a name, which is a file's path below its root without the ending, to the file and its sidecars.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.picture_file import PREVIEW_ENDINGS
from serve_app.catalog.reading.repository import FLAT, RepositoryFile, RepositoryListing, is_valid_name
from serve_app.catalog.reading.selection import EMBEDDING_SUFFIXES, SAFE_SUFFIX
from serve_app.catalog.reading.sidecars import CIVITAI_SUFFIX, WEBUI_SUFFIX
from serve_app.catalog.sources.file_digests import FileDigests, mark_of
from serve_app.catalog.sources.folder import FolderSource

_TOKEN_ENDINGS = ("_emb.safetensors", "_embeddings.safetensors")
# An adapter file, its tokens, its sidecars and its picture.
ENDINGS = (SAFE_SUFFIX, *_TOKEN_ENDINGS, WEBUI_SUFFIX, CIVITAI_SUFFIX, *PREVIEW_ENDINGS)


@dataclass(frozen=True, slots=True)
class FlatRoot:
    """A folder, and how many folders may lie between it and a file; None for any number."""

    path: Path
    max_folders: int | None = None


class FlatFolderSource(FolderSource):
    """The adapter files in some root folders; the first root that has a name is used."""

    def __init__(self, roots: Sequence[FlatRoot], *, digests: FileDigests) -> None:
        super().__init__(tuple(root.path for root in roots), origin=FLAT, digests=digests)
        self._max_folders = [root.max_folders for root in roots]

    async def ids(self) -> tuple[str, ...]:
        """Return nothing: the digest of each file takes a while, so that `marks` has them."""
        return ()

    async def marks(self) -> Mapping[str, str]:
        """Return the name of every adapter file, with a mark that changes with the file and its sidecars."""
        return await run_blocking(lambda: dict(self._marks()))

    def _find(self, model: str, revision: str | None) -> RepositoryListing | None:
        if self._folder(model) is None:
            return None
        stem = PurePosixPath(model).name
        names = [stem + ending for ending in (SAFE_SUFFIX, *_TOKEN_ENDINGS, *PREVIEW_ENDINGS)]
        found = {name: path for name in names if (path := self._file(model, name)) is not None}
        files = tuple(RepositoryFile(name, path.stat().st_size) for name, path in found.items())
        return RepositoryListing(model, self.origin, model, revision, files, self._card(model))

    def _card(self, model: str) -> Card:
        return self._sidecar_card(model, PurePosixPath(model).name)

    def _folder(self, model: str) -> Path | None:
        """Return the folder in which the file of that name lies."""
        if not is_valid_name(model):
            return None
        for root, max_folders in zip(self._roots, self._max_folders, strict=True):
            path = Path(os.path.realpath(root / f"{model}{SAFE_SUFFIX}"))
            is_near = max_folders is None or model.count("/") <= max_folders
            if is_near and self._is_inside(path) and path.is_file():
                return (root / model).parent
        return None

    def _marks(self) -> Iterator[tuple[str, str]]:
        for root, max_folders in reversed(list(zip(self._roots, self._max_folders, strict=True))):
            for parent, folders, names in os.walk(root):
                depth = len(Path(parent).relative_to(root).parts)
                is_deepest = max_folders is not None and depth >= max_folders
                folders[:] = [] if is_deepest else [name for name in folders if not name.startswith(".")]
                stems = [name.removesuffix(SAFE_SUFFIX) for name in names if is_adapter(name)]
                beside = frozenset(names)
                for stem in stems:
                    with suppress(FileNotFoundError):  # gone, or a link to nothing
                        yield Path(parent, stem).relative_to(root).as_posix(), _mark(Path(parent), stem, beside)


def is_adapter(name: str) -> bool:
    """Say whether a file is an adapter by its name alone."""
    return name.endswith(SAFE_SUFFIX) and not name.endswith(EMBEDDING_SUFFIXES)


def _mark(folder: Path, stem: str, names: frozenset[str]) -> str:
    """Return what changes with an adapter file, its tokens or its sidecars."""
    return " ".join(mark_of(folder / name) for ending in ENDINGS if (name := stem + ending) in names)
