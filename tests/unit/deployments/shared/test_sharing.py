"""Adapter files between nodes, without Ray: who fetches, who waits, who copies, and what happens when that fails."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from serve_app.catalog.sources.download_cache import DownloadCache
from serve_app.core import AdapterSpec
from serve_app.deployments.shared.file_index import DownloadCoordinator, SharedFile
from serve_app.deployments.shared.sharing import SharedFiles, get_file, put_file
from serve_app.errors import HubUnavailable
from tests.clock import Clock
from tests.small_disk import leave_room
from tests.unit.deployments.local_handle import LocalHandle

CONTENT = bytes(range(256)) * 64
SPEC = AdapterSpec(
    id="acme/night",
    base_id="demo/sd15",
    revision="c" * 40,
    filename="night.safetensors",
    origin="hub",
    location="acme/night",
    size_bytes=len(CONTENT),
    embeddings="words.safetensors",
)


@dataclass
class Memory:
    """The object store of a cluster, as a dictionary."""

    kept: dict[int, bytes] = field(default_factory=dict)

    def put(self, chunk: bytes) -> int:
        self.kept[len(self.kept)] = chunk
        return len(self.kept) - 1

    def get(self, reference: int) -> memoryview:
        if reference not in self.kept:
            raise OSError("the owner of this chunk died")
        return memoryview(self.kept[reference])


@dataclass
class Hub:
    """The Hub as a node's catalog reaches it: every call is a download."""

    folder: Path
    downloads: list[str] = field(default_factory=list)
    failure: Exception | None = None
    held: asyncio.Event | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    released: list[str] = field(default_factory=list)
    asked_room: list[int] = field(default_factory=list)

    async def path(self, spec: AdapterSpec, filename: str | None = None) -> Path:
        return await self._download(spec, filename or spec.filename)

    def release(self, spec: AdapterSpec) -> None:
        self.released.append(spec.key)

    def free_space(self, needed_bytes: int) -> int:
        self.asked_room.append(needed_bytes)
        return needed_bytes

    async def _download(self, spec: AdapterSpec, filename: str) -> Path:
        self.downloads.append(filename)
        self.begun.set()
        if self.held is not None:
            await self.held.wait()
        if self.failure is not None:
            raise self.failure
        path = self.folder / f"{spec.location.replace('/', '-')}-{filename}"
        path.write_bytes(CONTENT + filename.encode())
        return path


class Keeper:
    """The keeper of a cluster, reached without a network."""

    def __init__(self, flights: DownloadCoordinator) -> None:
        self.flights = flights
        self.is_down = False

    def _reach(self) -> DownloadCoordinator:
        if self.is_down:
            raise OSError("the index is down")
        return self.flights

    async def claim(self, key: str) -> SharedFile | None:
        return await self._reach().claim(key)

    async def announce(self, key: str, file: SharedFile) -> None:
        self._reach().announce(key, file)

    async def release_claim(self, key: str) -> None:
        self._reach().release_claim(key)

    async def invalidate(self, key: str, sha256: str) -> None:
        self._reach().invalidate(key, sha256)


class Nodes:
    """Some nodes of one cluster, each with a folder and a way to the Hub of its own."""

    def __init__(self, root: Path, *, patience_s: float = 60.0, budget_bytes: int = 1 << 30) -> None:
        self.memory = Memory()
        self.index = Keeper(DownloadCoordinator(patience_s=patience_s, budget_bytes=budget_bytes, clock=Clock()))
        self.root = root
        self.brought: list[tuple[str, str]] = []
        self.hubs: dict[str, Hub] = {}
        self.ticks = itertools.count(1000)

    def node(self, name: str, *, disk_bytes: int = 1 << 30, folder: Path | None = None) -> SharedFiles:
        (self.root / name).mkdir(exist_ok=True)
        self.hubs[name] = hub = Hub(self.root / name)
        return SharedFiles(
            hub,
            cast(Any, LocalHandle(self.index)),
            self.memory,
            copies=DownloadCache(
                folder or self.root / name / "peers", disk_bytes, clock=lambda: float(next(self.ticks))
            ),
            node=name,
            on_brought=lambda tier: self.brought.append((name, tier)),
        )


def numbered(number: int) -> AdapterSpec:
    return replace(SPEC, id=f"acme/{number}", location=f"acme/{number}")


async def bring_from_peer(nodes: Nodes, late: SharedFiles, number: int) -> Path:
    await nodes.node("a").path(numbered(number))
    path = await late.path(numbered(number))
    assert path.read_bytes() == CONTENT + SPEC.filename.encode()
    return path


def copies(nodes: Nodes, name: str) -> list[Path]:
    return sorted((nodes.root / name / "peers").glob("*.safetensors"))


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


async def test_a_file_is_fetched_from_the_hub_once_for_all_nodes(nodes: Nodes) -> None:
    four = [nodes.node(name) for name in "abcd"]
    paths = await asyncio.gather(*(node.path(SPEC) for node in four))
    assert {path.read_bytes() for path in paths} == {CONTENT + SPEC.filename.encode()}
    assert sorted(tier for _, tier in nodes.brought) == ["hub", "peer", "peer", "peer"]
    assert len({path.parent for path in paths}) == 4


async def test_a_node_that_joins_later_copies_from_a_peer(nodes: Nodes) -> None:
    await nodes.node("a").path(SPEC)
    await nodes.node("late").path(SPEC)
    assert nodes.hubs["late"].downloads == []


async def test_a_file_that_came_from_a_peer_is_asked_for_once_a_node(nodes: Nodes) -> None:
    await nodes.node("a").path(SPEC)
    late = nodes.node("late")
    assert await late.path(SPEC) == await late.path(SPEC)
    assert nodes.brought.count(("late", "peer")) == 1


async def test_the_file_with_an_adapters_words_is_shared_too(nodes: Nodes) -> None:
    first = await nodes.node("a").path(SPEC, SPEC.embeddings)
    second = await nodes.node("b").path(SPEC, SPEC.embeddings)
    assert first.read_bytes() == second.read_bytes()
    assert nodes.hubs["b"].downloads == []


async def test_a_file_of_a_folder_never_leaves_its_node(nodes: Nodes) -> None:
    await nodes.node("a").path(replace(SPEC, origin="folder"))
    assert nodes.memory.kept == {}
    assert nodes.brought == []


async def test_when_the_first_fetch_fails_the_next_who_waits_fetches(nodes: Nodes) -> None:
    first, second = nodes.node("a"), nodes.node("b")
    nodes.hubs["a"].failure = HubUnavailable(SPEC.id, "on purpose")
    nodes.hubs["a"].held = asyncio.Event()
    failing = asyncio.ensure_future(first.path(SPEC))
    await asyncio.wait_for(nodes.hubs["a"].begun.wait(), 30)
    waiting = asyncio.ensure_future(second.path(SPEC))
    await asyncio.wait({waiting}, timeout=0.2)
    assert nodes.hubs["b"].downloads == []
    nodes.hubs["a"].held.set()
    with pytest.raises(HubUnavailable):
        await failing
    assert (await waiting).read_bytes() == CONTENT + SPEC.filename.encode()


async def test_a_peer_whose_memory_is_gone_costs_one_more_fetch_and_is_forgotten(nodes: Nodes) -> None:
    await nodes.node("a").path(SPEC)
    await nodes.node("x").path(SPEC)
    nodes.memory.kept.clear()
    await nodes.node("b").path(SPEC)
    await nodes.node("c").path(SPEC)
    assert [len(nodes.hubs[name].downloads) for name in "abc"] == [1, 1, 0]


async def test_bytes_that_are_not_those_announced_are_thrown_away(nodes: Nodes) -> None:
    await nodes.node("a").path(SPEC)
    await nodes.node("x").path(SPEC)
    nodes.memory.kept = {key: b"x" + chunk[1:] for key, chunk in nodes.memory.kept.items()}
    path = await nodes.node("b").path(SPEC)
    assert path.read_bytes() == CONTENT + SPEC.filename.encode()
    assert nodes.hubs["b"].downloads == [SPEC.filename]
    assert [path.name for path in (nodes.root / "b" / "peers").iterdir()] == [".lock"]


@pytest.mark.parametrize("damaged", [b"", CONTENT[:100], b"x" + CONTENT[1:] + SPEC.filename.encode()])
async def test_a_copy_that_was_altered_on_disk_is_not_used_and_brought_anew(nodes: Nodes, damaged: bytes) -> None:
    await nodes.node("a").path(SPEC)
    late = nodes.node("b")
    (await late.path(SPEC)).write_bytes(damaged)
    assert (await late.path(SPEC)).read_bytes() == CONTENT + SPEC.filename.encode()
    assert nodes.brought == [("a", "hub"), ("b", "peer"), ("b", "peer")]


async def test_without_the_index_every_node_fetches_for_itself(nodes: Nodes) -> None:
    nodes.index.is_down = True
    for name in "ab":
        assert (await nodes.node(name).path(SPEC)).read_bytes() == CONTENT + SPEC.filename.encode()
    assert nodes.brought == [("a", "hub"), ("b", "hub")]


async def test_what_came_from_peers_keeps_within_its_share_of_the_disk(nodes: Nodes) -> None:
    late = nodes.node("late", disk_bytes=2 * len(CONTENT))
    for number in range(4):
        await bring_from_peer(nodes, late, number)
        late.release(numbered(number))
    kept = copies(nodes, "late")
    assert len(kept) == 1
    assert kept == [await late.path(numbered(3))]


async def test_a_copy_in_use_outlives_its_share_of_the_disk_and_goes_when_it_is_released(nodes: Nodes) -> None:
    late = nodes.node("late", disk_bytes=2 * len(CONTENT))
    in_use = await bring_from_peer(nodes, late, 0)
    for number in (1, 2):
        await bring_from_peer(nodes, late, number)
        late.release(numbered(number))
    assert in_use in copies(nodes, "late")
    late.release(numbered(0))
    assert nodes.hubs["late"].released == [numbered(number).key for number in (1, 2, 0)]
    await bring_from_peer(nodes, late, 3)
    assert in_use not in copies(nodes, "late")


async def test_replicas_of_one_node_drop_copies_together_and_fail_nobody(nodes: Nodes) -> None:
    folder = nodes.root / "peers"
    pair = [nodes.node(name, disk_bytes=2 * len(CONTENT), folder=folder) for name in "bc"]
    first = nodes.node("a")
    for number in range(30):
        await first.path(numbered(number))

    async def bring_all(replica: SharedFiles) -> None:
        for number in range(30):
            assert (await replica.path(numbered(number))).read_bytes() == CONTENT + SPEC.filename.encode()
            replica.release(numbered(number))

    await asyncio.gather(*map(bring_all, pair))
    assert len(list(folder.glob("*.safetensors"))) <= 2


async def test_copies_make_room_on_a_full_disk_before_the_hubs_files_do(nodes: Nodes) -> None:
    late = nodes.node("late")
    await bring_from_peer(nodes, late, 0)
    in_use = await bring_from_peer(nodes, late, 1)
    late.release(numbered(0))
    size_bytes = in_use.stat().st_size
    assert await asyncio.to_thread(late.free_space, size_bytes) == size_bytes
    assert nodes.hubs["late"].asked_room == []
    assert await asyncio.to_thread(late.free_space, size_bytes) == size_bytes
    assert nodes.hubs["late"].asked_room == [size_bytes]
    assert copies(nodes, "late") == [in_use]


async def test_a_copy_that_finds_the_disk_full_takes_the_place_of_one_that_nobody_uses(
    nodes: Nodes, disk: Path
) -> None:
    late = nodes.node("late", folder=disk / "peers")
    await bring_from_peer(nodes, late, 0)
    late.release(numbered(0))
    leave_room(disk, len(CONTENT) // 2)
    await bring_from_peer(nodes, late, 1)
    assert nodes.brought.count(("late", "peer")) == 2


async def test_a_full_disk_costs_the_peers_nothing(nodes: Nodes, disk: Path) -> None:
    late = nodes.node("late", folder=disk / "peers")
    await bring_from_peer(nodes, late, 0)
    leave_room(disk, len(CONTENT) // 2)
    await nodes.node("a").path(numbered(1))
    await late.path(numbered(1))
    assert nodes.hubs["late"].downloads == [SPEC.filename]
    other = nodes.node("other")
    await other.path(numbered(1))
    assert nodes.hubs["other"].downloads == []


async def test_one_who_waits_too_long_takes_over_and_the_others_wait_for_that_one() -> None:
    clock = Clock()
    flights = DownloadCoordinator(patience_s=0.02, budget_bytes=1000, clock=clock)
    assert await flights.claim("k") is None
    waiting = [asyncio.ensure_future(flights.claim("k")) for _ in range(3)]
    done, still = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) >= 1
    assert all(task.result() is None for task in done)
    flights.announce("k", SharedFile("a", "digest", 10, ()))
    assert all([(await task) is not None for task in still])


async def test_files_asked_for_least_recently_are_forgotten_first() -> None:
    flights = DownloadCoordinator(patience_s=60, budget_bytes=20, clock=Clock())
    for key in ("old", "used"):
        assert await flights.claim(key) is None
        flights.announce(key, SharedFile("a", key, 10, ()))
    assert await flights.claim("old") is not None
    assert await flights.claim("new") is None
    flights.announce("new", SharedFile("a", "new", 10, ()))
    assert await flights.claim("old") is not None
    assert await flights.claim("used") is None


@pytest.mark.parametrize("content", [CONTENT, b""], ids=["several chunks", "empty"])
def test_a_file_arrives_whole(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    memory = Memory()
    shared = put_file(memory, path, "a", chunk_bytes=1000)
    assert len(shared.chunks) == -(-len(content) // 1000)
    assert shared.size_bytes == len(content)
    with DownloadCache(tmp_path / "copies", 1 << 30, clock=Clock()).draft("key") as draft:
        draft.add(b"of an attempt that broke off")
        get_file(memory, shared, draft)
        assert draft.path.read_bytes() == content
