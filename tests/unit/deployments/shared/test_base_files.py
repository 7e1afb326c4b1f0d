"""Files of bases from peers, a mirror and the Hub, in this order: the real Hub client on both sides, without Ray."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock
from ray.exceptions import GetTimeoutError, RayTaskError

from serve_app.catalog.sources.download_cache import PartialDownload
from serve_app.deployments.shared.base_files import BaseFiles, Peer, PeerChunks, read_chunk
from serve_app.deployments.shared.file_index import HubFile, HubSnapshot, OfferedBases
from serve_app.deployments.shared.hub_cache import HubCache
from serve_app.source_settings import BaseFileSettings
from tests.hub_responses import sha256
from tests.hub_server import CDN, ErrorDetail, HubServer
from tests.s3_server import S3Server
from tests.unit.deployments.local_handle import LocalHandle

WEIGHTS, SMALL = bytes(range(256)) * 400, b'{"_class_name": "Pipeline"}'
FILES = {"model_index.json": SMALL, "unet/model.safetensors": WEIGHTS, "vae/model.safetensors": WEIGHTS[::-1]}
OTHER = dict.fromkeys(FILES, bytes(len(WEIGHTS)))
SIZE = 2 * len(WEIGHTS)


@dataclass(frozen=True)
class Everything:
    """What is needed of a repository: all of it."""

    repository: str
    revision: str | None = None

    def choose(self, names: Collection[str]) -> set[str]:
        return set(names)


class Nodes(PeerChunks):
    """Some nodes with a cache each, their keeper, and the tasks that read on them."""

    def __init__(self, root: Path, hub: HubServer, store: str | None = None) -> None:
        self.root, self.hub, self.store = root, hub, store
        self.bases, self.alive = OfferedBases(), set[str]()
        self.is_keeper_away = False
        self.asked: list[str] = []
        self.unread = self.most_unread = 0
        self.now_s, self.chunk_s = 0.0, 0.0

    # The keeper

    async def offer_base(self, snapshots: list[HubSnapshot]) -> None:
        self.bases.offer(snapshots)

    async def base_offers(self, repositories: list[str]) -> tuple[HubSnapshot, ...]:
        if self.is_keeper_away:
            raise OSError("the keeper is away")
        return self.bases.of(repositories, self.alive)

    # The tasks

    def ask(self, node: str, repository: str, digest: str, start: int, size_bytes: int) -> Any:
        self.asked.append(node)
        self.unread += 1
        self.most_unread = max(self.unread, self.most_unread)
        return self.root / node, repository, digest, start, size_bytes

    def get(self, asked: Any, until: float) -> memoryview:
        self.unread -= 1
        self.now_s += self.chunk_s
        if self.now_s > until:
            raise GetTimeoutError
        folder, *what = asked
        try:
            return memoryview(read_chunk(*what, cache=HubCache(folder)))
        except OSError as error:
            raise RayTaskError("read_chunk", "", error).as_instanceof_cause() from None

    def clock(self) -> float:
        return self.now_s

    # The nodes

    def node(self, name: str, repository: str, revision: str | None = None) -> BaseFiles:
        self.alive.add(name)
        settings = BaseFileSettings(from_peers=True, store=self.store)
        needs, keeper = [cast(Any, Everything(repository, revision))], cast(Any, LocalHandle(self))
        cache = HubCache(self.root / name, endpoint=self.hub.endpoint)
        return BaseFiles(settings, needs, keeper, node=name, cache=cache, chunks=self)

    async def filled(self, name: str, repository: str) -> None:
        """Have a node fetch everything from the Hub, and offer it."""
        await asyncio.to_thread(self.client, name, repository)
        await self.node(name, repository)._offer()

    def client(self, name: str, repository: str, **options: Any) -> dict[str, bytes]:
        """Return the files of a repository as the Hub's own client gives them to a node."""
        folder = Path(snapshot_download(repository, endpoint=self.hub.endpoint, cache_dir=self.root / name, **options))
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def blobs(self, name: str, repository: str) -> list[Path]:
        return sorted(HubCache(self.root / name).blob(repository, "0" * 40).parent.glob("*"))

    def downloads(self, repository: str) -> int:
        return self.hub.count(repository, CDN, "GET")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def nodes(tmp_path: Path, hub: HubServer) -> Nodes:
    return Nodes(tmp_path, hub)


@pytest.fixture
def mirrored(nodes: Nodes, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    s3.set_up(monkeypatch)
    nodes.store = f"s3://{s3.bucket({})}/bases"
    return nodes


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


def mirror(s3: S3Server, nodes: Nodes, repository: str, files: dict[str, bytes]) -> None:
    bucket, _, prefix = str(nodes.store).removeprefix("s3://").partition("/")
    s3.put(bucket, {f"{prefix}/{repository}/{name}": content for name, content in files.items()})


async def test_weights_come_from_a_peer_and_the_hubs_client_takes_them_for_its_own(
    hub: HubServer, nodes: Nodes
) -> None:
    hub.push("me/peer", FILES)
    await nodes.filled("a", "me/peer")
    loaded = nodes.downloads("me/peer")
    assert await nodes.node("b", "me/peer").bring() == {"peer": SIZE}
    assert await asyncio.to_thread(nodes.client, "b", "me/peer") == FILES
    assert nodes.downloads("me/peer") == loaded
    assert await nodes.node("b", "me/peer").bring() == {}


@pytest.mark.parametrize(
    ("peers", "in_mirror", "came"),
    [
        ("sound", FILES, {"peer": SIZE}),
        ("damaged, sound", FILES, {"peer": SIZE}),
        ("damaged", FILES, {"store": SIZE}),
        ("without the files", FILES, {"store": SIZE}),
        ("gone", FILES, {"store": SIZE}),
        ("", {"unet/model.safetensors": WEIGHTS}, {"store": SIZE // 2, "hub": SIZE // 2}),
        ("damaged", OTHER, {"hub": SIZE}),
        ("", dict.fromkeys(FILES, b"short"), {"hub": SIZE}),
    ],
)
async def test_a_copy_that_is_not_what_the_hub_names_costs_a_fetch_from_the_next_source(
    hub: HubServer, mirrored: Nodes, s3: S3Server, request: Any, peers: str, in_mirror: Any, came: dict[str, int]
) -> None:
    repository = f"me/order-{request.node.callspec.indices['peers']}"
    hub.push(repository, FILES)
    mirror(s3, mirrored, repository, in_mirror)
    states = dict(zip(("p0", "p1"), peers.split(", ") if peers else (), strict=False))
    for name, state in states.items():
        await mirrored.filled(name, repository)
        for blob in mirrored.blobs(name, repository):
            if state == "damaged":
                blob.write_bytes(bytes(blob.stat().st_size))
            elif state == "without the files":
                blob.unlink()
        mirrored.alive -= {name} if state == "gone" else set()
    assert await mirrored.node("late", repository).bring() == came
    assert mirrored.asked[:1] == [name for name in ("p0",) if states.get(name, "gone") != "gone"]
    assert not [blob for blob in mirrored.blobs("late", repository) if blob.suffix]
    assert await asyncio.to_thread(mirrored.client, "late", repository) == FILES


async def test_a_peer_that_lacks_one_file_is_asked_for_the_next_and_one_that_gives_another_is_not(
    hub: HubServer, nodes: Nodes
) -> None:
    hub.push("me/two", FILES)
    for name in ("p0", "p1"):
        await nodes.filled(name, "me/two")
    HubCache(nodes.root / "p1").blob("me/two", sha256(WEIGHTS)).unlink()
    for blob in nodes.blobs("p0", "me/two"):
        blob.write_bytes(bytes(blob.stat().st_size))
    assert await nodes.node("late", "me/two").bring() == {"hub": SIZE // 2, "peer": SIZE // 2}
    assert nodes.asked == ["p0", "p1", "p1"]


async def test_what_a_replica_left_that_was_killed_while_it_wrote_is_removed_and_what_is_written_now_is_not(
    hub: HubServer, nodes: Nodes
) -> None:
    hub.push("me/killed", FILES)
    await asyncio.to_thread(nodes.client, "a", "me/killed")
    whole = nodes.blobs("a", "me/killed")
    abandoned, written = (whole[0].with_name(f"{digit * 64}.12345678.incomplete") for digit in "ab")
    for draft in (abandoned, written):
        draft.write_bytes(WEIGHTS)
    with WeakFileLock(nodes.root / "a" / ".locks" / "models--me--killed" / f"{'b' * 64}.lock"):
        assert await nodes.node("a", "me/killed").bring() == {}
    assert nodes.blobs("a", "me/killed") == sorted([*whole, written])


async def test_where_the_hub_does_not_answer_what_the_peers_have_is_the_base(hub: HubServer, nodes: Nodes) -> None:
    hub.push("me/away", FILES)
    await nodes.filled("a", "me/away")
    hub.fail("me/away", ErrorDetail(status=503))
    assert await nodes.node("b", "me/away").bring() == {"peer": SIZE + len(SMALL)}
    assert await asyncio.to_thread(nodes.client, "b", "me/away", local_files_only=True) == FILES
    nodes.is_keeper_away = True
    assert await nodes.node("c", "me/away").bring() == {}


async def test_a_part_of_what_the_peers_said_does_not_pass_for_the_base(hub: HubServer, nodes: Nodes) -> None:
    hub.push("me/part", FILES)
    await nodes.filled("a", "me/part")
    HubCache(nodes.root / "a").blob("me/part", sha256(WEIGHTS)).unlink()
    hub.fail("me/part", ErrorDetail(status=503))
    assert (await nodes.node("b", "me/part").bring())["hub"] >= len(WEIGHTS)
    with pytest.raises(LocalEntryNotFoundError):
        nodes.client("b", "me/part", local_files_only=True)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_hub_that_refuses_the_token_has_answered(hub: HubServer, nodes: Nodes, status: int) -> None:
    repository = f"me/refused-{status}"
    hub.push(repository, FILES)
    await nodes.filled("a", repository)
    # What the Hub says to a token that is not valid, which its client does not take for a missing repository.
    headers = {"x-error-message": "Invalid credentials in Authorization header"}
    hub.fail(repository, ErrorDetail(status=status, headers=headers))
    assert await nodes.node("b", repository).bring() == {}
    assert nodes.blobs("b", repository) == []


async def test_peers_open_no_repository_that_the_hub_does_not_open(hub: HubServer, nodes: Nodes) -> None:
    for repository, close in (("me/private", hub.hide), ("me/gated", hub.gate)):
        hub.push(repository, FILES)
        await nodes.filled("a", repository)
        close(repository)
        await nodes.node("b", repository).bring()
        with pytest.raises(RepositoryNotFoundError):
            await asyncio.to_thread(nodes.client, "b", repository)
    # The Hub lists what is gated, so its files are brought in vain.
    assert nodes.blobs("b", "me/private") == []


def test_one_process_of_a_node_brings_a_file_while_others_wait_the_hubs_client_among_them(tmp_path: Path) -> None:
    file = HubFile("model.safetensors", sha256(WEIGHTS), len(WEIGHTS))
    brought: list[str] = []

    def bring(draft: PartialDownload) -> bool:
        (lock,) = tmp_path.glob(f".locks/models--me--base/{file.digest}.lock")
        with lock.open() as held, pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft.add(WEIGHTS)
        brought.append(file.name)
        return True

    for _ in range(2):  # the second has waited meanwhile
        HubCache(tmp_path).add("me/base", file, bring)
    assert brought == [file.name]


async def test_a_file_of_many_chunks_is_never_as_a_whole_in_memory(hub: HubServer, nodes: Nodes) -> None:
    hub.push("me/chunks", FILES)
    await nodes.filled("a", "me/chunks")
    (offer,) = nodes.bases.of(["me/chunks"], {"a"})
    file = next(one for one in offer.files if one.name == "unet/model.safetensors")
    peer = Peer("a", frozenset({file.digest}), nodes, chunk_bytes=1000)

    def bring(draft: Any) -> bool:
        peer.write("me/chunks", file, draft)
        return True

    cache = HubCache(nodes.root / "b")
    await asyncio.to_thread(cache.add, "me/chunks", file, bring)
    assert cache.blob("me/chunks", file.digest).read_bytes() == WEIGHTS
    assert (len(nodes.asked), nodes.most_unread) == (-(-len(WEIGHTS) // 1000), 3)


@pytest.mark.parametrize(("seconds", "is_whole"), [(60.02, True), (60.03, False), (6000.0, False)])
async def test_a_peer_has_a_minute_and_then_as_long_as_the_least_pace_takes(
    hub: HubServer, nodes: Nodes, request: Any, seconds: float, is_whole: bool
) -> None:
    repository = f"me/pace-{request.node.callspec.indices['seconds']}"
    hub.push(repository, FILES)
    await nodes.filled("a", repository)
    (offer,) = nodes.bases.of([repository], {"a"})
    file = next(one for one in offer.files if one.name == "unet/model.safetensors")
    chunks = -(-len(WEIGHTS) // 1000)
    nodes.chunk_s = seconds / chunks
    path = nodes.root / "draft"
    draft = PartialDownload(path, path.open("w+b", buffering=0))
    with nullcontext() if is_whole else pytest.raises(GetTimeoutError):
        Peer("a", frozenset({file.digest}), nodes, chunk_bytes=1000).write(repository, file, draft)
    draft.close()
    assert nodes.now_s < 60.1 + nodes.chunk_s


@pytest.mark.parametrize(
    ("repository", "digest"),
    [("me/base", "../../../secret"), ("me/base", "/etc/passwd"), ("../..", "0" * 40), ("a/b/c", "0" * 40)],
)
def test_a_task_reads_nothing_but_blobs_of_the_hubs_cache(tmp_path: Path, repository: str, digest: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the Hub's own for repositories
        read_chunk(repository, digest, 0, 10, HubCache(tmp_path))
