"""Which files the nodes of a cluster have: of adapters, and which node fetches which, for `sharing`; of bases, for
`base_files`.

Owns the claims and the references to announced files; it holds no bytes. Must not know Ray, or how files are fetched,
copied or checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from serve_app.store.budget import ByteBudget


@dataclass(frozen=True, slots=True)
class SharedFile:
    """A file that a peer has put into Ray's object store: its node, its digest, and references to its chunks."""

    node: str
    sha256: str
    size_bytes: int
    chunks: tuple[Any, ...]


class DownloadCoordinator:
    """Which replica fetches which file, and which files were fetched.

    Invariants: while one replica fetches a key, for at most `patience_s`, no other is told to. Files that were asked
    for least recently are forgotten, so that those known never exceed the budget.
    """

    def __init__(self, *, patience_s: float, budget_bytes: int, clock: Callable[[], float]) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._budget = ByteBudget(budget_bytes)
        self._known: dict[str, SharedFile] = {}
        self._fetching: dict[str, tuple[float, asyncio.Event]] = {}

    async def claim(self, key: str) -> SharedFile | None:
        """Return the file, waiting for a replica that fetches it; None means that the caller is to fetch it."""
        while True:
            if (file := self._known.get(key)) is not None:
                self._forget(self._budget.add(key, file.size_bytes).evict)
                return file
            if key not in self._fetching:
                self._fetching[key] = (self._clock(), asyncio.Event())
                return None
            since, done = self._fetching[key]
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), max(0.0, since + self._patience_s - self._clock()))
            if not done.is_set():
                # Anyone who fetches is slow or dead. One of those who wait takes over, the others wait for that one.
                self.release_claim(key)

    def announce(self, key: str, file: SharedFile) -> None:
        """Make a fetched file known to all who wait for it and all who will ask."""
        self._known[key] = file
        self._forget(self._budget.add(key, file.size_bytes).evict)
        self.release_claim(key)

    def release_claim(self, key: str) -> None:
        """Take back a claim; the next who asks, or who waits, gets it."""
        _, done = self._fetching.pop(key, (0.0, None))
        if done is not None:
            done.set()

    def invalidate(self, key: str, sha256: str) -> None:
        """Forget a file whose bytes could not be had."""
        if (file := self._known.get(key)) is not None and file.sha256 == sha256:
            self._forget(self._budget.forget(key).evict)

    def _forget(self, keys: tuple[str, ...]) -> None:
        # Dropping the references frees the chunks in Ray's object store.
        for key in keys:
            self._known.pop(key, None)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository; `digest` is what the Hub calls its bytes: a SHA-256, of a small file the git blob id."""

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class HubSnapshot:
    """Files of a Hub repository at a commit, which `revision` was when a node asked; `node` has them."""

    repository: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]
    node: str = ""


class OfferedBases:
    """Which nodes have which files of bases, as they said last. Nodes that went are forgotten."""

    def __init__(self) -> None:
        self._offers: dict[tuple[str, str, str], HubSnapshot] = {}

    def offer(self, snapshots: Sequence[HubSnapshot]) -> None:
        """Know from now on what a node has."""
        for one in snapshots:
            key = one.node, one.repository, one.revision
            self._offers.pop(key, None)  # the newest is the last
            self._offers[key] = one

    def of(self, repositories: Collection[str], alive: Collection[str]) -> tuple[HubSnapshot, ...]:
        """Return what the nodes that are alive have of some repositories, what was offered last first."""
        self._offers = {key: one for key, one in self._offers.items() if one.node in alive}
        return tuple(one for one in reversed(self._offers.values()) if one.repository in repositories)
