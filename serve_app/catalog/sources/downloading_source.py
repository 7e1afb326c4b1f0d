"""The common part of the sources whose files are downloaded: the Hub and object stores.

Owns the way of a file into the node's download cache, and its lock there. Must not know how bytes are requested.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.reading.header import MalformedHeader, SafetensorsHeader, parse_header
from serve_app.catalog.reading.repository import AdapterSource, RepositoryListing
from serve_app.catalog.sources.download_cache import DownloadCache, LockedFile, LockedFiles, PartialDownload
from serve_app.catalog.sources.remote_calls import DOWNLOAD, RemoteCalls
from serve_app.core import AdapterSpec
from serve_app.refusals import MalformedFile

# Takes a draft and what says that its time is over; returns a call that adds the missing bytes.
PrepareDownload = Callable[[PartialDownload, Callable[[], bool]], Callable[[], None]]


class DownloadingSource(AdapterSource):
    """A source whose files are downloaded; each is locked against eviction until it is released."""

    def __init__(self, cache_dir: Path, budget_bytes: int) -> None:
        """Open nothing yet; the files of all such sources share one folder and one budget."""
        self._downloads = DownloadCache(cache_dir / "hub", budget_bytes, clock=time.time)
        self._locked = LockedFiles()

    def release(self, spec: AdapterSpec) -> None:
        """Unlock the files that were downloaded for an adapter."""
        self._locked.release(spec.key)

    def free_space(self, needed_bytes: int) -> int:
        """Remove unlocked files, the least recently used first; return the bytes that became free."""
        return self._downloads.free_space(needed_bytes)

    def downloaded_bytes(self, spec: AdapterSpec) -> int:
        """Return how much of an adapter's file has arrived."""
        return sum(self._downloads.downloaded_bytes(_file_key(spec, name)) for name in spec.files)

    async def _downloaded(
        self, spec: AdapterSpec, filename: str, calls: RemoteCalls, timeout_s: float, prepare: PrepareDownload
    ) -> Path:
        """Return a file on this node's disk, downloaded if it is not there; it stays at least until `release`."""
        call = functools.partial(self._found_or_fetched, spec, filename, calls, timeout_s, prepare)
        file = await calls.run_with_timeout(call, spec.id, spec.revision, timeout_s)
        return self._locked.add(spec.key, file)

    def _found_or_fetched(
        self, spec: AdapterSpec, filename: str, calls: RemoteCalls, timeout_s: float, prepare: PrepareDownload
    ) -> LockedFile:
        key = _file_key(spec, filename)
        found = self._downloads.find(key)
        if found is not None:
            return found
        until = calls.clock() + timeout_s
        with self._downloads.draft(key) as draft:
            fetch = prepare(draft, lambda: calls.clock() >= until)
            run = functools.partial(self._downloads.with_room, fetch, spec.size_bytes)
            calls.retry(run, spec.id, spec.revision, until, DOWNLOAD, lambda: draft.size_bytes)
            return self._downloads.commit(key, draft)


async def parsed_header(
    head: bytes, listing: RepositoryListing, filename: str, file_bytes: int | None
) -> SafetensorsHeader:
    """Return the header in the first bytes of a listed file.

    Raises:
        MalformedFile: it cannot be read.
    """
    try:
        # Away from the loop: a header of many megabytes takes seconds.
        return await run_blocking(lambda: parse_header(head, file_bytes=file_bytes))
    except MalformedHeader as error:
        raise MalformedFile(listing.id, f"{filename}: {error}") from None


def _file_key(spec: AdapterSpec, filename: str) -> str:
    return f"{spec.location}@{spec.revision}/{filename}"
