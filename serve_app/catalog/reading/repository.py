"""The interface of a source of adapters, and the syntax of ids and revisions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.header import SafetensorsHeader
from serve_app.core import AdapterSpec

HUB = "hub"
FOLDER = "folder"
FLAT = "flat"
STORE = "store"
EMBEDDED = "embedded"
# The kinds of source whose files are downloaded.
REMOTE = (HUB, STORE)
# As much of a SHA-256 as names the bytes of an adapter; a commit has as many.
DIGEST_CHARACTERS = 40
MAX_NAME_CHARACTERS = 256
MAX_SMALL_FILE_BYTES = 1024 * 1024
MAX_PICTURE_BYTES = 8 * 1024 * 1024

_ID_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"{_ID_PART}(?:/{_ID_PART})?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,254}")


def is_valid_id(name: str) -> bool:
    """Say whether a name has the shape of a repository id: `name` or `owner/name`, never a path that
    climbs."""
    return _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def is_valid_name(name: str) -> bool:
    """Say whether a name can be that of an adapter: a repository id, or a path below a folder that climbs nowhere."""
    parts = name.split("/")
    return (
        len(name) <= MAX_NAME_CHARACTERS
        and name == name.strip()
        and name.isprintable()
        and "\\" not in name
        and not any(part == "" or part.startswith(".") for part in parts)
    )


def is_valid_revision(revision: str) -> bool:
    """Say whether a text can be a branch, tag or commit."""
    return _REVISION.fullmatch(revision) is not None and ".." not in revision and "//" not in revision


def content_digest(digests: Sequence[str]) -> str:
    """Return what names the bytes of files together, from the SHA-256 of each, which may be cut to 40 characters."""
    cut = [digest[:DIGEST_CHARACTERS] for digest in digests]
    return cut[0] if len(cut) == 1 else hashlib.sha256("".join(cut).encode()).hexdigest()[:DIGEST_CHARACTERS]


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """One file of a repository; a size or digest of None means that the place did not say."""

    name: str
    size_bytes: int | None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class RepositoryListing:
    """A repository at the time of its look-up.

    `location` is its present id in the source (the Hub renames repositories). `revision` is the commit, or for a
    folder, which has none, the revision that was requested.
    """

    id: str
    origin: str
    location: str
    revision: str | None
    files: tuple[RepositoryFile, ...]
    card: Card

    def file(self, name: str) -> RepositoryFile | None:
        """Return the file of that name, or None."""
        return next((file for file in self.files if file.name == name), None)


class AdapterSource(Protocol):
    """A source of repositories in the layout of the Hub. Async methods do not block the event loop.

    The methods with a body are for sources that download files; others inherit them.
    """

    # How many listed adapters are looked up at once: a look-up in this node's files is work for this process, one in a
    # store mostly waiting.
    look_ups_at_once: ClassVar[int] = 1

    @property
    def origin(self) -> str:
        """The kind of source; its specs carry this name, so that a replica asks the same kind."""
        ...

    async def find(self, model: str, revision: str | None) -> RepositoryListing | None:
        """Return the repository, or None if this source has no such id.

        Raises:
            ModelNotFound: the repository exists without that revision.
            AccessDenied: it may not be read.
            HubUnavailable: the source did not answer.
        """
        ...

    async def header(self, listing: RepositoryListing, filename: str) -> SafetensorsHeader:
        """Return the header of a listed safetensors file without fetching its weights.

        Raises:
            MalformedFile: the header cannot be read.
            AccessDenied, ModelNotFound, HubUnavailable: as for `find`.
        """
        ...

    async def resolve_revision(self, listing: RepositoryListing, *filenames: str) -> str:
        """Return the revision that fixes the bytes of some listed files.

        Raises:
            ModelNotFound: the files are not those of the requested revision.
        """
        ...

    async def read_small(
        self, model: str, revision: str | None, filename: str, limit_bytes: int = MAX_SMALL_FILE_BYTES
    ) -> bytes | None:
        """Return the first bytes of a file of a repository, such as a configuration, or None if there is none.

        Raises:
            AccessDenied, HubUnavailable: as for `find`.
        """
        ...

    async def read_picture(self, location: str, revision: str, file: RepositoryFile) -> bytes | None:
        """Return a listed picture, cut off behind `MAX_PICTURE_BYTES`; raises as `read_small` does."""
        return await self.read_small(location, revision, file.name, MAX_PICTURE_BYTES + 1)

    async def download(self, spec: AdapterSpec, filename: str | None = None) -> Path:
        """Return a local file with the bytes that the spec fixes: the adapter's, or another of its files.

        Raises:
            MalformedFile: the bytes are no longer those that the spec fixes.
            DiskFull: there is no room for it.
            AccessDenied, ModelNotFound, HubUnavailable: as for `find`.
        """
        ...

    async def ids(self) -> tuple[str, ...]:
        """Return the ids that can be listed; empty for a source as large as the Hub."""
        return ()

    async def marks(self) -> Mapping[str, str]:
        """Return what is listed bit by bit, because there is much of it: ids, each with a mark that changes with it."""
        return {}

    def downloaded_bytes(self, spec: AdapterSpec) -> int:
        """Return how many bytes of an adapter's file have arrived."""
        return 0

    def release(self, spec: AdapterSpec) -> None:
        """Allow the removal of the files that were downloaded for a spec."""

    def free_space(self, needed_bytes: int) -> int:
        """Remove unused local copies; return how many bytes became free. Blocks."""
        return 0
