"""A disk cache of Hub metadata, for when the Hub does not answer.

Owns a folder of small files: listings by id and revision, headers by commit. Losing one costs one request, so the
oldest are removed when they take too much space.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from pydantic import TypeAdapter

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.repository import HUB, RepositoryFile, RepositoryListing

log = logging.getLogger(__name__)

_DEFAULTS = TypeAdapter(AdapterDefaults)
MAX_BYTES = 512 * 1024**2
# How much is written before the size of the folder is checked again.
LOOK_AFTER_BYTES = 16 * 1024**2


class MetadataCache:
    """Listings and headers in one folder; writes are atomic, and neither reading nor writing raises."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES, look_after_bytes: int = LOOK_AFTER_BYTES) -> None:
        """Keep at most `max_bytes`, and `look_after_bytes` more for each process that writes here."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._look_after_bytes = look_after_bytes
        self._unseen_bytes = 0

    def put(self, listing: RepositoryListing, asked_revision: str | None) -> None:
        """Store a listing under the requested revision."""
        self._write(self._listing_path(listing.id, asked_revision), json.dumps(asdict(listing)).encode())

    def get(self, model: str, asked_revision: str | None) -> RepositoryListing | None:
        """Return the newest stored listing, or None."""
        content = self._read(self._listing_path(model, asked_revision))
        if content is None:
            return None
        try:
            return _listing_from(json.loads(content))
        except (ValueError, KeyError, TypeError):
            return None

    def put_header(self, location: str, commit: str, filename: str, head: bytes) -> None:
        """Store the first bytes of a file, up to the end of its header."""
        self._write(self._header_path(location, commit, filename), head)

    def get_header(self, location: str, commit: str, filename: str) -> bytes | None:
        """Return those bytes, or None."""
        return self._read(self._header_path(location, commit, filename))

    def _listing_path(self, model: str, asked_revision: str | None) -> Path:
        return self._folder / "listings" / f"{_name(model)}@{_name(asked_revision or 'main')}.json"

    def _header_path(self, location: str, commit: str, filename: str) -> Path:
        return self._folder / "headers" / f"{_name(location)}@{_name(commit)}" / _name(filename)

    def _write(self, path: Path, content: bytes) -> None:
        unfinished = path.with_name(f".{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(content)
            os.replace(unfinished, path)
            self._unseen_bytes += len(content)
            if self._unseen_bytes >= self._look_after_bytes:
                self._unseen_bytes = 0
                self._drop_oldest()
        except OSError as error:
            log.warning("nothing can be written to the cache %s: %s", self._folder.name, error.strerror)
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _drop_oldest(self) -> None:
        kept = 0
        for _, size_bytes, path in sorted(_files_below(self._folder), reverse=True):
            kept += size_bytes
            if kept > self._max_bytes:
                path.unlink(missing_ok=True)

    def _read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except OSError:
            return None


class NullMetadataCache:
    """A cache that stores nothing, for metadata of private repositories."""

    def put(self, listing: RepositoryListing, asked_revision: str | None) -> None:
        """Store nothing."""

    def get(self, model: str, asked_revision: str | None) -> RepositoryListing | None:
        """Return None."""

    def put_header(self, location: str, commit: str, filename: str, head: bytes) -> None:
        """Store nothing."""

    def get_header(self, location: str, commit: str, filename: str) -> bytes | None:
        """Return None."""


def _files_below(folder: Path) -> Iterator[tuple[int, int, Path]]:
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            status = path.stat()
            if path.is_file():
                yield status.st_mtime_ns, status.st_size, path


def _name(text: str) -> str:
    """Return a text as one file name, at most 200 characters long."""
    return quote(text, safe="").replace(".", "%2E")[-200:]


def _listing_from(data: dict[str, Any]) -> RepositoryListing:
    card = {key: tuple(value) if isinstance(value, list) else value for key, value in data["card"].items()}
    card["defaults"] = _DEFAULTS.validate_python(card["defaults"])
    return RepositoryListing(
        id=data["id"],
        origin=HUB,
        location=data["location"],
        revision=data["revision"],
        files=tuple(RepositoryFile(file["name"], file["size_bytes"], file.get("digest")) for file in data["files"]),
        card=Card(**cast("dict[str, Any]", card)),
    )
