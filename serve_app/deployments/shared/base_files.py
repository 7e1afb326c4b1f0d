"""Files of bases that are on the Hub, brought to this node before its client asks for them: from peers, then a mirror.

    replica -> the Hub: which files at which commit -> which of them are not in this node's cache
            -> Keeper.base_offers: who has them -> a task on that node reads a chunk, a few at a time
            -> the mirror, for what no peer could give; the rest is left to the Hub's client

Where the Hub does not answer, what a peer has counts. A file is added to the Hub client's cache only with the Hub's
digest, so that a failure on the way costs a fetch from the next source and nothing else; whether the service may have
the repository is for the Hub to say, whom that client asks afterwards as ever. At most a few chunks are in Ray's object
store at any time. Must not know what a base is.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.sources.bucket import Bucket
from serve_app.catalog.sources.download_cache import PartialDownload
from serve_app.catalog.sources.hub_errors import HUB_FAILURES
from serve_app.catalog.sources.remote_calls import DOWNLOAD, RemoteCalls
from serve_app.deployments.shared.file_index import HubFile, HubSnapshot
from serve_app.deployments.shared.hub_cache import DEFAULT_REVISION, HubCache
from serve_app.deployments.shared.sharing import INDEX_FAILURES
from serve_app.errors import LoraplexError, ModelNotFound
from serve_app.source_settings import AdapterStore, BaseFileSettings

if TYPE_CHECKING:
    from serve_app.engine.base.fetching import HubNeed

log = logging.getLogger(__name__)

KEEPER_TIMEOUT_S = 5.0
# A peer has that long to begin, and then as long as a file takes at the least pace.
PEER_TIMEOUT_S = 60.0
LEAST_BYTES_PER_S = 4 * 1024**2
CHUNK_BYTES = 16 * 1024**2
# That many are asked for ahead: one is written while the next are read and travel.
CHUNKS_AHEAD = 3
WEIGHTS = ".safetensors"
GIT_ID = 40  # hex digits
# Brought by another replica of this node meanwhile.
HERE = "here"

_FAILURES = (*INDEX_FAILURES, *HUB_FAILURES, LoraplexError)


def read_chunk(repository: str, digest: str, start: int, size_bytes: int, cache: HubCache | None = None) -> Any:
    """Return bytes of a file in this node's cache, which is named by its digest alone."""
    with (cache or HubCache()).blob(repository, digest).open("rb") as file:
        file.seek(start)
        # An array, unlike bytes, is later read in place.
        return np.frombuffer(file.read(size_bytes), dtype=np.uint8)


class PeerChunks:
    """Chunks of files on other nodes, by Ray tasks there, which take no CPU."""

    def __init__(self) -> None:
        self._read = ray.remote(num_cpus=0, max_retries=0)(read_chunk)
        self.clock = time.monotonic

    def ask(self, node: str, repository: str, digest: str, start: int, size_bytes: int) -> Any:
        """Have a chunk read on a node."""
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        return self._read.options(scheduling_strategy=there).remote(repository, digest, start, size_bytes)

    def get(self, asked: Any, until: float) -> memoryview:
        """Have a chunk brought to this node, by a time of `clock`."""
        return memoryview(ray.get(asked, timeout=max(0.0, until - self.clock())))


@dataclass(frozen=True, slots=True)
class Peer:
    """A node that has offered some files."""

    node: str
    digests: frozenset[str]
    chunks: PeerChunks
    chunk_bytes: int = CHUNK_BYTES
    name: str = "peer"

    def write(self, repository: str, file: HubFile, draft: PartialDownload) -> None:
        """Write a file that this node has.

        Raises:
            ModelNotFound, FileNotFoundError: this node has not offered it, or has lost it.
            RayError: this node is gone or too slow.
        """
        if file.digest not in self.digests:
            raise ModelNotFound(repository, f"{file.name} is not on this peer")
        begun, starts = self.chunks.clock(), range(0, file.size_bytes, self.chunk_bytes)
        asking = (self.chunks.ask(self.node, repository, file.digest, one, self.chunk_bytes) for one in starts)
        asked = deque(islice(asking, CHUNKS_AHEAD))
        while asked:
            until = begun + PEER_TIMEOUT_S + draft.size_bytes / LEAST_BYTES_PER_S
            draft.add(self.chunks.get(asked.popleft(), until))
            asked.extend(islice(asking, 1))


class Mirror:
    """A bucket with repositories of the Hub, as `hf download --local-dir` writes them."""

    name = "store"

    def __init__(self, settings: AdapterStore) -> None:
        """Connect to nothing yet."""
        self._bucket = Bucket(settings)
        self._calls = RemoteCalls(self._bucket.remote)

    def write(self, repository: str, file: HubFile, draft: PartialDownload) -> None:
        """Write the object of a file, if it has the same size."""
        until = self._calls.clock() + self._bucket.settings.download_timeout_s

        def fetch() -> None:
            stored = self._bucket.describe(f"{self._bucket.root}/{repository}/{file.name}")
            if stored.size_bytes != file.size_bytes:
                raise ModelNotFound(repository, f"{file.name} in the mirror is another")
            # Checked by the Hub's digest, which is the better one.
            one = replace(stored, md5=None)
            self._bucket.fetch(one, draft, model=repository, is_over=lambda: self._calls.clock() > until)

        self._calls.retry(fetch, repository, None, until, DOWNLOAD, lambda: draft.size_bytes)


class BaseFiles:
    """What one base needs of the Hub, on this node.

    Nothing here fails a start: what could not be brought is left to the Hub's client.
    """

    def __init__(
        self,
        settings: BaseFileSettings,
        needs: Sequence[HubNeed],
        keeper: DeploymentHandle,
        *,
        node: str,
        cache: HubCache,
        chunks: PeerChunks | None = None,
    ) -> None:
        """`chunks` None are Ray's."""
        self._settings = settings
        self._needs = needs
        self._keeper: Any = keeper
        self._node = node
        self._cache = cache
        self._chunks = chunks or PeerChunks()
        self._offered: tuple[HubSnapshot, ...] | None = None
        self._offering: asyncio.Task[None] | None = None

    async def bring(self) -> Counter[str]:
        """Bring what is not here; return the bytes from each source, "hub" for what is left to the Hub's client."""
        came: Counter[str] = Counter()
        for need in self._needs if self._settings.from_peers or self._settings.store else ():
            try:
                brought = await self._bring(need)
            except _FAILURES as error:
                log.warning("%s is left to the Hub's client (%s)", need.repository, type(error).__name__)
                continue
            if brought:
                log.info("bytes of %s that were not here, by source: %s", need.repository, dict(brought))
            came += brought
        return came

    def offer(self) -> None:
        """Tell the keeper what this node has for others, in the background: the keeper may start later than this."""
        if self._settings.from_peers and self._needs:
            self._offering = asyncio.create_task(self._offer(), name="offering a base")

    async def _offer(self) -> None:
        try:
            await self._keeper.offer_base.remote(await asyncio.to_thread(self._here))
        except INDEX_FAILURES as error:
            log.warning("what this node has of its base is not offered to others (%s)", type(error).__name__)

    def _here(self) -> list[HubSnapshot]:
        found = (self._cache.snapshot(need.repository, _revision(need), self._node) for need in self._needs)
        return [one for one in found if one is not None]

    async def _bring(self, need: HubNeed) -> Counter[str]:
        await asyncio.to_thread(self._cache.clear_drafts, need.repository)
        try:
            listed = await run_blocking(lambda: self._cache.listed(need.repository, _revision(need)))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return Counter()  # the Hub's client will be told so too
        snapshot = listed or self._as_offered(need, await self._offers(need.repository))
        if snapshot is None:
            return Counter()
        chosen = need.choose([file.name for file in snapshot.files])
        # Small files cost the Hub's client less than they would a peer.
        files = [one for one in snapshot.files if one.name in chosen and (not listed or one.name.endswith(WEIGHTS))]
        missing = self._cache.missing(need.repository, files)
        offers = await self._offers(need.repository) if missing else ()
        came = await asyncio.to_thread(self._fetch_all, need.repository, missing, offers)
        # A part of a base would pass for the whole one, which then cannot be loaded.
        if listed is None and not self._cache.missing(need.repository, files):
            await asyncio.to_thread(self._cache.link, replace(snapshot, files=tuple(files)))
        return came

    def _as_offered(self, need: HubNeed, offers: Sequence[HubSnapshot]) -> HubSnapshot | None:
        """Return the commit that is here already or else was offered last, with all files of it that peers have."""
        revision = _revision(need)
        commits = [one.commit for one in offers if revision in (one.revision, one.commit)]
        commit = self._cache.commit(need.repository, revision) or next(iter(commits), None)
        files = {file.name: file for one in offers if one.commit == commit for file in one.files}
        return HubSnapshot(need.repository, revision, commit, tuple(files.values())) if commit and files else None

    async def _offers(self, repository: str) -> tuple[HubSnapshot, ...]:
        if self._offered is None:
            self._offered = await self._ask_keeper() if self._settings.from_peers else ()
        return tuple(one for one in self._offered if one.repository == repository and one.node != self._node)

    async def _ask_keeper(self) -> tuple[HubSnapshot, ...]:
        try:
            # Where its application is not there yet, a call would wait for it.
            async with asyncio.timeout(KEEPER_TIMEOUT_S):
                return await self._keeper.base_offers.remote([need.repository for need in self._needs])
        except INDEX_FAILURES as error:
            log.warning("the keeper does not say which nodes have the base (%s)", type(error).__name__)
            return ()

    def _fetch_all(self, repository: str, files: Sequence[HubFile], offers: Sequence[HubSnapshot]) -> Counter[str]:
        # Each node asks the others in an order of its own, so that many that start together ask not all the first.
        peers = sorted({one.node for one in offers}, key=lambda node: zlib.crc32(f"{self._node} {node}".encode()))
        sources: list[Peer | Mirror] = [
            Peer(node, frozenset(file.digest for one in offers if one.node == node for file in one.files), self._chunks)
            for node in peers
        ]
        sources += [Mirror(store) for store in self._settings.stores]
        came: Counter[str] = Counter()
        for file in files:
            came[self._fetch(repository, file, sources)] += file.size_bytes
        del came[HERE]
        return came

    def _fetch(self, repository: str, file: HubFile, sources: list[Peer | Mirror]) -> str:
        """Bring one file; return where it came from.

        A source that fails, or gives what is another file, is removed: it would hold up every file.
        """
        came = HERE

        def bring(draft: PartialDownload) -> bool:
            nonlocal came
            for source in tuple(sources):
                draft.restart()
                try:
                    source.write(repository, file, draft)
                    if file.digest == (draft.git_id() if len(file.digest) == GIT_ID else draft.sha256()):
                        came = source.name
                        return True
                    reason = "another digest"
                except (ModelNotFound, FileNotFoundError):  # it may have the others
                    continue
                except _FAILURES as error:
                    reason = type(error).__name__
                log.warning("no %s for %s of %s (%s)", source.name, file.name, repository, reason)
                sources.remove(source)
            came = "hub"
            return False

        self._cache.add(repository, file, bring)
        return came


def _revision(need: HubNeed) -> str:
    return need.revision or DEFAULT_REVISION
