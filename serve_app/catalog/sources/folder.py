"""Repositories in local folders, laid out as on the Hub: `<root>/<owner>/<name>/`.

Owns the way from an id to a file, which never leaves the roots: ids are checked, and links that lead out are refused.
A folder has no commits; the digest of the weights is the revision.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.reading.card import Card, parse_card
from serve_app.catalog.reading.header import MalformedHeader, SafetensorsHeader, read_header
from serve_app.catalog.reading.repository import (
    FOLDER,
    MAX_SMALL_FILE_BYTES,
    AdapterSource,
    RepositoryFile,
    RepositoryListing,
    is_valid_id,
)
from serve_app.catalog.reading.selection import SAFE_SUFFIX
from serve_app.catalog.reading.sidecars import CIVITAI_SUFFIX, WEBUI_SUFFIX, card_from_sidecars
from serve_app.catalog.sources.file_digests import FileDigests
from serve_app.core import AdapterSpec
from serve_app.errors import ModelNotFound
from serve_app.families.spellings import text_folder
from serve_app.refusals import MalformedFile

T = TypeVar("T")

MAX_CARD_BYTES = 256 * 1024
MAX_FILES = 10_000


class FolderSource(AdapterSource):
    """The repositories in some root folders; the first root that has an id is used."""

    def __init__(self, roots: tuple[Path, ...], *, origin: str = FOLDER, digests: FileDigests | None = None) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)
        self._origin = origin
        self._digests = digests or FileDigests()

    @property
    def origin(self) -> str:
        """The kind of source that these roots are."""
        return self._origin

    async def find(self, model: str, revision: str | None) -> RepositoryListing | None:
        """Return the repository of that id, or None."""
        return await _reading(model, lambda: self._find(model, revision))

    async def header(self, listing: RepositoryListing, filename: str) -> SafetensorsHeader:
        """Return the header of a listed file."""
        return await _reading(listing.id, lambda: self._header(listing, filename))

    async def resolve_revision(self, listing: RepositoryListing, *filenames: str) -> str:
        """Return the first 40 hex digits of the file's SHA-256; of several, of the SHA-256 of theirs."""
        return await _reading(listing.id, lambda: self._revision(listing, filenames))

    async def read_small(
        self, model: str, revision: str | None, filename: str, limit_bytes: int = MAX_SMALL_FILE_BYTES
    ) -> bytes | None:
        """Return the first bytes of a file of a repository, or None."""
        return await _reading(model, lambda: self._read_small(model, filename, limit_bytes))

    async def download(self, spec: AdapterSpec, filename: str | None = None) -> Path:
        """Return the file itself, after checking the digest of the spec's files."""
        return await _reading(spec.id, lambda: self._download(spec, filename or spec.filename))

    async def ids(self) -> tuple[str, ...]:
        """Return every id below the roots, sorted."""
        return await run_blocking(lambda: tuple(sorted(set(self._all_ids()))))

    def _folder(self, model: str) -> Path | None:
        if not is_valid_id(model) or "/" not in model:
            return None
        for root in self._roots:
            folder = Path(os.path.realpath(root / model))
            if folder.is_relative_to(root) and folder != root and folder.is_dir():
                return folder
        return None

    def _file(self, model: str, filename: str) -> Path | None:
        folder = self._folder(model)
        if folder is None:
            return None
        path = Path(os.path.realpath(folder / filename))
        return path if self._is_inside(path) and path.is_file() else None

    def _is_inside(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)

    def _find(self, model: str, revision: str | None) -> RepositoryListing | None:
        folder = self._folder(model)
        if folder is None:
            return None
        return RepositoryListing(
            id=model,
            origin=self._origin,
            location=model,
            revision=revision,
            files=tuple(self._files(folder)),
            card=self._card(model),
        )

    def _files(self, folder: Path) -> Iterator[RepositoryFile]:
        listed = 0
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                path = Path(os.path.realpath(os.path.join(parent, name)))
                if not self._is_inside(path) or not path.is_file():
                    continue
                listed += 1
                if listed > MAX_FILES:
                    return
                relative = Path(parent, name).relative_to(folder).as_posix()
                yield RepositoryFile(relative, path.stat().st_size)

    def _card(self, model: str) -> Card:
        path = self._file(model, "README.md")
        if path is None:
            return Card()
        with path.open("rb") as file:
            return parse_card(file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace"))

    def _sidecar_card(self, model: str, stem: str) -> Card:
        """Return what the files beside an adapter file say, `stem` being its name without the ending."""
        return card_from_sidecars(
            webui=self._read_small(model, stem + WEBUI_SUFFIX), civitai=self._read_small(model, stem + CIVITAI_SUFFIX)
        )

    def _listed(self, listing: RepositoryListing, filename: str) -> Path:
        path = self._file(listing.location, filename)
        if path is None:
            raise ModelNotFound(listing.id, f"it holds no file '{filename}'")
        return path

    def _header(self, listing: RepositoryListing, filename: str) -> SafetensorsHeader:
        try:
            return read_header(self._listed(listing, filename))
        except MalformedHeader as error:
            raise MalformedFile(listing.id, f"{filename}: {error}") from None

    def _revision(self, listing: RepositoryListing, filenames: Sequence[str]) -> str:
        digest = self._digests.of([self._listed(listing, filename) for filename in filenames])
        asked = listing.revision
        if asked is not None and asked != "main" and not digest.startswith(asked):
            raise ModelNotFound(listing.id, f"it has no revision '{asked}'; a folder holds its newest only")
        return digest

    def _read_small(self, model: str, filename: str, limit_bytes: int = MAX_SMALL_FILE_BYTES) -> bytes | None:
        path = self._file(model, filename)
        if path is None:
            return None
        with path.open("rb") as file:
            return file.read(limit_bytes)

    def _download(self, spec: AdapterSpec, filename: str) -> Path:
        names = [*spec.files, *filter(None, (spec.embeddings,))]
        paths = {name: path for name in names if (path := self._file(spec.location, name)) is not None}
        if len(paths) < len(names):
            raise ModelNotFound(spec.id, "its folder is no longer there")
        if self._digests.of(list(paths.values())) != spec.revision:
            raise MalformedFile(spec.id, "its file changed after it was looked up; ask again in a few seconds")
        return paths[filename]

    def _all_ids(self) -> Iterator[str]:
        for root in self._roots:
            for owner in _entries(root):
                for repository in _entries(owner):
                    model = f"{owner.name}/{repository.name}"
                    if self._folder(model) is not None:
                        yield model


async def _reading(model: str, read: Callable[[], T]) -> T:
    try:
        return await run_blocking(read)
    except FileNotFoundError:
        raise ModelNotFound(model, "its folder changed while it was read; ask again in a few seconds") from None


def _entries(folder: Path) -> list[Path]:
    """Return the entries of a folder; empty if it is not a folder or no longer exists."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


LOCAL = "file"


class LocalFile(FolderSource):
    """One file on this disk, with those beside it: the folder is the repository, under any name."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        folder = self._path.parent
        # A text encoder's folder says what a file in it is for.
        self._root, self._prefix = folder, ""
        if text_folder(f"{folder.name}/{path.name}"):
            self._root, self._prefix = folder.parent, f"{folder.name}/"
        self.name = self._prefix + path.name
        super().__init__((self._root,), origin=LOCAL)

    async def listing(self) -> RepositoryListing:
        """Return the folder as a repository."""
        found = await self.find(self._path.name, None)
        assert found is not None
        return found

    def _folder(self, model: str) -> Path:
        return self._root

    def _card(self, model: str) -> Card:
        beside = self._sidecar_card(model, self.name.removesuffix(SAFE_SUFFIX))
        return super()._card(model) if beside == Card() else beside

    def _is_inside(self, path: Path) -> bool:
        return True  # the Hub's own cache holds links

    def _files(self, folder: Path) -> Iterator[RepositoryFile]:
        for path in sorted(self._path.parent.iterdir()):
            if path.is_file():
                yield RepositoryFile(self._prefix + path.name, path.stat().st_size)
