from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.catalog.catalog import Catalog
from serve_app.catalog.pictures import AdapterPictures
from serve_app.catalog.replica_report import (
    ActiveAdapter,
    AdapterUsage,
    QuarantinedAdapters,
    ReplicaReport,
    ResidentAdapter,
)
from serve_app.catalog.resolving.aliases import Alias, AliasStore
from serve_app.core import AdapterRef, HubToken
from serve_app.deployments.ingress.adapter_defaults import check_defaults
from serve_app.deployments.registry.keeper_client import KeeperClient
from serve_app.deployments.registry.registry import ServiceRegistry
from serve_app.errors import AccessDenied, LoraplexError, MalformedRequest, ModelNotFound, NameTaken, NotReady
from serve_app.refusals import BaseNotServed, NotAnAdapter
from tests.hub_server import HubServer
from tests.unit.catalog.builders import World, adapter_files
from tests.unit.deployments.registry.registry_fakes import FakeReplicas, StoreKeeper

ALICE = HubToken("hf_alice")


@dataclass
class Scene:
    """A catalog over a folder and a Hub, a keeper with the real store, and what replicas there are."""

    world: World
    catalog: Catalog
    keeper: StoreKeeper
    aliases: KeeperClient

    def registry(self, *reports: ReplicaReport) -> tuple[ServiceRegistry, FakeReplicas]:
        replicas = FakeReplicas(*reports)
        pictures = AdapterPictures(self.catalog, self.world.folder / "pictures")
        registry = ServiceRegistry(
            self.catalog, self.aliases, cast(Any, replicas),
            pictures=pictures, check_defaults=check_defaults, states=cast(Any, None),
        )  # fmt: skip
        return registry, replicas

    async def key_of(self, model: str) -> str:
        return (await self.catalog.lookup_adapter(AdapterRef(model))).spec.key


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with HubServer() as hub:
        world = World(tmp_path, hub, hub_settings={"forward_tokens": True})
        world.put("me/style", adapter_files("demo/sd"))
        world.put("me/other", adapter_files("demo/sd"))
        keeper = StoreKeeper(AliasStore(tmp_path / "registry.sqlite3", clock=lambda: 0.0))
        client = keeper.client()
        yield Scene(world, world.catalog(resolve_alias=client.resolve_alias), keeper, client)


def alias(name: str = "mine", target: str = "me/style", **fields: str) -> Alias:
    return Alias(name, AdapterRef(target, **fields))  # type: ignore[arg-type]


async def added(registry: ServiceRegistry, new: Alias, *, preload: int = 0, may_replace: bool = False) -> None:
    await registry.add_alias(new, may_replace=may_replace, preload=preload, token=None)


async def test_rows_bring_together_what_all_replicas_know(scene: Scene) -> None:
    key = await scene.key_of("me/style")
    reports = (
        ReplicaReport(
            "r1",
            "demo/sd",
            holdings=(ResidentAdapter(key, "me/style", "host"),),
            uses=(AdapterUsage(key, 2, 50.0, 48),),
        ),
        ReplicaReport(
            "r2",
            "demo/sd",
            holdings=(ResidentAdapter(key, "me/style", "applied"),),
            uses=(AdapterUsage(key, 3, 40.0, 48),),
        ),
        ReplicaReport("r3", "demo/sd", uses=(AdapterUsage("me/style@older/f", 9, 99.0, 48),)),
    )
    registry, _ = scene.registry(*reports)
    await added(registry, alias())
    rows = {row.id: row for row in await registry.loras(token=None)}
    assert list(rows) == ["me/other", "me/style", "mine"]
    style, mine, other = rows["me/style"], rows["mine"], rows["me/other"]
    assert (style.alias_of, style.aliases, mine.alias_of, mine.aliases) == (None, ("mine",), "me/style", ())
    for row in (style, mine):
        assert row.resident == (("r2", "applied"), ("r1", "host"))
        assert (row.hits, row.last_used_s, row.layers_matched, row.adapter.rank) == (5, 50.0, 48, 4)
    assert (other.resident, other.hits, other.last_used_s, other.layers_matched) == ((), 0, None, None)


async def test_an_aliases_defaults_are_shown_over_the_adapters_and_checked_before_they_are_kept(scene: Scene) -> None:
    registry, _ = scene.registry()
    await added(registry, Alias("mine", AdapterRef("me/style", defaults=AdapterDefaults(steps=4, scheduler="LCM"))))
    rows = {row.id: row.adapter.spec.defaults.steps for row in await registry.loras(token=None)}
    assert rows == {"me/other": None, "me/style": None, "mine": 4}
    assert (await registry.lora("mine", token=None)).adapter.spec.defaults.scheduler == "LCM"
    with pytest.raises(MalformedRequest, match="do not fit demo/sd"):
        await added(registry, Alias("bad", AdapterRef("me/style", defaults=AdapterDefaults(steps=1000))))
    assert "bad" not in scene.aliases.table.aliases


async def test_a_row_says_which_replicas_refuse_its_adapter_for_now(scene: Scene) -> None:
    key = await scene.key_of("me/style")
    short, long = (
        QuarantinedAdapters((key,), (8.0,), "it failed", 5),
        QuarantinedAdapters((key, "x"), (1.0, 1.0), "it failed", 70),
    )
    registry, _ = scene.registry(
        ReplicaReport("r1", "demo/sd", quarantined=(short,)), ReplicaReport("r2", "demo/sd", quarantined=(long,))
    )
    await added(registry, alias())
    for name in ("me/style", "mine"):
        row = await registry.lora(name, token=None)
        assert row.quarantined == (("r2", long), ("r1", short))
        assert row in await registry.loras(token=None)
    assert (await registry.lora("me/other", token=None)).quarantined == ()
    with pytest.raises(ModelNotFound):
        await registry.lora("me/none", token=None)


@pytest.mark.parametrize(
    ("new", "error"),
    [
        (alias("../up"), MalformedRequest),
        (alias("a/b/c"), MalformedRequest),
        (alias("with space"), MalformedRequest),
        (alias("demo/sd"), NameTaken),
        (alias("small"), NameTaken),
        (alias("me/other"), NameTaken),
        (alias(target="me/none"), ModelNotFound),
        (alias(target="../secret"), ModelNotFound),
        (alias(target="big"), NotAnAdapter),
        (alias(target="me/flux"), BaseNotServed),
        (alias(filename="none.safetensors"), ModelNotFound),
        (alias(revision="v9"), ModelNotFound),
    ],
)
async def test_an_alias_is_checked_before_it_is_kept(scene: Scene, new: Alias, error: type[LoraplexError]) -> None:
    scene.world.put("me/flux", adapter_files("black-forest-labs/FLUX.1-dev"))
    registry, _ = scene.registry()
    with pytest.raises(error):
        await added(registry, new)
    assert scene.aliases.table.aliases == {}


async def test_an_alias_of_an_alias_is_refused(scene: Scene) -> None:
    registry, _ = scene.registry()
    await added(registry, alias())
    with pytest.raises(MalformedRequest, match="alias itself"):
        await added(registry, alias("second", "mine"))


async def test_an_alias_may_be_moved_where_that_is_asked_for(scene: Scene) -> None:
    registry, _ = scene.registry()
    await added(registry, alias())
    await added(registry, alias())
    with pytest.raises(NameTaken):
        await added(registry, alias(target="me/other"))
    await added(registry, alias(target="me/other"), may_replace=True)
    assert (await scene.catalog.resolve("mine", ())).adapters[0].spec.id == "me/other"


async def test_a_removed_alias_means_nothing_and_its_adapter_is_forgotten(scene: Scene) -> None:
    key = await scene.key_of("me/style")
    registry, replicas = scene.registry(
        ReplicaReport("r1", "demo/sd", holdings=(ResidentAdapter(key, "me/style", "host"),))
    )
    await added(registry, alias())
    removal = await registry.remove("mine", token=None)
    assert (removal.was_alias, removal.replicas, replicas.forgotten) == (True, ("r1",), ["me/style"])
    with pytest.raises(ModelNotFound):
        await scene.catalog.resolve("mine", ())
    with pytest.raises(ModelNotFound):
        await registry.remove("mine", token=None)


async def test_an_alias_that_another_ingress_made_a_moment_ago_can_be_removed(scene: Scene) -> None:
    registry, _ = scene.registry()
    await scene.keeper.put(alias(), may_replace=False)
    assert (await registry.remove("mine", token=None)).was_alias
    assert (await scene.keeper.remove("mine")).aliases == {}
    scene.keeper.is_away = True
    assert not (await registry.remove("me/style", token=None)).was_alias


async def test_an_adapter_s_own_id_is_forgotten_by_replicas_and_stays_known(scene: Scene) -> None:
    registry, replicas = scene.registry()
    assert not (await registry.remove("me/style", token=None)).was_alias
    assert replicas.forgotten == ["me/style"]
    assert "me/style" in [row.id for row in await registry.loras(token=None)]


async def test_a_preload_goes_to_holders_first_then_to_the_least_busy_and_last_to_the_silent(scene: Scene) -> None:
    key = await scene.key_of("me/style")
    reports = (
        ReplicaReport("busy", "demo/sd", backlog_s=9.0),
        ReplicaReport("holder", "demo/sd", backlog_s=99.0, holdings=(ResidentAdapter(key, "me/style", "host"),)),
        ReplicaReport("idle", "demo/sd"),
        ReplicaReport("silent", "demo/sd", state="SILENT"),
        ReplicaReport("starting-1", "demo/sd", state="STARTING"),
        ReplicaReport("elsewhere", "big"),
    )
    registry, replicas = scene.registry(*reports)
    await added(registry, alias())
    done = await registry.preload("mine", 2, token=ALICE)
    assert replicas.preloaded == [("me/style", ("holder", "idle"), ALICE)]
    assert (done.replicas, done.asked) == (("holder", "idle"), 2)
    assert (await registry.preload("me/style", 9, token=None)).replicas == ("busy", "holder", "idle", "silent")
    assert replicas.preloaded[-1][1] == ("holder", "idle", "busy", "silent")


async def test_a_preload_without_a_replica_says_that_the_base_is_starting(scene: Scene) -> None:
    registry, _ = scene.registry(ReplicaReport("starting-1", "demo/sd", state="STARTING"))
    with pytest.raises(NotReady, match="demo/sd"):
        await registry.preload("me/style", 1, token=None)


async def test_an_alias_of_a_private_adapter_shows_to_those_who_may_read_it(scene: Scene) -> None:
    scene.world.hub.push("acme/private", adapter_files("demo/sd"))
    scene.world.hub.hide("acme/private", tokens=frozenset({ALICE.value}))
    registry, _ = scene.registry()
    with pytest.raises((ModelNotFound, AccessDenied)):
        await registry.add_alias(alias(target="acme/private"), may_replace=False, preload=0, token=None)
    await registry.add_alias(alias(target="acme/private"), may_replace=False, preload=0, token=ALICE)
    assert "mine" in [row.id for row in await registry.loras(token=ALICE)]
    for token in (HubToken("hf_bob"), None):
        assert "acme/private" not in str(await registry.loras(token=token))
        for asked in (
            scene.catalog.resolve("mine", (), token=token),
            registry.lora("mine", token=token),
            registry.preload("mine", 1, token=token),
        ):
            with pytest.raises(ModelNotFound, match="model mine") as caught:
                await asked
            assert "acme/private" not in str(caught.value)


async def test_replicas_show_a_private_adapter_to_its_readers_alone(scene: Scene) -> None:
    scene.world.hub.push("me/secret", adapter_files("demo/sd"))
    scene.world.hub.hide("me/secret", tokens=frozenset({ALICE.value}))
    secret = (await scene.catalog.lookup_adapter(AdapterRef("me/secret"), token=ALICE)).spec.key
    held = (
        ResidentAdapter(await scene.key_of("me/style"), "me/style", "host"),
        ResidentAdapter(secret, "me/secret", "applied"),
    )
    applied = (ActiveAdapter("me/secret", 1.0),)
    registry, _ = scene.registry(ReplicaReport("r1", "demo/sd", holdings=held, applied=applied))
    (seen,) = await registry.replicas(token=ALICE)
    assert (seen.holdings, seen.applied) == (held, applied)
    for token in (None, HubToken("hf_bob")):
        (seen,) = await registry.replicas(token=token)
        assert ([one.id for one in seen.holdings], seen.applied) == (["me/style"], ())
