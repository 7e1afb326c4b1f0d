from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest

from serve_app.catalog.catalog import Catalog
from serve_app.catalog.files import AdapterFiles
from serve_app.catalog.resolving.access import CallerAccess
from serve_app.catalog.sources.token_context import use_hub_token
from serve_app.core import AdapterRef, AdapterSpec, HubToken
from serve_app.errors import AccessDenied, HubUnavailable, LoraplexError, ModelNotFound
from tests.clock import Clock
from tests.hub_server import FILE, ErrorDetail, HubServer
from tests.unit.catalog.builders import World, adapter_files

ALICE, BOB, SERVICE = HubToken("hf_alice"), HubToken("hf_bob"), "hf_service"
PRIVATE, GATED, PUBLIC = "acme/private", "acme/gated", "acme/public"


@pytest.fixture
def closed(world: World) -> World:
    """A world whose service and whose Alice may read two repositories that not everybody may."""
    world.token = SERVICE
    world.hub_settings = {"forward_tokens": True, "access_ttl_s": 60}
    for repo_id in (PRIVATE, GATED, PUBLIC):
        world.hub.push(repo_id, adapter_files("demo/sd"))
    world.hub.hide(PRIVATE, tokens=frozenset({ALICE.value, SERVICE}))
    world.hub.gate(GATED, tokens=frozenset({ALICE.value, SERVICE}))
    return world


async def spec_for(catalog: Catalog, model: str, token: HubToken | None) -> AdapterSpec:
    return (await catalog.resolve(model, (), token=token)).adapters[0].spec


async def refused(catalog: Catalog, model: str, token: HubToken | None) -> LoraplexError:
    with pytest.raises((ModelNotFound, AccessDenied)) as caught:
        await catalog.resolve(model, (), token=token)
    return caught.value


# With forwarded tokens


@pytest.mark.parametrize("model", [PRIVATE, GATED])
async def test_a_cached_private_adapter_is_for_those_alone_who_may_read_it(closed: World, model: str) -> None:
    catalog = closed.catalog()
    assert (await spec_for(catalog, model, ALICE)).id == model
    asked = closed.hub.count(model)
    assert (await spec_for(catalog, model, ALICE)).id == model
    assert closed.hub.count(model) == asked, "within its time a check is not made again"
    for token in (BOB, None):
        error = await refused(catalog, model, token)
        assert "hf_" not in str(error)
    assert (await spec_for(catalog, model, ALICE)).id == model


@pytest.mark.parametrize("model", [PRIVATE, GATED])
async def test_a_caller_whose_access_is_revoked_is_refused_after_the_configured_time(closed: World, model: str) -> None:
    catalog = closed.catalog()
    await spec_for(catalog, model, ALICE)
    closed.hub.revoke(model, ALICE.value)
    closed.clock.now += 59.0
    assert (await spec_for(catalog, model, ALICE)).id == model
    closed.clock.now += 1.0
    await refused(catalog, model, ALICE)


async def test_a_caller_who_is_granted_access_gets_it_once_refusals_have_grown_old(closed: World) -> None:
    catalog = closed.catalog()
    await refused(catalog, PRIVATE, BOB)
    closed.hub.hide(PRIVATE, tokens=frozenset({BOB.value}))
    closed.clock.now += 15.0
    assert (await spec_for(catalog, PRIVATE, BOB)).id == PRIVATE


async def test_access_is_not_taken_as_checked_while_the_hub_is_away(closed: World) -> None:
    catalog = closed.catalog()
    await spec_for(catalog, PRIVATE, ALICE)
    # A public look-up goes first; it must not be what refuses here.
    with pytest.raises(ModelNotFound):
        await catalog.resolve(PRIVATE, ())
    closed.clock.now += 60.0
    closed.hub.fail(PRIVATE, ErrorDetail(status=500))
    for token in (ALICE, BOB, None):
        with pytest.raises(HubUnavailable):
            await catalog.resolve(PRIVATE, (), token=token)


async def test_what_a_caller_may_read_is_remembered_nowhere_for_others(closed: World) -> None:
    await spec_for(closed.catalog(), PRIVATE, ALICE)
    closed.hub.fail(PRIVATE, ErrorDetail(status=500))
    for token in (BOB, None):
        with pytest.raises(HubUnavailable):
            await closed.catalog().resolve(PRIVATE, (), token=token)


async def test_the_service_s_own_token_opens_nothing_to_callers(closed: World) -> None:
    catalog = closed.catalog()
    await refused(catalog, PRIVATE, None)
    error = await refused(catalog, GATED, None)
    assert "the Hub token sent with the request" in str(error)
    assert SERVICE not in {request.token for request in closed.hub.requests}


async def test_a_public_adapter_needs_no_token_and_none_is_sent_for_it(closed: World) -> None:
    catalog = closed.catalog()
    resolution = await catalog.resolve(PUBLIC, (), token=ALICE)
    assert not resolution.is_private
    assert {request.token for request in closed.hub.requests if request.repo_id == PUBLIC} == {None}
    assert (await catalog.resolve(PRIVATE, (), token=ALICE)).is_private


async def test_lists_show_nobody_s_private_adapters(closed: World) -> None:
    catalog = closed.catalog()
    await spec_for(catalog, PRIVATE, ALICE)
    await spec_for(catalog, GATED, ALICE)
    await spec_for(catalog, PUBLIC, ALICE)
    assert [known.spec.id for known in await catalog.known()] == [PUBLIC]
    assert not await catalog.name_exists(PRIVATE)


async def test_naming_the_commit_opens_nothing(closed: World) -> None:
    catalog = closed.catalog()
    spec = await spec_for(catalog, PRIVATE, ALICE)
    for token in (BOB, None):
        with pytest.raises((ModelNotFound, AccessDenied)):
            await catalog.resolve(None, (AdapterRef(PRIVATE, revision=spec.revision),), token=token)


async def test_a_private_file_is_fetched_with_the_caller_s_token(closed: World) -> None:
    closed.hub.hide(PRIVATE, tokens=frozenset({ALICE.value}))
    spec = await spec_for(closed.catalog(), PRIVATE, ALICE)
    files = AdapterFiles(closed.places())
    with pytest.raises((ModelNotFound, AccessDenied)):
        await files.path(spec)
    with use_hub_token(ALICE):
        assert (await files.path(spec)).stat().st_size == spec.size_bytes
    asked = [request.token for request in closed.hub.requests if request.kind == FILE]
    assert asked[-1] == ALICE.value


async def test_without_forwarding_a_caller_s_token_changes_nothing(closed: World) -> None:
    closed.hub_settings = {}
    catalog = closed.catalog()
    assert (await spec_for(catalog, PRIVATE, None)).id == PRIVATE
    closed.hub.hide(PRIVATE, tokens=frozenset({ALICE.value}))
    closed.clock.now += 1000.0
    await refused(closed.catalog(), PRIVATE, ALICE)
    assert ALICE.value not in {request.token for request in closed.hub.requests}


# Tokens


def test_no_text_made_of_a_token_shows_it() -> None:
    ref = {"token": ALICE}
    assert "alice" not in f"{ALICE} {ALICE!r} {ref} {[ALICE]}"
    assert pickle.loads(pickle.dumps(ALICE)) == ALICE


async def test_a_token_is_lent_to_what_a_block_starts_and_to_nothing_else() -> None:
    from serve_app.catalog.sources.token_context import current_hub_token

    async def seen() -> HubToken | None:
        await asyncio.sleep(0)
        return current_hub_token()

    with use_hub_token(ALICE):
        inside = asyncio.create_task(seen())
        with use_hub_token(BOB):
            assert await asyncio.create_task(seen()) == BOB
    outside = asyncio.create_task(seen())
    assert (await inside, await outside) == (ALICE, None)


# Checks


class Asked:
    """A look-up that counts, and waits where it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.began = asyncio.Event()
        self.may_go: asyncio.Event | None = None
        self.failure: LoraplexError | None = None

    async def __call__(self, key: str, token: HubToken) -> str:
        self.asked.append((key, token.value))
        self.began.set()
        if self.may_go is not None:
            await self.may_go.wait()
        if self.failure is not None:
            raise self.failure
        return f"{key} for {token.value}"


def access(asked: Asked, clock: Clock, **settings: Any) -> CallerAccess[str, str]:
    return CallerAccess(asked, access_ttl_s=60, failure_ttl_s=15, clock=clock, **settings)


async def test_many_askers_with_one_token_make_one_look_up_which_outlives_who_leaves() -> None:
    asked, clock = Asked(), Clock(1000.0)
    asked.may_go = asyncio.Event()
    checks = access(asked, clock)
    waits = [asyncio.ensure_future(checks.get("x", ALICE)) for _ in range(5)]
    other = asyncio.ensure_future(checks.get("x", BOB))
    await asyncio.sleep(0)
    waits[0].cancel()
    asked.may_go.set()
    answers = await asyncio.gather(*waits, return_exceptions=True)
    assert answers[1:] == ["x for hf_alice"] * 4
    assert await other == "x for hf_bob"
    assert asked.asked == [("x", "hf_alice"), ("x", "hf_bob")]


async def test_the_time_of_a_check_runs_from_its_beginning() -> None:
    asked, clock = Asked(), Clock(1000.0)
    asked.may_go = asyncio.Event()
    checks = access(asked, clock)
    wait = asyncio.ensure_future(checks.get("x", ALICE))
    await asked.began.wait()
    clock.now += 30
    asked.may_go.set()
    await wait
    clock.now += 29.9
    await checks.get("x", ALICE)
    assert len(asked.asked) == 1
    clock.now += 0.1
    await checks.get("x", ALICE)
    assert len(asked.asked) == 2


async def test_a_refusal_is_repeated_for_a_while_and_then_asked_for_again() -> None:
    asked, clock, told = Asked(), Clock(1000.0), list[str]()
    checks = access(asked, clock, on_check=told.append)
    asked.failure = ModelNotFound("x")
    for _ in range(3):
        with pytest.raises(ModelNotFound):
            await checks.get("x", ALICE)
    assert len(asked.asked) == 1
    asked.failure = None
    clock.now += 15
    assert await checks.get("x", ALICE) == "x for hf_alice"
    assert told == ["model_not_found", "ok"]


async def test_what_is_kept_holds_no_token_and_is_bounded() -> None:
    asked, clock = Asked(), Clock(1000.0)
    checks = access(asked, clock, max_entries=3)
    for index in range(10):
        await checks.get("x", HubToken(f"hf_secret{index}"))
    kept = repr(checks._cache._values.keys())
    assert "hf_secret" not in kept
    assert len(checks._cache._values) == 3


def test_the_hub_of_the_tests_forgets_a_revoked_token(hub: HubServer, tmp_path: Path) -> None:
    hub.push(PRIVATE, {"a": b"b"})
    hub.hide(PRIVATE, tokens=frozenset({"one", "two"}))
    hub.revoke(PRIVATE, "one")
    import httpx

    statuses = [
        httpx.get(f"{hub.endpoint}/api/models/{PRIVATE}", headers={"authorization": f"Bearer {token}"}).status_code
        for token in ("one", "two")
    ]
    assert statuses == [404, 200]
