"""One bucket of an object store, or the part of it below a prefix, through fsspec.

Owns every call to an object store, and what its failures mean to a caller. Every call blocks. Must not know which
objects are adapters.
"""

from __future__ import annotations

import base64
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, BinaryIO

import fsspec

from serve_app.catalog.sources.download_cache import PartialDownload
from serve_app.catalog.sources.hub_errors import NonRetryableHubError
from serve_app.catalog.sources.remote_calls import Remote
from serve_app.errors import DiskFull, LoraplexError, ModelNotFound, StoreAccessDenied, StoreUnavailable
from serve_app.file_locks import is_disk_full
from serve_app.source_settings import STORE_EXTRAS, AdapterStore

log = logging.getLogger(__name__)

READ_BYTES = 8 * 1024**2
_MD5 = re.compile(r"[0-9a-f]{32}")
# The message for a part of an exception's name; the clients of the stores have no exceptions in common.
_REASONS = {
    "Credential": "the service has no credentials for its object store",
    "Timeout": "the object store did not answer in time",
    "Payload": "the object store broke off",
    "Incomplete": "the object store broke off",
    "Connect": "the object store cannot be reached",
}


class ObjectChanged(StoreUnavailable, NonRetryableHubError):
    """The object is no longer the one that was looked up."""

    code = "object_changed"


class StorePackageMissing(Exception):
    """An object store is configured, but the package for its kind is not installed."""


def check_stores(stores: Sequence[AdapterStore]) -> None:
    """Refuse object stores whose packages are missing.

    Raises:
        StorePackageMissing: with the extra to install.
    """
    for store in stores:
        package = STORE_EXTRAS[store.scheme]
        if find_spec(package) is None:
            extra = f"pip install 'loraplex[{store.scheme}]'"
            raise StorePackageMissing(f"{store.url} is configured, but {package} is not installed: {extra}")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as its store describes it.

    `revision` is its ETag, or on Google Cloud its generation. `md5` is the digest of its bytes, if the store names it.
    """

    path: str
    size_bytes: int
    revision: str
    md5: str | None = None


class Bucket:
    """The objects below one address. Thread-safe."""

    def __init__(self, settings: AdapterStore) -> None:
        """Connect to nothing yet."""
        self.settings = settings
        self.root = settings.url.partition("://")[2]
        self.remote = Remote("the object store", (Exception,), self._translate, StoreUnavailable)

    @cached_property
    def _filesystem(self) -> Any:
        timeout_s = self.settings.timeout_s
        times = {"connect_timeout": timeout_s, "read_timeout": timeout_s}
        options: Mapping[str, Mapping[str, Any]] = {
            "s3": {"config_kwargs": {**times, "retries": {"total_max_attempts": 1}}},
            "gs": {"requests_timeout": timeout_s},
            "az": {"anon": False, "connection_timeout": math.ceil(timeout_s), "read_timeout": math.ceil(timeout_s)},
        }
        scheme = self.settings.scheme
        made = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options[scheme])
        made.retries = 1  # `RemoteCalls` has them
        return made

    def objects(self) -> list[StoredObject]:
        """Return every object."""
        found: Mapping[str, Mapping[str, Any]] = self._filesystem.find(self.root, detail=True)
        below = f"{self.root}/"
        return [_described(name, about) for name, about in found.items() if name.startswith(below) and name[-1] != "/"]

    def describe(self, path: str) -> StoredObject:
        """Return what is now at a path."""
        return _described(path, self._filesystem.info(path))

    def read(self, stored: StoredObject, size_bytes: int, *, model: str) -> bytes:
        """Return the first bytes of an object, at most `size_bytes`; raises as `fetch` does."""
        wanted = min(size_bytes, stored.size_bytes)
        with self._open(stored, model) as file:
            content = file.read(wanted) if wanted else b""
        if len(content) < wanted:
            raise StoreUnavailable(model, "the object store broke off")
        return content

    def fetch(self, stored: StoredObject, draft: PartialDownload, *, model: str, is_over: Callable[[], bool]) -> None:
        """Write the missing bytes of an object to `draft`, and check all of them.

        Raises:
            StoreUnavailable: they are incomplete, or not those that the store names.
            OSError: the disk failed.
            TimeoutError: the download is abandoned.
            Exception: raised by the store's client.
        """
        with self._open(stored, model) as file:
            file.seek(draft.size_bytes)
            while draft.size_bytes < stored.size_bytes and (piece := file.read(READ_BYTES)):
                if is_over():
                    raise TimeoutError
                draft.add(piece)
        if draft.size_bytes < stored.size_bytes:
            raise StoreUnavailable(model, "the object store broke off")
        if stored.md5 not in (None, draft.md5()) and not self._is_encrypted(stored.path):
            draft.restart()
            raise StoreUnavailable(model, "what arrived is not the object that the store names")

    @contextmanager
    def _open(self, stored: StoredObject, model: str) -> Iterator[BinaryIO]:
        """Open an object; each byte that is read is of its revision, or the block ends with ObjectChanged."""
        # s3fs has the store compare the ETag at each read.
        with self._filesystem.open(stored.path, "rb", block_size=READ_BYTES, cache_type="none") as file:
            if _described(stored.path, file.details).revision != stored.revision:
                raise self.changed(model)
            yield file
        if self.settings.scheme != "s3" and self.describe(stored.path).revision != stored.revision:
            raise self.changed(model)

    def _is_encrypted(self, path: str) -> bool:
        """Say whether the ETag of an S3 object is no digest, because of a key of its own."""
        if self.settings.scheme != "s3":
            return False
        bucket, _, key = path.partition("/")
        about = self._filesystem.call_s3("head_object", Bucket=bucket, Key=key)
        return about.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in about

    def changed(self, model: str) -> ObjectChanged:
        """Return the error for an object that was replaced; by the time it names, the new one is listed."""
        retry_after_s = math.ceil(self.settings.listing_ttl_s)
        return ObjectChanged(model, "its object in the store was replaced after it was looked up", retry_after_s)

    def _translate(self, error: Exception, model: str, revision: str | None) -> LoraplexError:
        if isinstance(error, LoraplexError):
            return error
        if isinstance(error, OSError) and is_disk_full(error):
            return DiskFull(model)
        kind = type(error).__name__
        if kind == "FileExpired":
            return self.changed(model)
        if isinstance(error, PermissionError):
            return StoreAccessDenied(model)
        if isinstance(error, FileNotFoundError):
            return ModelNotFound(model, "its object is no longer in the store")
        reasons = (reason for part, reason in _REASONS.items() if part in kind)
        return StoreUnavailable(model, next(reasons, "the object store failed"))


def _described(path: str, about: Mapping[str, Any]) -> StoredObject:
    etag = str(about.get("ETag") or about.get("etag") or "").removeprefix("W/").strip('"')
    named = about.get("md5Hash")
    md5 = base64.b64decode(named).hex() if named else etag if _MD5.fullmatch(etag) else None
    return StoredObject(path, int(about["size"] or 0), str(about.get("generation") or etag), md5)
