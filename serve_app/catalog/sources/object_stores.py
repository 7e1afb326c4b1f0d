"""Adapters in the buckets of object stores: S3, Google Cloud Storage and Azure Blob Storage.

Owns the way from a name to the objects of an adapter and to their files on this node's disk. An address comes from the
configuration only. Credentials are found by the stores' own clients and appear in no message.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from serve_app.catalog.reading.card import Card, parse_card
from serve_app.catalog.reading.header import SafetensorsHeader, read_head
from serve_app.catalog.reading.repository import (
    MAX_PICTURE_BYTES,
    MAX_SMALL_FILE_BYTES,
    STORE,
    RepositoryFile,
    RepositoryListing,
    content_digest,
    is_valid_name,
)
from serve_app.catalog.reading.sidecars import CIVITAI_SUFFIX, WEBUI_SUFFIX, card_from_sidecars
from serve_app.catalog.sources.bucket import Bucket, StoredObject
from serve_app.catalog.sources.bucket_listing import BucketListing, StoredAdapter
from serve_app.catalog.sources.download_cache import PartialDownload
from serve_app.catalog.sources.downloading_source import DownloadingSource, parsed_header
from serve_app.catalog.sources.folder import MAX_CARD_BYTES
from serve_app.catalog.sources.metadata_cache import MetadataCache
from serve_app.catalog.sources.remote_calls import RemoteCalls
from serve_app.core import AdapterSpec
from serve_app.errors import ModelNotFound
from serve_app.source_settings import AdapterSources

T = TypeVar("T")


class ObjectStoreSource(DownloadingSource):
    """The adapters of some buckets; the first bucket that has a name is used.

    `cache_dir` gets the downloaded files, in the cache of those of the Hub, and in `store-memory/` lists, cards and
    headers. A downloaded file is locked against eviction until it is released.
    """

    look_ups_at_once = 8

    def __init__(
        self,
        settings: AdapterSources,
        *,
        cache_dir: Path,
        calls_to: Callable[[Bucket], RemoteCalls] = lambda bucket: RemoteCalls(bucket.remote),
    ) -> None:
        """Connect to nothing yet."""
        super().__init__(cache_dir, settings.hub.cache_size)
        self._memory = MetadataCache(cache_dir / "store-memory")
        buckets = [Bucket(store) for store in settings.stores]
        self._listings = [
            BucketListing(bucket, calls_to(bucket), self._memory, failure_ttl_s=settings.failure_ttl_s)
            for bucket in buckets
        ]

    @property
    def origin(self) -> str:
        """The object stores."""
        return STORE

    async def find(self, model: str, revision: str | None) -> RepositoryListing | None:
        """Return the adapter of that name as it was last listed, or None."""
        if not is_valid_name(model):
            return None
        for place in self._listings:
            found = (await place.adapters(model)).get(model)
            if found is not None:
                files = (
                    RepositoryFile(name, stored.size_bytes, stored.revision) for name, stored in found.files.items()
                )
                card = await self._card(place, found)
                return RepositoryListing(model, STORE, found.location, revision, tuple(files), card)
        return None

    async def header(self, listing: RepositoryListing, filename: str) -> SafetensorsHeader:
        """Return the header of a listed file by range requests, once for each of its revisions."""
        listed = listing.file(filename)
        if listed is None:
            raise ModelNotFound(listing.id, f"it holds no file '{filename}'")
        stored = StoredObject(_path(listing.location, filename), listed.size_bytes or 0, str(listed.digest))
        place = self._place(listing.location, listing.id)

        def read() -> bytes:
            return read_head(lambda size_bytes: place.bucket.read(stored, size_bytes, model=listing.id))

        head = await self._call(place, lambda: self._kept(stored, read), listing.id)
        return await parsed_header(head, listing, filename, stored.size_bytes)

    async def resolve_revision(self, listing: RepositoryListing, *filenames: str) -> str:
        """Return the ETag or generation of a file; of several, what names theirs together."""
        revision = content_digest([file.digest or "" for name in filenames if (file := listing.file(name)) is not None])
        asked = listing.revision
        if asked is not None and asked != "main" and not revision.startswith(asked):
            raise ModelNotFound(
                listing.id, f"it has no revision '{asked}'; of an object store only the newest is served"
            )
        return revision

    async def read_small(
        self, model: str, revision: str | None, filename: str, limit_bytes: int = MAX_SMALL_FILE_BYTES
    ) -> bytes | None:
        """Return the first bytes of an object of the repository at a location, or None."""
        for place in self._listings:
            adapters = await place.adapters(model.rpartition("/")[2])
            found = adapters.get(model.removeprefix(f"{place.bucket.settings.url}/"))
            if found is not None and found.location == model:
                return await self._small(place, found, filename, limit_bytes)
        return None

    async def read_picture(self, location: str, revision: str, file: RepositoryFile) -> bytes | None:
        """Return a listed picture at the revision at which it was listed."""
        place = self._place(location, location)
        stored = StoredObject(_path(location, file.name), file.size_bytes or 0, str(file.digest))
        read = functools.partial(place.bucket.read, stored, MAX_PICTURE_BYTES + 1, model=file.name)
        return await self._call(place, read, file.name)

    async def download(self, spec: AdapterSpec, filename: str | None = None) -> Path:
        """Return the file on this node's disk, downloaded if it is not there; it stays at least until `release`."""
        place = self._place(spec.location, spec.id)
        bucket, name = place.bucket, filename or spec.filename

        def prepare(draft: PartialDownload, is_over: Callable[[], bool]) -> Callable[[], None]:
            def fetch() -> None:
                bucket.fetch(self._unchanged(bucket, spec)[name], draft, model=spec.id, is_over=is_over)

            return fetch

        return await self._downloaded(spec, name, place.calls, bucket.settings.download_timeout_s, prepare)

    async def marks(self) -> Mapping[str, str]:
        """Return the name of every adapter, with a mark that changes with any of its objects."""
        found: dict[str, str] = {}
        for place in reversed(self._listings):
            adapters = await place.adapters("the list of adapters")
            found |= {model: adapter.mark for model, adapter in adapters.items()}
        return found

    def _place(self, location: str, model: str) -> BucketListing:
        for place in self._listings:
            if f"{location}/".startswith(f"{place.bucket.settings.url}/"):
                return place
        raise ModelNotFound(model, "its object store is no longer configured")

    async def _card(self, place: BucketListing, found: StoredAdapter) -> Card:
        if found.stem is None:
            text = await self._small(place, found, "README.md", MAX_CARD_BYTES)
            return Card() if text is None else parse_card(text.decode("utf-8", errors="replace"))
        webui, civitai = [
            await self._small(place, found, found.stem + ending, MAX_SMALL_FILE_BYTES)
            for ending in (WEBUI_SUFFIX, CIVITAI_SUFFIX)
        ]
        return card_from_sidecars(webui=webui, civitai=civitai)

    async def _small(self, place: BucketListing, found: StoredAdapter, name: str, limit_bytes: int) -> bytes | None:
        stored = found.files.get(name)
        if stored is None:
            return None
        read = functools.partial(place.bucket.read, stored, limit_bytes, model=found.model)
        return await self._call(place, lambda: self._kept(stored, read), found.model)

    def _kept(self, stored: StoredObject, read: Callable[[], bytes]) -> bytes:
        """Return what was read of an object at its revision before, else what is read now."""
        folder, _, name = stored.path.rpartition("/")
        content = self._memory.get_header(folder, stored.revision, name)
        if content is None:
            content = read()
            self._memory.put_header(folder, stored.revision, name, content)
        return content

    async def _call(self, place: BucketListing, call: Callable[[], T], model: str) -> T:
        return await place.calls.call_with_retries(call, model, None, place.bucket.settings.timeout_s)

    def _unchanged(self, bucket: Bucket, spec: AdapterSpec) -> Mapping[str, StoredObject]:
        """Return the objects of a spec, all of them of its revision."""
        names = (*spec.files, *filter(None, (spec.embeddings,)))
        found = {name: bucket.describe(_path(spec.location, name)) for name in names}
        if content_digest([stored.revision for stored in found.values()]) != spec.revision:
            raise bucket.changed(spec.id)
        return found


def _path(location: str, filename: str) -> str:
    return f"{location.partition('://')[2]}/{filename}"
