"""Adapters on the Hugging Face Hub, through its own client.

Owns every call to the Hub that the catalog makes: at which commit a repository stands, what it holds, the
header of a file by range request, the file itself into this node's originals. No call outlives its time for
the caller, and what was once seen can be seen again while the Hub is away. The token is handed over explicitly
and appears in no message.
"""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.reading.card import card_from
from serve_app.catalog.reading.header import (
    LENGTH_BYTES,
    MalformedHeader,
    SafetensorsHeader,
    header_length,
    parse_header,
)
from serve_app.catalog.reading.repository import (
    HUB,
    RepositoryFile,
    RepositoryListing,
    is_valid_id,
    is_valid_revision,
)
from serve_app.catalog.sources.download import Download
from serve_app.catalog.sources.download_cache import DownloadCache, LockedFile, LockedFiles
from serve_app.catalog.sources.hub_calls import DOWNLOAD, HubCalls
from serve_app.catalog.sources.hub_errors import MissingRevision
from serve_app.catalog.sources.metadata_cache import MetadataCache, NullMetadataCache
from serve_app.catalog.sources.token_context import current_hub_token
from serve_app.config import HubSettings
from serve_app.core import AdapterSpec, HubToken
from serve_app.errors import HubUnavailable, ModelNotFound
from serve_app.redaction import contains_secret
from serve_app.refusals import MalformedFile

log = logging.getLogger(__name__)

# Holds the whole header of nearly every adapter, so that one request is enough.
FIRST_RANGE_BYTES = 128 * 1024
MAX_SMALL_FILE_BYTES = 1024 * 1024
# What is fetched of a file whose size nobody told; bases set their own limits on what they read.
MAX_UNLISTED_BYTES = 4 * 1024**3


class HubSource:
    """The repositories of one Hub endpoint, read with one token.

    `cache_dir` gets the files (`hub/`) and the memory for when the Hub is away (`hub-memory/`, and
    `hub-memory-public/` for what anybody may read). What is read with a caller's token is not remembered. A file that
    was downloaded is held against eviction until it is released.
    """

    def __init__(
        self,
        settings: HubSettings,
        *,
        token: str | None,
        cache_dir: Path,
        endpoint: str | None = None,
        calls: HubCalls | None = None,
    ) -> None:
        self._settings = settings
        self._root = cache_dir
        # False, not None: None would make the client look for a token on this machine.
        self._token: str | bool = token or False
        self._api = HfApi(endpoint=endpoint or settings.endpoint, token=self._token, library_name="loraplex")
        self._timeout_s = settings.timeout_s
        self._download_timeout_s = settings.download_timeout_s
        self._calls = calls or HubCalls()
        self._originals = DownloadCache(cache_dir / "hub", settings.cache_size, clock=time.time)
        self._held = LockedFiles()
        self._memory: MetadataCache | NullMetadataCache = MetadataCache(cache_dir / "hub-memory")

    def read_as(self, token: HubToken | None) -> HubSource:
        """Return the same Hub as a caller with this token sees it, or as anybody does."""
        secret = None if token is None else token.value
        other = HubSource(self._settings, token=secret, cache_dir=self._root, endpoint=self._api.endpoint)
        other._memory = MetadataCache(self._root / "hub-memory-public") if token is None else NullMetadataCache()
        return other

    @property
    def origin(self) -> str:
        """The Hub."""
        return HUB

    async def find(self, model: str, revision: str | None) -> RepositoryListing | None:
        """Return the repository at the commit where it stands now; at the last one seen, if the Hub is
        away."""
        # What looks like a key or token was pasted there by mistake, and is nobody's to know.
        if not is_valid_id(model) or contains_secret(f"{model} {revision}"):
            return None
        if revision is not None and not is_valid_revision(revision):
            raise ModelNotFound(model, "a revision is a branch, a tag or a commit")
        try:
            return await self._calls.ask(lambda: self._find(model, revision), model, revision, self._timeout_s)
        except HubUnavailable as error:
            remembered = await run_blocking(lambda: self._memory.get(model, revision))
            if remembered is None:
                raise
            log.warning("%s is served as last seen at %s: %s", model, remembered.revision, error.reason)
            return remembered
        except MissingRevision:
            raise
        except ModelNotFound:
            return None

    async def header(self, listing: RepositoryListing, filename: str) -> SafetensorsHeader:
        """Return the header of a file by range requests; from the memory, if the Hub is away."""
        commit = str(listing.revision)
        try:
            head = await self._calls.ask(lambda: self._head(listing, filename), listing.id, commit, self._timeout_s)
        except HubUnavailable:
            remembered = await run_blocking(lambda: self._memory.get_header(listing.location, commit, filename))
            if remembered is None:
                raise
            head = remembered
        listed = listing.file(filename)
        file_bytes = listed.size_bytes if listed else None
        try:
            # Away from the loop: a header of many megabytes takes seconds.
            return await run_blocking(lambda: parse_header(head, file_bytes=file_bytes))
        except MalformedHeader as error:
            raise MalformedFile(listing.id, f"{filename}: {error}") from None

    async def resolve_revision(self, listing: RepositoryListing, *filenames: str) -> str:
        """Return the commit that the listing shows."""
        return str(listing.revision)

    async def read_small(self, model: str, revision: str | None, filename: str) -> bytes | None:
        """Return a file of at most 1 MiB, or None where there is none."""
        try:
            return await self._calls.ask(
                lambda: self._read_prefix(model, revision, filename, MAX_SMALL_FILE_BYTES),
                model,
                revision,
                self._timeout_s,
            )
        except ModelNotFound:
            return None

    async def download(self, spec: AdapterSpec, filename: str | None = None) -> Path:
        """Return the file on this node's disk, fetched if it is not there as it was; with a token that was lent, if
        one was. It stays there at least until `release`."""
        use_hub_token = current_hub_token()
        token = self._token if use_hub_token is None else use_hub_token.value
        call = functools.partial(self._original, spec, filename or spec.filename, token)
        original = await self._calls.run(call, spec.id, spec.revision, self._download_timeout_s)
        return self._held.add(spec.key, original)

    def release(self, spec: AdapterSpec) -> None:
        """Let go of what was downloaded for an adapter."""
        self._held.release(spec.key)

    def free_space(self, needed_bytes: int) -> int:
        """Remove files that nobody holds, those used longest ago first; return the bytes that became free."""
        return self._originals.free_space(needed_bytes)

    def downloaded_bytes(self, spec: AdapterSpec) -> int:
        """Return how much of an adapter's file has arrived."""
        return self._originals.downloaded_bytes(_file_key(spec, spec.filename))

    async def ids(self) -> tuple[str, ...]:
        """Return nothing: the Hub is too large to list."""
        return ()

    def _find(self, model: str, revision: str | None) -> RepositoryListing:
        info = self._api.model_info(
            model, revision=revision, files_metadata=True, timeout=self._timeout_s, token=self._token
        )
        listing = _listing(model, info)
        self._memory.put(listing, revision)
        return listing

    def _head(self, listing: RepositoryListing, filename: str) -> bytes:
        commit = str(listing.revision)
        head = self._read_prefix(listing.location, commit, filename, FIRST_RANGE_BYTES)
        try:
            wanted = LENGTH_BYTES + header_length(head)
        except MalformedHeader:
            return head
        if len(head) < wanted and len(head) == FIRST_RANGE_BYTES:
            head = self._read_prefix(listing.location, commit, filename, wanted)
        self._memory.put_header(listing.location, commit, filename, head[:wanted])
        return head[:wanted]

    def _read_prefix(self, location: str, revision: str | None, filename: str, size_bytes: int) -> bytes:
        """Return the first bytes of a file, never more than asked for, whatever the server sends."""
        url = hf_hub_url(location, filename, revision=revision, endpoint=self._api.endpoint)
        headers = build_hf_headers(token=self._token, library_name="loraplex")
        headers |= {"range": f"bytes=0-{size_bytes - 1}", "accept-encoding": "identity"}
        read = bytearray()
        with get_session().stream("GET", url, headers=headers, timeout=self._timeout_s) as response:
            if response.status_code == 416:  # an empty file has no first byte
                return b""
            hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                read += chunk
                if len(read) >= size_bytes:
                    break
        return bytes(read[:size_bytes])

    def _original(self, spec: AdapterSpec, filename: str, token: str | bool) -> LockedFile:
        key = _file_key(spec, filename)
        found = self._originals.find(key)
        if found is not None:
            return found
        until = self._calls.clock() + self._download_timeout_s
        with self._originals.draft(key) as draft:
            download = Download(
                draft,
                model=spec.id,
                url=hf_hub_url(spec.location, filename, revision=spec.revision, endpoint=self._api.endpoint),
                headers=build_hf_headers(token=token, library_name="loraplex"),
                listed_bytes=(spec.size_bytes or None) if filename == spec.filename else None,
                limit_bytes=MAX_UNLISTED_BYTES,
                timeout_s=self._timeout_s,
                is_over=lambda: self._calls.clock() >= until,
            )
            run = functools.partial(self._originals.with_room, download.run, spec.size_bytes)
            self._calls.persist(run, spec.id, spec.revision, until, DOWNLOAD, lambda: draft.size_bytes)
            return self._originals.commit(key, draft)


def _file_key(spec: AdapterSpec, filename: str) -> str:
    return f"{spec.location}@{spec.revision}/{filename}"


def _listing(model: str, info: ModelInfo) -> RepositoryListing:
    if info.sha is None:
        raise ValueError("the answer names no commit")
    card: dict[Any, Any] = info.card_data.to_dict() if info.card_data is not None else {}
    return RepositoryListing(
        id=model,
        origin=HUB,
        location=info.id,
        revision=info.sha,
        files=tuple(
            RepositoryFile(file.rfilename, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
            for file in info.siblings or ()
        ),
        card=card_from(card, tuple(info.tags or ())),
    )
