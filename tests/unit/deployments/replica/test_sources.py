"""Hubs and disks that fail: what a replica makes ready, without Ray, over a real Hub, a real disk and the real checks.

What the catalog alone promises of a Hub in trouble is in `tests/unit/catalog`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from serve_app.catalog.catalog import Catalog, build_sources
from serve_app.config import AppConfig, Environment
from serve_app.core import AdapterRef, AdapterSpec
from serve_app.deployments.replica.parts import make_store
from serve_app.engine.adapters.deltas import ParsedAdapter
from serve_app.engine.admission.process import AdmissionProcess
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.errors import DiskFull, HubUnavailable, LoraplexError
from serve_app.refusals import RefusedAdapter
from serve_app.settings import AdapterLimits
from serve_app.source_settings import AdapterSources, HubSettings
from serve_app.store.store import AdapterStore, Tier
from tests.engine_cases import BASE, base_config, wrap
from tests.hub_server import CDN, FILE, ErrorDetail, HubServer
from tests.small_disk import leave_room
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import lora

WEIGHTS = "pytorch_lora_weights.safetensors"
CARD = f"---\nbase_model: {BASE}\ntags: [lora]\n---\n".encode()
CANONICAL, ORIGINAL = "admitted/*/*.canonical", "hub/*.safetensors"
UNFINISHED = ("hub/.*.draft", "admitted/.drafts-*/*/*", "**/*.partial")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline() -> BasePipeline:
    return wrap(tiny_pipeline("sd15"))


@pytest.fixture(scope="module")
def admission(pipeline: BasePipeline) -> Iterator[AdmissionProcess]:
    process = AdmissionProcess(pipeline.manifest, AdapterLimits())
    yield process
    process.close()


@pytest.fixture(scope="module")
def weights() -> bytes:
    return save(lora(tiny_pipeline("sd15")))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@dataclass
class Node:
    """A node with one replica's store, and an ingress' catalog elsewhere; `restart` keeps the disk alone."""

    hub: HubServer
    pipeline: BasePipeline
    admission: AdmissionProcess
    cache: Path
    elsewhere: Path
    settings: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hub = HubSettings.model_validate({"endpoint": self.hub.endpoint, "timeout_s": 20, **self.settings})
        self.config = AppConfig(bases=(base_config("sd15"),), adapters=AdapterSources(hub=hub, failure_ttl_s=600))
        places = build_sources(self.config, Environment(cache_dir=self.elsewhere), embedded_root=None)
        self.catalog = Catalog(self.config, places, clock=time.monotonic)
        self.store = self._store()

    def _store(self) -> AdapterStore[ParsedAdapter]:
        return make_store(
            self.config.bases[0], self.config, Environment(cache_dir=self.cache), pipeline=self.pipeline,
            admission=self.admission, keeper=None, on_brought=lambda _: None,
        )  # fmt: skip

    async def restart(self) -> None:
        await self.store.close()
        self.store = self._store()

    async def spec(self, model: str) -> AdapterSpec:
        return await self.catalog.adapter(AdapterRef(model))

    async def bring(self, model: str) -> tuple[str, Tier]:
        """Return the digest of the bytes that an adapter was made of, once it is in memory, and where it was."""
        async with self.store.lease(await self.spec(model)) as lease:
            assert all(torch.isfinite(tensor).all() for tensor in _factors(lease.adapter))
            return lease.adapter.digest, lease.tier

    def found(self, *patterns: str) -> list[Path]:
        return [path for pattern in patterns for path in self.cache.glob(pattern) if path.is_file()]

    def downloads(self) -> int:
        return self.hub.count(kind=CDN, method="GET")


def _factors(adapter: ParsedAdapter) -> list[torch.Tensor]:
    return [tensor for _, _, delta in adapter.layers() for tensor in (delta.down, delta.up)]  # type: ignore[union-attr]


@pytest.fixture
async def node(hub: HubServer, pipeline: BasePipeline, admission: AdmissionProcess, tmp_path: Path, weights: bytes):
    hub.push("me/sketch", {"README.md": CARD, WEIGHTS: weights})
    made = Node(hub, pipeline, admission, tmp_path / "node", tmp_path / "ingress")
    await made.spec("me/sketch")
    yield made
    await made.store.close()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def says_nothing_of(error: LoraplexError, node: Node) -> bool:
    return not any(secret in str(error) for secret in (str(node.cache), "127.0.0.1", "Errno", WEIGHTS))


# The Hub


async def test_a_hub_that_breaks_off_mid_file_is_asked_for_the_rest_alone(node: Node, weights: bytes) -> None:
    third = len(weights) // 3
    node.hub.fail("me/sketch", ErrorDetail(cut_after_bytes=third, times=2, kinds=(CDN,)))
    assert await node.bring("me/sketch") == (sha256(weights), "remote")
    ranges = [request.range for request in node.hub.requests if request.kind == CDN][-3:]
    assert ranges == [None, f"bytes={third}-", f"bytes={2 * third}-"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (ErrorDetail(cut_after_bytes=0, kinds=(CDN,)), "broke off"),
        (ErrorDetail(alters_bytes=True, kinds=(CDN,)), "not the file that the Hub names"),
        (ErrorDetail(claimed_bytes=10, kinds=(FILE,)), "10 bytes"),
        (ErrorDetail(claimed_bytes=10**9, kinds=(FILE,)), "1000000000"),
        (ErrorDetail(status=503), "status 503"),
    ],
    ids=["breaks off", "other bytes", "claims less", "claims more", "fails"],
)
async def test_nothing_that_came_in_part_or_altered_is_kept_and_a_hub_that_recovers_is_used_at_once(
    node: Node, weights: bytes, fault: ErrorDetail, reason: str
) -> None:
    node.hub.fail("me/sketch", fault)
    with pytest.raises(HubUnavailable, match=reason) as failure:
        await node.bring("me/sketch")
    assert (failure.value.status, says_nothing_of(failure.value, node)) == (503, True)
    assert node.found(CANONICAL, ORIGINAL, *UNFINISHED) == []
    node.hub.fail("me/sketch", None)
    assert await node.bring("me/sketch") == (sha256(weights), "remote")


async def test_a_hub_that_fails_for_a_moment_costs_a_pause_and_no_request(node: Node, weights: bytes) -> None:
    node.hub.fail("me/sketch", ErrorDetail(status=500, times=2, kinds=(FILE,)))
    assert await node.bring("me/sketch") == (sha256(weights), "remote")


async def test_a_hub_that_says_when_to_come_back_is_not_asked_sooner(node: Node, weights: bytes) -> None:
    node.hub.fail("me/sketch", ErrorDetail(status=429, headers={"retry-after": "1"}, times=1, kinds=(FILE,)))
    began = time.monotonic()
    assert (await node.bring("me/sketch"))[0] == sha256(weights)
    assert time.monotonic() - began >= 1.0


async def test_a_hub_that_limits_requests_for_long_is_asked_nothing_more_whatever_is_wanted(node: Node) -> None:
    node.hub.push("me/other", {"README.md": CARD, WEIGHTS: save(lora(tiny_pipeline("sd15"), seed=2))})
    await node.spec("me/other")
    node.hub.fail("me/sketch", ErrorDetail(status=429, headers={"retry-after": "60"}, kinds=(FILE,)))
    with pytest.raises(HubUnavailable, match="limiting requests; try again in 60 s"):
        await node.bring("me/sketch")
    before = node.hub.count()
    # Fewer by as much time as has passed.
    with pytest.raises(HubUnavailable, match=r"limiting requests; try again in ([1-5]?\d|60) s"):
        await node.bring("me/other")
    assert node.hub.count() == before


async def test_a_hub_that_went_down_and_came_back_is_used_without_a_restart(node: Node, weights: bytes) -> None:
    spec = await node.spec("me/sketch")
    node.hub.down()
    with pytest.raises(HubUnavailable, match="cannot be reached"):
        await node.bring("me/sketch")
    with HubServer(ports=node.hub.ports) as again:
        assert again.push("me/sketch", {"README.md": CARD, WEIGHTS: weights}) == spec.revision
        assert await node.bring("me/sketch") == (sha256(weights), "remote")


async def test_a_file_that_is_refused_is_not_fetched_and_read_again_for_a_while(node: Node) -> None:
    tensors = lora(tiny_pipeline("sd15"))
    wide = {key: tensor.repeat(1, 2) if "lora_A" in key else tensor for key, tensor in tensors.items()}
    commit = node.hub.push("me/wide", {"README.md": CARD, WEIGHTS: save(wide)})
    spec = AdapterSpec("me/wide", BASE, commit, WEIGHTS, "hub", "me/wide", 0)
    for _ in range(3):
        with pytest.raises(RefusedAdapter, match="me/wide"):
            async with node.store.lease(spec):
                pass
        for path in node.found(ORIGINAL):
            path.unlink()
    assert node.hub.count("me/wide", CDN, "GET") == 1


# The disk


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 0x10
    path.write_bytes(content)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [flip, halve, empty])
@pytest.mark.parametrize(("patterns", "fetched"), [((CANONICAL,), 0), ((CANONICAL, ORIGINAL), 1)])
async def test_a_file_that_was_altered_on_disk_is_noticed_and_made_anew_and_never_applied(
    node: Node, weights: bytes, damage: Callable[[Path], None], patterns: tuple[str, ...], fetched: int
) -> None:
    await node.bring("me/sketch")
    before = node.downloads()
    damaged = node.found(*patterns)
    assert len(damaged) == len(patterns)
    for path in damaged:
        damage(path)
    await node.restart()
    assert await node.bring("me/sketch") == (sha256(weights), "remote")
    assert node.downloads() - before == fetched
    await node.restart()
    assert await node.bring("me/sketch") == (sha256(weights), "disk")


@pytest.fixture
async def small(
    hub: HubServer, pipeline: BasePipeline, admission: AdmissionProcess, tmp_path: Path, weights: bytes, disk: Path
):
    """A node whose cache lies on that disk."""
    for name, seed in (("sketch", 0), ("second", 1), ("third", 2)):
        content = weights if seed == 0 else save(lora(tiny_pipeline("sd15"), seed=seed))
        hub.push(f"me/{name}", {"README.md": CARD, WEIGHTS: content})
    made = Node(hub, pipeline, admission, disk / "cache", tmp_path / "ingress")
    for name in ("sketch", "second", "third"):
        await made.spec(f"me/{name}")
    yield made
    await made.store.close()


@pytest.mark.parametrize("copies", [0.5, 1.5], ids=["for half a file", "for the file but not for what is made of it"])
async def test_a_full_disk_is_a_clear_error_leaves_no_part_and_is_over_once_there_is_room(
    small: Node, weights: bytes, copies: float
) -> None:
    ballast = leave_room(small.cache.parent, int(len(weights) * copies))
    with pytest.raises(DiskFull, match=r"me/sketch .* disk of the node .* full") as failure:
        await small.bring("me/sketch")
    assert (failure.value.status, failure.value.code) == (503, "disk_full")
    assert says_nothing_of(failure.value, small)
    assert small.found(CANONICAL, *UNFINISHED) == []
    ballast.unlink()
    assert await small.bring("me/sketch") == (sha256(weights), "remote")


async def test_on_a_full_disk_files_that_nobody_uses_make_room_first(small: Node, weights: bytes) -> None:
    await small.bring("me/second")
    held = await small.spec("me/third")
    async with small.store.lease(held):
        leave_room(small.cache.parent, len(weights) // 2)
        assert await small.bring("me/sketch") == (sha256(weights), "remote")
    assert len(small.found(CANONICAL)) < 3
    await small.restart()
    assert await small.bring("me/sketch") == (sha256(weights), "disk")


async def test_a_replica_starts_on_a_full_disk_and_makes_itself_room(small: Node) -> None:
    await small.bring("me/second")
    leave_room(small.cache.parent, 0)
    await small.restart()
    await asyncio.wait_for(small.bring("me/sketch"), 60)
