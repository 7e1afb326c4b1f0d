from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from serve_app.catalog.resolving.aliases import Alias, AliasStore
from serve_app.core import AdapterRef, AdapterSpec
from serve_app.deployments.registry.keeper_client import KeeperClient
from serve_app.errors import NotReady
from tests.unit.deployments.registry.registry_fakes import StoreKeeper

MINE = Alias("mine", AdapterRef("a/b"))


@pytest.fixture
def keeper(tmp_path: Path) -> StoreKeeper:
    return StoreKeeper(AliasStore(tmp_path / "registry.sqlite3", clock=lambda: 0.0))


@pytest.fixture
async def mirrors(keeper: StoreKeeper) -> AsyncIterator[tuple[KeeperClient, KeeperClient]]:
    both = keeper.client(retry_s=0.001), keeper.client(retry_s=0.001)
    for mirror in both:
        await mirror.begin(patience_s=0.01)
    yield both
    for mirror in both:
        await mirror.close()


async def until(keeper: StoreKeeper, is_so: Callable[[], bool]) -> None:
    """Wait for what holds at the latest when a mirror asks on."""
    async with asyncio.timeout(60), keeper.changed:
        await keeper.changed.wait_for(is_so)


async def test_a_change_holds_at_once_where_it_was_made_and_soon_everywhere(
    keeper: StoreKeeper, mirrors: tuple[KeeperClient, KeeperClient]
) -> None:
    mine, other = mirrors
    await mine.put(MINE, may_replace=False)
    assert mine.resolve_alias(AdapterRef("mine", 0.5)) == AdapterRef("a/b", 0.5)
    await until(keeper, lambda: other.resolve_alias(AdapterRef("mine")).id == "a/b")
    await other.remove("mine")
    assert other.resolve_alias(AdapterRef("mine")).id == "mine"
    await until(keeper, lambda: mine.resolve_alias(AdapterRef("mine")).id == "mine")


async def test_a_new_mirror_begins_with_what_is_kept(keeper: StoreKeeper) -> None:
    await keeper.put(MINE, may_replace=False)
    mirror = keeper.client()
    await mirror.begin(patience_s=5)
    assert mirror.table.aliases == {"mine": MINE}
    await mirror.close()


async def test_what_was_known_last_holds_on_while_the_keeper_is_away(
    keeper: StoreKeeper, mirrors: tuple[KeeperClient, KeeperClient]
) -> None:
    mine, other = mirrors
    await mine.put(MINE, may_replace=False)
    await until(keeper, lambda: bool(other.table.aliases))
    await keeper.leave()
    asked = keeper.asked
    await until(keeper, lambda: keeper.asked > asked + 4)
    for mirror in mirrors:
        assert mirror.table.aliases == {"mine": MINE}
        with pytest.raises(NotReady):
            await mirror.remove("mine")
    keeper.is_away = False
    await mine.remove("mine")
    await until(keeper, lambda: other.table.aliases == {})


async def test_a_mirror_without_a_keeper_begins_all_the_same_and_catches_up(keeper: StoreKeeper) -> None:
    await keeper.put(MINE, may_replace=False)
    keeper.is_away = True
    mirror = keeper.client(retry_s=0.001)
    await mirror.begin(patience_s=0.01)
    assert mirror.table.aliases == {}
    keeper.is_away = False
    await until(keeper, lambda: mirror.table.aliases == {"mine": MINE})
    await mirror.close()


async def test_an_answer_from_before_never_takes_a_newer_one_back(
    keeper: StoreKeeper, mirrors: tuple[KeeperClient, KeeperClient]
) -> None:
    mine, _ = mirrors
    old = await keeper.put(MINE, may_replace=False)
    await mine.put(Alias("second", AdapterRef("c/d")), may_replace=False)
    mine._adopt(old)
    assert set(mine.table.aliases) == {"mine", "second"}


async def test_another_file_is_believed_although_its_version_is_lower(
    keeper: StoreKeeper, mirrors: tuple[KeeperClient, KeeperClient], tmp_path: Path
) -> None:
    mine, _ = mirrors
    for name in ("one", "two", "three"):
        await mine.put(Alias(name, AdapterRef("a/b")), may_replace=False)
    keeper.store = AliasStore(tmp_path / "restored.sqlite3", clock=lambda: 0.0)
    await keeper.put(MINE, may_replace=False)
    await until(keeper, lambda: mine.table.aliases == {"mine": MINE})


async def test_the_keeper_learns_which_adapters_are_in_use(keeper: StoreKeeper) -> None:
    spec = AdapterSpec("a/b", "demo/sd", "r1", "f", "hub", "a/b", 1)
    client = keeper.client(retry_s=0.001)
    for _ in range(3):
        client.note_use(spec)
    await client.begin(patience_s=0.01)
    await until(keeper, lambda: keeper.used == {spec: 3})
    await client.close()
