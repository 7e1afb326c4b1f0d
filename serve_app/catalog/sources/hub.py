"""Adapters on the Hugging Face Hub, through its own client.

Owns every call of the catalog to the Hub: the commit and the files of a repository, the header of a file by range
request, and the download of a file. Every call has a timeout, and metadata that was read once is used again while the
Hub is unavailable. The token is passed explicitly and appears in no message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.reading.card import card_from
from serve_app.catalog.reading.header import SafetensorsHeader, read_head
from serve_app.catalog.reading.repository import (
    HUB,
    MAX_SMALL_FILE_BYTES,
    RepositoryFile,
    RepositoryListing,
    is_valid_id,
    is_valid_revision,
)
from serve_app.catalog.sources.download import Download
from serve_app.catalog.sources.download_cache import PartialDownload
from serve_app.catalog.sources.downloading_source import DownloadingSource, parsed_header
from serve_app.catalog.sources.hub_errors import MissingRevision
from serve_app.catalog.sources.metadata_cache import MetadataCache, NullMetadataCache
from serve_app.catalog.sources.remote_calls import RemoteCalls
from serve_app.catalog.sources.token_context import current_hub_token
from serve_app.core import AdapterSpec, HubToken
from serve_app.errors import HubUnavailable, ModelNotFound
from serve_app.redaction import contains_secret
from serve_app.source_settings import HubSettings

log = logging.getLogger(__name__)

# The limit for a file of unknown size; bases have their own limits for what they read.
MAX_UNLISTED_BYTES = 4 * 1024**3


class HubSource(DownloadingSource):
    """The repositories of one Hub endpoint, read with one token.

    `cache_dir` gets the downloaded files (`hub/`) and the metadata for when the Hub is unavailable (`hub-memory/`, and
    `hub-memory-public/` for public repositories). Metadata that was read with a caller's token is not cached. A
    downloaded file is locked against eviction until it is released.
    """

    def __init__(
        self,
        settings: HubSettings,
        *,
        token: str | None,
        cache_dir: Path,
        endpoint: str | None = None,
        calls: RemoteCalls | None = None,
        metadata: MetadataCache | NullMetadataCache | None = None,
    ) -> None:
        super().__init__(cache_dir, settings.cache_size)
        self._settings = settings
        self._root = cache_dir
        # False, not None: None would make the client look for a token on this machine.
        self._token: str | bool = token or False
        self._api = HfApi(endpoint=endpoint or settings.endpoint, token=self._token, library_name="loraplex")
        self._timeout_s = settings.timeout_s
        self._download_timeout_s = settings.download_timeout_s
        self._calls = calls or RemoteCalls()
        self._metadata = metadata or MetadataCache(cache_dir / "hub-memory")

    def read_as(self, token: HubToken | None) -> HubSource:
        """Return this Hub as a caller with the token sees it; with None, without a token."""
        return HubSource(
            self._settings,
            token=None if token is None else token.value,
            cache_dir=self._root,
            endpoint=self._api.endpoint,
            metadata=MetadataCache(self._root / "hub-memory-public") if token is None else NullMetadataCache(),
        )

    @property
    def origin(self) -> str:
        """The Hub."""
        return HUB

    async def find(self, model: str, revision: str | None) -> RepositoryListing | None:
        """Return the repository at its present commit, or at the last one seen if the Hub is unavailable."""
        # Text that looks like a key or token was pasted by mistake and must not be sent to the Hub.
        if not is_valid_id(model) or contains_secret(f"{model} {revision}"):
            return None
        if revision is not None and not is_valid_revision(revision):
            raise ModelNotFound(model, "a revision is a branch, a tag or a commit")
        try:
            return await self._calls.call_with_retries(
                lambda: self._find(model, revision), model, revision, self._timeout_s
            )
        except HubUnavailable as error:
            cached = await run_blocking(lambda: self._metadata.get(model, revision))
            if cached is None:
                raise
            log.warning("%s is served as last seen at %s: %s", model, cached.revision, error.reason)
            return cached
        except MissingRevision:
            raise
        except ModelNotFound:
            return None

    async def header(self, listing: RepositoryListing, filename: str) -> SafetensorsHeader:
        """Return the header of a file by range requests, or from the metadata cache if the Hub is unavailable."""
        commit = str(listing.revision)
        try:
            head = await self._calls.call_with_retries(
                lambda: self._head(listing, filename), listing.id, commit, self._timeout_s
            )
        except HubUnavailable:
            cached = await run_blocking(lambda: self._metadata.get_header(listing.location, commit, filename))
            if cached is None:
                raise
            head = cached
        listed = listing.file(filename)
        return await parsed_header(head, listing, filename, listed.size_bytes if listed else None)

    async def resolve_revision(self, listing: RepositoryListing, *filenames: str) -> str:
        """Return the commit of the listing."""
        return str(listing.revision)

    async def read_small(
        self, model: str, revision: str | None, filename: str, limit_bytes: int = MAX_SMALL_FILE_BYTES
    ) -> bytes | None:
        """Return the first bytes of a file, or None where there is none."""
        try:
            return await self._calls.call_with_retries(
                lambda: self._read_prefix(model, revision, filename, limit_bytes),
                model,
                revision,
                self._timeout_s,
            )
        except ModelNotFound:
            return None

    async def download(self, spec: AdapterSpec, filename: str | None = None) -> Path:
        """Return the file on this node's disk; it is downloaded if it is not there, with a forwarded token if there is
        one. It stays there at least until `release`."""
        forwarded = current_hub_token()
        token = self._token if forwarded is None else forwarded.value
        name = filename or spec.filename

        def prepare(draft: PartialDownload, is_over: Callable[[], bool]) -> Callable[[], None]:
            return Download(
                draft,
                model=spec.id,
                url=hf_hub_url(spec.location, name, revision=spec.revision, endpoint=self._api.endpoint),
                headers=build_hf_headers(token=token, library_name="loraplex"),
                listed_bytes=(spec.size_bytes or None) if (name,) == spec.files else None,
                limit_bytes=MAX_UNLISTED_BYTES,
                timeout_s=self._timeout_s,
                is_over=is_over,
            ).run

        return await self._downloaded(spec, name, self._calls, self._download_timeout_s, prepare)

    def _find(self, model: str, revision: str | None) -> RepositoryListing:
        info = self._api.model_info(
            model, revision=revision, files_metadata=True, timeout=self._timeout_s, token=self._token
        )
        listing = _listing(model, info)
        self._metadata.put(listing, revision)
        return listing

    def _head(self, listing: RepositoryListing, filename: str) -> bytes:
        commit = str(listing.revision)
        head = read_head(lambda size_bytes: self._read_prefix(listing.location, commit, filename, size_bytes))
        self._metadata.put_header(listing.location, commit, filename, head)
        return head

    def _read_prefix(self, location: str, revision: str | None, filename: str, size_bytes: int) -> bytes:
        """Return the first bytes of a file, at most `size_bytes` even if the server sends more."""
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
