from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from redis import Redis as Client

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.catalog.catalog import Catalog
from serve_app.catalog.resolving.aliases import Alias, AliasStore, AliasTable, TableVersion
from serve_app.catalog.resolving.redis_aliases import RedisAliasStore
from serve_app.core import AdapterRef
from serve_app.errors import BaseMismatch, MalformedRequest, ModelNotFound, NameTaken, NotReady
from serve_app.refusals import NotAnAdapter
from tests.redis_server import Redis, needs_redis
from tests.unit.catalog.builders import SDXL_TEXT, World, adapter_files, lora

Open = Callable[[], AliasStore | RedisAliasStore]


def opened(folder: Path) -> AliasStore:
    return AliasStore(folder / "deep" / "registry.sqlite3", clock=lambda: 1000.0)


@pytest.fixture(scope="module")
def server() -> Iterator[Redis]:
    server = Redis()
    yield server
    server.stop()


@pytest.fixture
def redis(server: Redis) -> Redis:
    """Redis with nothing in it."""
    Client.from_url(server.url).flushall()
    return server


@pytest.fixture(params=["file", pytest.param("redis", marks=needs_redis)])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Open the same aliases, each time as a keeper does that has just started."""
    if request.param == "file":
        return lambda: opened(tmp_path)
    redis: Redis = request.getfixturevalue("redis")
    return lambda: RedisAliasStore(redis.url)


def alias(name: str = "mine", target: str = "a/b", **fields: str) -> Alias:
    return Alias(name, AdapterRef(target, **fields))  # type: ignore[arg-type]


# The store


def test_aliases_and_their_version_survive_a_restart(reopen: Open) -> None:
    store = reopen()
    store.put(alias("one", revision="v1", filename="f.safetensors"))
    before = store.put(alias("two"))
    store.close()
    after = reopen().table()
    assert after == before
    assert after.aliases["one"] == alias("one", revision="v1", filename="f.safetensors")


def test_an_aliases_defaults_survive_a_restart_and_go_before_those_of_the_adapter(reopen: Open) -> None:
    defaults = AdapterDefaults(
        scale=0.5, steps=4, scheduler="LCM", scheduler_options=(("shift", 2.0), ("use_beta_sigmas", True)),
        timesteps=(999, 499), trigger_words="sks",
    )  # fmt: skip
    reopen().put(Alias("mine", AdapterRef("a/b", defaults=defaults)))
    table = reopen().table()
    assert table.resolve_alias(AdapterRef("mine", 0.7)) == AdapterRef("a/b", 0.7, defaults=defaults)
    with pytest.raises(NameTaken, match="other defaults"):
        reopen().put(alias(target="a/b"))


def test_a_file_that_knew_no_defaults_is_read_on(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "deep" / "registry.sqlite3")) as database, database:
        database.execute("ALTER TABLE aliases DROP COLUMN defaults")
        database.execute("INSERT INTO aliases VALUES ('mine', 'a/b', 'v1', NULL, 0.0)")
    store = opened(tmp_path)
    assert store.table().aliases == {"mine": alias(revision="v1")}
    store.put(alias("two"))
    assert set(opened(tmp_path).table().aliases) == {"mine", "two"}


def test_aliases_survive_a_process_that_dies_without_closing(reopen: Open) -> None:
    dead = reopen()
    dead.put(alias())
    assert reopen().table().aliases == {"mine": alias()}


def test_the_version_grows_with_each_change_and_with_nothing_else(reopen: Open) -> None:
    store = reopen()
    seen = [store.table(), store.put(alias()), store.put(alias()), store.remove("other"), store.remove("mine")]
    assert [table.version.number for table in seen] == [0, 1, 1, 1, 2]
    assert len({table.version.epoch for table in seen}) == 1


def test_a_name_that_stands_for_something_else_is_not_taken_over_by_accident(reopen: Open) -> None:
    store = reopen()
    store.put(alias())
    with pytest.raises(NameTaken, match="an alias of another adapter"):
        store.put(alias(target="c/d"))
    with pytest.raises(NameTaken):
        store.put(alias(revision="v2"))
    assert store.table().aliases == {"mine": alias()}
    assert store.put(alias(target="c/d"), may_replace=True).aliases == {"mine": alias(target="c/d")}


def test_a_damaged_file_is_put_aside_and_the_service_goes_on(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.put(alias())
    store.close()
    path = tmp_path / "deep" / "registry.sqlite3"
    path.write_bytes(b"no database " * 1000)
    again = opened(tmp_path)
    assert again.table().aliases == {}
    again.put(alias("new"))
    assert list(again.table().aliases) == ["new"]
    (aside,) = [file for file in path.parent.iterdir() if "damaged" in file.name]
    assert aside.read_bytes().startswith(b"no database")


def test_changes_from_several_threads_are_all_counted(reopen: Open) -> None:
    store = reopen()

    def change(thread: int) -> None:
        for index in range(10):
            store.put(alias(f"alias-{thread}-{index}"))

    threads = [threading.Thread(target=change, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table = store.table()
    assert (len(table.aliases), table.version.number) == (40, 40)


def test_a_file_from_elsewhere_is_told_apart_although_its_version_is_the_same(tmp_path: Path) -> None:
    one, other = opened(tmp_path / "one"), opened(tmp_path / "other")
    assert one.put(alias()).version.number == other.put(alias()).version.number
    assert one.table().version != other.table().version


@needs_redis
def test_without_redis_changes_are_refused_and_another_database_is_another_epoch(redis: Redis) -> None:
    store = RedisAliasStore(redis.url)
    before = store.put(alias())
    redis.stop()
    for call in (store.table, lambda: store.put(alias("two")), lambda: store.remove("mine")):
        with pytest.raises(NotReady, match="the registry is starting"):
            call()
    redis.start()
    assert store.put(alias()).aliases == before.aliases
    assert store.table().version.epoch != before.version.epoch


# What requests mean


def test_a_request_means_the_target_at_its_own_scale() -> None:
    table = AliasTable(TableVersion("e", 1), {"mine": alias(revision="v1", filename="f.safetensors")})
    assert table.resolve_alias(AdapterRef("mine", 0.5)) == AdapterRef("a/b", 0.5, "v1", "f.safetensors")
    assert table.resolve_alias(AdapterRef("mine", 0.5, "v2")) == AdapterRef("a/b", 0.5, "v2", "f.safetensors")
    assert table.resolve_alias(AdapterRef("a/b")) == AdapterRef("a/b")
    assert table.names_of("a/b") == ("mine",)


@pytest.fixture
def adapters(world: World) -> World:
    world.put("me/style", adapter_files("demo/sd"))
    world.put("me/large", adapter_files("big", lora(SDXL_TEXT, hidden=48)))
    return world


def catalog(world: World, *aliases: Alias) -> Catalog:
    table = AliasTable(TableVersion("e", 1), {alias.name: alias for alias in aliases})
    return world.catalog(resolve_alias=table.resolve_alias)


async def test_an_alias_is_good_wherever_an_id_is(adapters: World) -> None:
    known = catalog(adapters, alias(target="me/style"))
    for resolution in (
        await known.resolve("mine", ()),
        await known.resolve(None, (AdapterRef("mine"),)),
        await known.resolve("demo/sd", (AdapterRef("mine"),)),
    ):
        (use,) = resolution.adapters
        assert (use.spec.id, resolution.base.id) == ("me/style", "demo/sd")
    assert (await known.resolve("me/style", ())).adapters == (await known.resolve("mine", ())).adapters


async def test_an_alias_and_its_adapter_in_one_request_are_the_same_adapter_twice(adapters: World) -> None:
    known = catalog(adapters, alias(target="me/style"))
    with pytest.raises(MalformedRequest, match="twice"):
        await known.resolve("mine", (AdapterRef("me/style"),))


async def test_a_base_keeps_its_name_whatever_aliases_say(adapters: World) -> None:
    known = catalog(adapters, alias("small", "me/large"))
    assert (await known.resolve("small", ())).adapters == ()
    with pytest.raises(NotAnAdapter):
        await known.resolve("demo/sd", (AdapterRef("small"),))


async def test_what_an_alias_stands_for_is_told_only_where_it_could_be_read(adapters: World) -> None:
    known = catalog(adapters, alias(target="me/large"), alias("gone", "me/private"))
    with pytest.raises(BaseMismatch, match="me/large"):
        await known.resolve("demo/sd", (AdapterRef("mine"),))
    with pytest.raises(ModelNotFound, match="model gone") as caught:
        await known.resolve("gone", ())
    assert "me/private" not in str(caught.value)
