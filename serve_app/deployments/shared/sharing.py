"""Adapter files between nodes: fetched from the Hub or an object store once for the cluster, then copied from a peer.

    replica -> Keeper.claim -> no node has it: fetch from the Hub, put the bytes into Ray's object store, announce
                               -> a peer has it: copy the bytes from Ray's object store, check their digest
                               -> somebody is fetching it: wait for that, for a while

Owns the way of a file from a peer's memory to this node's disk. A failure on that way costs a fetch from the Hub and
nothing else. Only replicas come here, and only for adapters whose access the ingress has checked. Must not know
how the Hub is asked, nor what a file holds.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.catalog.files import AdapterFiles
from serve_app.catalog.reading.repository import REMOTE
from serve_app.catalog.sources.download_cache import DownloadCache, LockedFile, LockedFiles, PartialDownload
from serve_app.config import Environment
from serve_app.core import AdapterSpec
from serve_app.deployments.shared.file_index import SharedFile
from serve_app.file_locks import is_disk_full
from serve_app.source_settings import SharingSettings

log = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 1024**2
# A chunk that takes longer than this to arrive is asked for no more: the Hub is the better peer then.
CHUNK_TIMEOUT_S = 30.0
# The keeper itself answers within the time that a file is waited for.
KEEPER_MARGIN_S = 10.0
NODE = "{node}"


def on_this_node(environment: Environment) -> Environment:
    """Return the environment with `{node}` in its cache folder replaced by the id of the Ray node that this runs on."""
    name = ray.get_runtime_context().get_node_id()[:12]
    return environment.model_copy(update={"cache_dir": Path(str(environment.cache_dir).replace(NODE, name))})


class ObjectStore:
    """Ray's object store: chunks travel between nodes in it, and spill to disk where it is full."""

    def put(self, chunk: bytes) -> Any:
        """Copy a chunk into this node's store."""
        # An array, unlike bytes, is later read in place.
        return ray.put(np.frombuffer(chunk, dtype=np.uint8))

    def get(self, reference: Any) -> memoryview:
        """Have a chunk brought to this node."""
        return memoryview(ray.get(reference, timeout=CHUNK_TIMEOUT_S))


INDEX_FAILURES = (RayError, RayServeException, OSError, TimeoutError)


class SharedFiles:
    """The files of adapters, from this node, a peer or their source, in this order.

    `on_brought` is told "peer", "hub" or "store" for each file that came to this node; `copies` keeps what came from
    peers.
    """

    def __init__(
        self,
        files: AdapterFiles,
        keeper: DeploymentHandle,
        chunks: ObjectStore,
        *,
        copies: DownloadCache,
        node: str,
        on_brought: Callable[[str], None],
        patience_s: float | None = None,
    ) -> None:
        """`patience_s` is how long the keeper may take to answer: without its application a call would wait on."""
        self._patience_s = patience_s
        self._files = files
        self._keeper: Any = keeper
        self._chunks = chunks
        self._copies = copies
        self._held = LockedFiles()
        self._node = node
        self._on_brought = on_brought
        self._announcing: set[asyncio.Task[None]] = set()

    async def path(self, spec: AdapterSpec, filename: str | None = None) -> Path:
        """Return a local file with exactly the bytes of the spec: its first, or another of its files.

        It stays there at least until `release`.

        Raises:
            LoraplexError: no peer has it and the Hub's download fails.
        """
        return await self._shared(spec, filename or spec.filename, lambda: self._files.path(spec, filename))

    def release(self, spec: AdapterSpec) -> None:
        """Let go of the adapter's files: from now on they may be removed to make room."""
        self._held.release(spec.key)
        self._files.release(spec)

    def free_space(self, needed_bytes: int) -> int:
        """Remove what came from peers, then what else can be had again, until so many bytes are free; return how
        many became so. Blocks."""
        freed = self._copies.free_space(needed_bytes)
        return freed + (self._files.free_space(needed_bytes - freed) if freed < needed_bytes else 0)

    async def _shared(self, spec: AdapterSpec, filename: str, fetch: Callable[[], Awaitable[Path]]) -> Path:
        if spec.origin not in REMOTE:
            return await fetch()
        key = f"{spec.location}@{spec.revision}/{filename}"
        if (copy := await asyncio.to_thread(self._copies.find, key)) is not None:
            return self._held.add(spec.key, copy)
        # A copy that fails is forgotten, and the next replica to ask fetches for all.
        for _ in range(2):
            try:
                async with asyncio.timeout(self._patience_s):
                    known = await self._keeper.claim.remote(key)
            except INDEX_FAILURES as error:
                silence = type(error).__name__
                log.warning("the index of shared files does not answer (%s): %s is fetched", silence, spec.id)
                break
            if known is None:
                return await self._announced(key, spec, fetch)
            if known.node == self._node:
                break
            if (copy := await self._copied(key, known)) is not None:
                return self._held.add(spec.key, copy)
        return await self._fetched(spec, fetch)

    async def _fetched(self, spec: AdapterSpec, fetch: Callable[[], Awaitable[Path]]) -> Path:
        path = await fetch()
        self._on_brought(spec.origin)
        return path

    async def _announced(self, key: str, spec: AdapterSpec, fetch: Callable[[], Awaitable[Path]]) -> Path:
        """Fetch what all others wait for, and have them told how it ended."""
        try:
            path = await self._fetched(spec, fetch)
        except BaseException:
            with suppress(*INDEX_FAILURES):
                await self._keeper.release_claim.remote(key)
            raise
        # Beside the request that brought it, which need not wait for others to be served.
        task = asyncio.create_task(self._announce(key, path), name=f"announcing {key}")
        self._announcing.add(task)
        task.add_done_callback(self._announcing.discard)
        return path

    async def _announce(self, key: str, path: Path) -> None:
        try:
            await self._keeper.announce.remote(key, await asyncio.to_thread(put_file, self._chunks, path, self._node))
        except INDEX_FAILURES as error:
            log.warning("%s could not be offered to peers (%s)", key, type(error).__name__)
            with suppress(*INDEX_FAILURES):
                await self._keeper.release_claim.remote(key)

    async def _copied(self, key: str, file: SharedFile) -> LockedFile | None:
        try:
            copy = await asyncio.to_thread(self._copy, key, file)
        except (*INDEX_FAILURES, ValueError) as error:
            log.warning("%s could not be copied from a peer (%s)", key, type(error).__name__)
            if not isinstance(error, OSError) or not is_disk_full(error):
                with suppress(*INDEX_FAILURES):
                    await self._keeper.invalidate.remote(key, file.sha256)
            return None
        self._on_brought("peer")
        return copy

    def _copy(self, key: str, file: SharedFile) -> LockedFile:
        with self._copies.draft(key) as draft:
            self._copies.with_room(lambda: get_file(self._chunks, file, draft), file.size_bytes)
            return self._copies.commit(key, draft)


def share(
    files: AdapterFiles,
    keeper: DeploymentHandle,
    settings: SharingSettings,
    *,
    cache_dir: Path,
    on_brought: Callable[[str], None],
) -> SharedFiles:
    """Return the same files, brought to this node once for the cluster where that can be."""
    return SharedFiles(
        files,
        keeper,
        ObjectStore(),
        copies=DownloadCache(cache_dir / "peers", settings.disk, clock=time.time),
        node=ray.get_runtime_context().get_node_id(),
        on_brought=on_brought,
        patience_s=settings.wait_timeout_s + KEEPER_MARGIN_S,
    )


def put_file(store: ObjectStore, path: Path, node: str, *, chunk_bytes: int = CHUNK_BYTES) -> SharedFile:
    """Make a file available to all nodes; blocks."""
    digest = hashlib.sha256()
    chunks: list[Any] = []
    size_bytes = 0
    with path.open("rb") as file:
        while read := file.read(chunk_bytes):
            digest.update(read)
            size_bytes += len(read)
            chunks.append(store.put(read))
    return SharedFile(node, digest.hexdigest(), size_bytes, tuple(chunks))


def get_file(store: ObjectStore, file: SharedFile, draft: PartialDownload) -> None:
    """Write a peer's file to `draft`, from its beginning; blocks.

    Raises:
        ValueError: the bytes are not those that were announced.
        RayError: the peer or its memory is gone, or a chunk took too long.
        OSError: the disk failed.
    """
    draft.restart()
    for chunk in file.chunks:
        draft.add(store.get(chunk))
    if draft.sha256() != file.sha256:
        raise ValueError("the digest of a shared file differs")
