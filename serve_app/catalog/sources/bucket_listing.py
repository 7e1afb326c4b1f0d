"""Which adapters a bucket holds, as it was last listed.

Owns when a bucket is listed, and which objects are an adapter. Must not know what is in them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.reading.repository import is_valid_id, is_valid_name
from serve_app.catalog.reading.selection import SAFE_SUFFIX
from serve_app.catalog.sources.bucket import Bucket, StoredObject
from serve_app.catalog.sources.flat_folder import ENDINGS, is_adapter
from serve_app.catalog.sources.metadata_cache import MetadataCache
from serve_app.catalog.sources.remote_calls import LOOK_UP, RemoteCalls
from serve_app.errors import AccessDenied, LoraplexError, ModelNotFound, StoreUnavailable

log = logging.getLogger(__name__)

# A page has a thousand objects and takes a tenth of a second or two.
LISTING_TIMEOUT_S = 120.0
# How long a request waits for a new list where there is an old one.
STALE_WAIT_S = 0.5


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter's objects by their names below one address; `stem` is the name of a single file without its ending."""

    model: str
    location: str
    stem: str | None
    files: Mapping[str, StoredObject]

    @property
    def mark(self) -> str:
        """A text that changes with any of the objects."""
        return " ".join(f"{name} {stored.revision}" for name, stored in sorted(self.files.items()))


class BucketListing:
    """The adapters of a bucket by name; the last known ones while the store does not answer.

    Invariant: at most one listing runs at a time, and it continues if its callers are cancelled.
    """

    def __init__(self, bucket: Bucket, calls: RemoteCalls, memory: MetadataCache, *, failure_ttl_s: float) -> None:
        """List nothing yet; `memory` keeps the objects for the next start."""
        self.bucket = bucket
        self.calls = calls
        self._memory = memory
        self._failure_ttl_s = failure_ttl_s
        self._objects: Iterable[StoredObject] = ()
        self._adapters: Mapping[str, StoredAdapter] | None = None
        self._failure = "it was not listed yet"
        self._due_at = -math.inf
        self._listing: asyncio.Task[None] | None = None

    async def adapters(self, model: str) -> Mapping[str, StoredAdapter]:
        """Return every adapter, for a look-up of `model`.

        Raises:
            StoreUnavailable: the bucket was never listed, and cannot be now.
        """
        if self._listing is None and self.calls.clock() >= self._due_at:
            self._listing = asyncio.get_running_loop().create_task(self._list(model))
        if self._listing is not None:
            await asyncio.wait({self._listing}, timeout=None if self._adapters is None else STALE_WAIT_S)
        if self._adapters is None:
            left_s = max(1, math.ceil(self._due_at - self.calls.clock()))
            raise StoreUnavailable(model, self._failure, left_s)
        return self._adapters

    async def _list(self, model: str) -> None:
        settings = self.bucket.settings
        until = self.calls.clock() + settings.timeout_s
        try:
            objects = await self.calls.run_with_timeout(
                lambda: self.calls.retry(self.bucket.objects, model, None, until, LOOK_UP),
                model, None, LISTING_TIMEOUT_S,
            )  # fmt: skip
            if objects != self._objects or self._adapters is None:
                self._objects, self._adapters = objects, await run_blocking(lambda: self._remembered(objects))
            self._due_at = self.calls.clock() + settings.listing_ttl_s
        except LoraplexError as error:
            self._due_at = self.calls.clock() + self._failure_ttl_s
            self._failure = _reason(error)
            if self._adapters is None:
                self._adapters = await run_blocking(self._recalled)
            log.warning("%s is not listed: %s", settings.url, self._failure)
        finally:
            self._listing = None

    def _remembered(self, objects: list[StoredObject]) -> Mapping[str, StoredAdapter]:
        content = json.dumps([astuple(stored) for stored in objects]).encode()
        self._memory.put_header(self.bucket.settings.url, "listing", "objects", content)
        return adapters_among(self.bucket, objects)

    def _recalled(self) -> Mapping[str, StoredAdapter] | None:
        content = self._memory.get_header(self.bucket.settings.url, "listing", "objects")
        try:
            return adapters_among(self.bucket, [StoredObject(*fields) for fields in json.loads(content or b"")])
        except (ValueError, TypeError):  # there is none, or that of another version
            return None


def adapters_among(bucket: Bucket, objects: Iterable[StoredObject]) -> dict[str, StoredAdapter]:
    """Return the adapters among the objects of a bucket; a repository goes before a file of its name."""
    by_name = {stored.path.removeprefix(f"{bucket.root}/"): stored for stored in objects}
    repositories: dict[str, dict[str, StoredObject]] = {}
    single: dict[str, StoredAdapter] = {}
    for name, stored in by_name.items():
        parts = name.split("/", 2)
        if bucket.settings.layout == "hub" and len(parts) == 3:
            repositories.setdefault("/".join(parts[:2]), {})[parts[2]] = stored
        elif is_adapter(name):
            model = name.removesuffix(SAFE_SUFFIX)
            folder, _, stem = model.rpartition("/")
            found = {stem + ending: by_name[model + ending] for ending in ENDINGS if model + ending in by_name}
            single[model] = StoredAdapter(model, f"{bucket.settings.url}/{folder}".rstrip("/"), stem, found)
    url = bucket.settings.url
    whole = {model: StoredAdapter(model, f"{url}/{model}", None, files) for model, files in repositories.items()}
    found = {model: one for model, one in single.items() if is_valid_name(model)}
    return found | {model: one for model, one in whole.items() if is_valid_id(model)}


def _reason(error: LoraplexError) -> str:
    if isinstance(error, AccessDenied):
        return "the object store does not let the service list its adapters"
    if isinstance(error, ModelNotFound):
        return "the bucket that is configured does not exist"
    return error.reason if isinstance(error, StoreUnavailable) else str(error)
