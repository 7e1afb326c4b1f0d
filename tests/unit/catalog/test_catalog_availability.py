from __future__ import annotations

import asyncio

import pytest

from serve_app.catalog.files import AdapterFiles
from serve_app.errors import AccessDenied, HubUnavailable, ModelNotFound
from tests.hub_server import INFO, ErrorDetail
from tests.unit.catalog.builders import World, adapter_files, card, lora, ref, renewed


@pytest.mark.parametrize("name", ["no/body", "../../etc/passwd", "/etc/passwd", "a/b/c", "", "a--b/c", "x" * 200])
async def test_what_is_nowhere_is_not_found(world: World, name: str):
    with pytest.raises(ModelNotFound) as refusal:
        await world.catalog().resolve(name, ())
    assert refusal.value.status == 404


async def test_a_mistyped_base_is_answered_with_the_nearest(world: World):
    with pytest.raises(ModelNotFound, match="did you mean 'demo/sd'"):
        await world.catalog().resolve("demo/sdd", ())


async def test_a_mistyped_adapter_is_answered_with_the_nearest_adapter(world: World):
    world.put("demo/sd-sepia", adapter_files("demo/sd"))
    with pytest.raises(ModelNotFound, match="did you mean 'demo/sd-sepia'"):
        await world.catalog().resolve("demo/sd-sepai", ())


@pytest.mark.parametrize("name", ["gpt-image-1", "gpt-image-2", "dall-e-3"])
async def test_a_model_that_clients_ask_for_by_themselves_is_answered_with_what_to_configure(world: World, name: str):
    with pytest.raises(ModelNotFound, match=rf"aliases: \[{name}\]"):
        await world.catalog().resolve(name, ())


async def test_a_gated_adapter_is_denied_and_a_missing_revision_not_found(world: World):
    world.hub.push("me/sketch", adapter_files("demo/sd"))
    catalog = world.catalog()
    with pytest.raises(ModelNotFound, match="v2"):
        await catalog.adapter(ref("me/sketch", revision="v2"))
    world.hub.gate("me/sketch")
    with pytest.raises(AccessDenied):
        await catalog.adapter(ref("me/sketch"))


async def test_a_switched_off_hub_is_never_asked(world: World):
    world.hub.push("me/sketch", adapter_files("demo/sd"))
    hub = world.config().adapters.hub.model_copy(update={"enabled": False})
    with pytest.raises(ModelNotFound):
        await world.catalog(world.config(hub=hub)).adapter(ref("me/sketch"))
    assert world.hub.count() == 0


async def test_success_and_failure_are_remembered_each_for_its_time(world: World):
    world.hub.push("me/sketch", adapter_files("demo/sd"))
    catalog = world.catalog()
    for _ in range(3):
        await catalog.adapter(ref("me/sketch"))
        with pytest.raises(ModelNotFound):
            await catalog.adapter(ref("no/body"))
    assert world.hub.count("me/sketch", INFO) == world.hub.count("no/body", INFO) == 1
    world.clock.now += 16
    world.hub.push("no/body", adapter_files("demo/sd"))
    await catalog.adapter(ref("no/body"))
    await catalog.adapter(ref("me/sketch"))
    assert world.hub.count("me/sketch", INFO) == 1


async def test_twenty_who_ask_at_once_make_one_request_and_one_who_leaves_hurts_nobody(world: World):
    world.hub.push("me/sketch", adapter_files("demo/sd"))
    world.hub.hold("me/sketch")
    catalog = world.catalog()
    askers = [asyncio.create_task(catalog.resolve("me/sketch", ())) for _ in range(20)]
    await asyncio.to_thread(world.hub.wait_for, lambda seen: seen.count("me/sketch") == 1)
    askers[0].cancel()
    world.hub.release("me/sketch")
    outcomes = await asyncio.gather(*askers, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert len({outcome.adapters[0].spec.key for outcome in outcomes[1:]}) == 1  # type: ignore[union-attr]
    assert world.hub.count("me/sketch", INFO) == 1


async def test_a_later_push_is_a_new_revision_after_the_time_to_live_and_the_old_stays_fetchable(world: World):
    first = world.hub.push("me/sketch", adapter_files("demo/sd", lora(rank=4)))
    catalog, files = world.catalog(), AdapterFiles(world.places())
    before = await catalog.adapter(ref("me/sketch"))
    second = world.hub.push("me/sketch", adapter_files("demo/sd", lora(rank=8)))
    assert await catalog.adapter(ref("me/sketch")) == before
    world.clock.now += 301
    after = await renewed(catalog, ref("me/sketch"), before)
    assert (before.revision, after.revision) == (first, second)
    assert (await files.path(after)).read_bytes() == lora(rank=8)
    assert (await files.path(before)).read_bytes() == lora(rank=4)
    assert (await catalog.adapter(ref("me/sketch", revision=first))).key == before.key


async def test_an_edited_folder_is_a_new_revision_within_seconds(world: World):
    world.put("me/sketch", adapter_files("demo/sd", lora(rank=4)))
    catalog = world.catalog()
    before = await catalog.adapter(ref("me/sketch"))
    world.put("me/sketch", adapter_files("demo/sd", lora(rank=8)))
    world.clock.now += 3
    assert (await renewed(catalog, ref("me/sketch"), before)).revision != before.revision


async def test_known_adapters_go_on_while_the_hub_is_down_and_new_ones_are_unavailable(world: World):
    world.hub.push("me/sketch", adapter_files("demo/sd"))
    world.put("me/local", adapter_files("demo/sd"))
    catalog = world.catalog()
    before = await catalog.adapter(ref("me/sketch"))
    world.hub.down()
    world.clock.now += 1000
    assert await catalog.adapter(ref("me/sketch")) == before
    assert (await catalog.adapter(ref("me/local"))).origin == "folder"
    with pytest.raises(HubUnavailable) as refusal:
        await catalog.adapter(ref("me/unseen"))
    assert refusal.value.status == 503


async def test_a_hub_that_hangs_does_not_delay_adapters_that_are_known(world: World):
    world.hub.push("me/sketch", adapter_files("demo/sd"))
    world.hub_settings = {"timeout_s": 600}
    catalog = world.catalog()
    before = await catalog.adapter(ref("me/sketch"))
    world.hub.hold("me/sketch")
    world.clock.now += 1000
    asked = world.hub.count("me/sketch") + 1
    async with asyncio.timeout(60):
        assert await catalog.adapter(ref("me/sketch")) == before
    await asyncio.to_thread(world.hub.wait_for, lambda seen: seen.count("me/sketch") == asked)
    async with asyncio.timeout(60):
        assert await catalog.adapter(ref("me/sketch")) == before
    assert world.hub.count("me/sketch") == asked, "once the Hub is known to be slow, nobody waits again"


async def test_a_new_adapter_on_a_hub_that_hangs_is_unavailable_after_its_time(world: World):
    world.hub.push("me/sketch", adapter_files("demo/sd"))
    world.hub.hold("me/sketch")
    world.hub_settings = {"timeout_s": 0.3}
    with pytest.raises(HubUnavailable, match=r"0\.3 s|in time"):
        async with asyncio.timeout(60):
            await world.catalog().adapter(ref("me/sketch"))


async def test_a_slow_repository_does_not_delay_another(world: World):
    for name in ("me/slow", "me/quick"):
        world.hub.push(name, adapter_files("demo/sd"))
    world.hub.hold("me/slow")
    world.hub_settings = {"timeout_s": 600}
    catalog = world.catalog()
    slow = [asyncio.create_task(catalog.adapter(ref("me/slow", revision=r))) for r in [None, "main"] * 20]
    await asyncio.to_thread(world.hub.wait_for, lambda seen: seen.count("me/slow") == 2)
    async with asyncio.timeout(60):
        await catalog.adapter(ref("me/quick"))
    assert not any(task.done() for task in slow)
    world.hub.release("me/slow")
    await asyncio.gather(*slow)


async def test_after_a_restart_without_the_hub_what_was_served_is_served(world: World):
    world.hub.push("tuned/one", {"README.md": card("demo/sd")})
    world.hub.push("me/sketch", adapter_files("tuned/one"))
    spec = await world.catalog().adapter(ref("me/sketch"))
    await AdapterFiles(world.places()).path(spec)
    world.hub.down()
    assert await world.catalog().adapter(ref("me/sketch")) == spec
    assert (await AdapterFiles(world.places()).path(spec)).read_bytes() == lora()


async def test_a_fault_of_the_hub_is_not_taken_for_an_answer_about_a_parent(world: World):
    world.hub.push("tuned/one", {"README.md": card("demo/sd")})
    world.hub.push("me/sketch", adapter_files("tuned/one"))
    world.hub.fail("tuned/one", ErrorDetail(status=503))
    catalog = world.catalog()
    with pytest.raises(HubUnavailable):
        await catalog.adapter(ref("me/sketch"))
    world.hub.fail("tuned/one", None)
    world.clock.now += 16
    assert (await catalog.adapter(ref("me/sketch"))).base_id == "demo/sd"
