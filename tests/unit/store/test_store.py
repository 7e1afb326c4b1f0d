"""The store from lease to lease: real files, a real event loop, and a remote that the test holds back."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.core import AdapterSpec
from serve_app.errors import HostMemoryFull, HubUnavailable, LoraplexError, ReplicaLost
from serve_app.refusals import MalformedFile
from serve_app.store.admitted import AdmittedFiles
from serve_app.store.store import AdapterStore, Lease
from tests.clock import Clock
from tests.unit.store.remote import Remote, load, spec


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.remote = Remote(folder / "remote")
        self.clock = Clock(100.0)

    @asynccontextmanager
    async def store(
        self, budget_bytes: int = 1000, load: Callable[[AdapterSpec, Path], bytes] = load, **settings: Any
    ) -> AsyncIterator[AdapterStore[bytes]]:
        admitted = AdmittedFiles(self.folder / "admitted", 10_000, depends_on=("base", "float32"), clock=self.clock)
        store = AdapterStore(
            admitted=admitted,
            fetch=self.remote.fetch,
            admit=self.remote.admit,
            load=load,
            size_of=len,
            host_budget_bytes=budget_bytes,
            clock=self.clock,
            **settings,
        )
        try:
            yield store
        finally:
            await store.close()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def files(folder: Path) -> list[Path]:
    # A walk shrugs at a folder that is removed meanwhile, where a glob raises.
    found = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return [path for path in found if path.name != ".lock"]


async def use(store: AdapterStore[bytes], wanted: AdapterSpec) -> Lease[bytes]:
    async with store.lease(wanted) as lease:
        return lease


async def test_a_lease_tells_on_which_tier_the_adapter_was_found(bench: Bench) -> None:
    async with bench.store() as store:
        tiers = [(await use(store, spec("a"))).tier for _ in range(2)]
    async with bench.store() as restarted:
        tiers.append((await use(restarted, spec("a"))).tier)
    assert tiers == ["remote", "host", "disk"]
    assert bench.remote.fetched == ["demo/a"]


async def test_a_lease_hands_out_the_canonical_form_and_how_long_it_took(bench: Bench) -> None:
    wanted = spec("a")
    bench.remote.hold(wanted)
    async with bench.store() as store:
        asker = asyncio.create_task(use(store, wanted))
        await bench.remote.asked[wanted.id].wait()
        bench.clock.now += 1.5
        bench.remote.let_through(wanted)
        lease = await asker
    assert lease.adapter == b"DEMO/A XXX"
    assert lease.fetch_ms == 1500.0


async def test_many_askers_share_one_fetch_and_one_adapter(bench: Bench) -> None:
    async with bench.store() as store:
        leases = await asyncio.gather(*(use(store, spec("a")) for _ in range(20)))
    assert bench.remote.fetched == ["demo/a"]
    assert all(lease.adapter is leases[0].adapter for lease in leases)


async def test_a_fetch_goes_on_when_its_only_asker_leaves(bench: Bench) -> None:
    wanted = spec("a")
    bench.remote.hold(wanted)
    async with bench.store() as store:
        asker = asyncio.create_task(use(store, wanted))
        await bench.remote.asked[wanted.id].wait()
        asker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asker
        assert store.state().pinned == 0
        later = asyncio.create_task(use(store, wanted))
        bench.remote.let_through(wanted)
        assert (await later).adapter == b"DEMO/A XXX"
        assert store.is_resident(wanted.key)
    assert bench.remote.fetched == ["demo/a"]


async def test_an_asker_that_leaves_takes_no_other_along(bench: Bench) -> None:
    wanted = spec("a")
    bench.remote.hold(wanted)
    async with bench.store() as store:
        askers = [asyncio.create_task(use(store, wanted)) for _ in range(3)]
        await bench.remote.asked[wanted.id].wait()
        askers[0].cancel()
        bench.remote.let_through(wanted)
        outcomes = await asyncio.gather(*askers, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert [type(outcome) for outcome in outcomes[1:]] == [Lease, Lease]


async def test_a_failing_fetch_reaches_every_waiter_as_its_own_error(bench: Bench) -> None:
    wanted = spec("a")
    bench.remote.hold(wanted)
    bench.remote.failures[wanted.id] = HubUnavailable(wanted.id, "it did not answer within 10 s")
    async with bench.store() as store:
        askers = [asyncio.create_task(use(store, wanted)) for _ in range(3)]
        await bench.remote.asked[wanted.id].wait()
        bench.remote.let_through(wanted)
        outcomes = await asyncio.gather(*askers, return_exceptions=True)
    assert len({id(outcome) for outcome in outcomes}) == 3
    for outcome in outcomes:
        assert isinstance(outcome, HubUnavailable)
        assert str(outcome) == str(bench.remote.failures[wanted.id])


async def test_a_failure_is_not_remembered(bench: Bench) -> None:
    wanted = spec("a")
    bench.remote.failures[wanted.id] = HubUnavailable(wanted.id, "it did not answer within 10 s")
    async with bench.store() as store:
        with pytest.raises(HubUnavailable):
            await use(store, wanted)
        assert store.state().pinned == 0
        del bench.remote.failures[wanted.id]
        assert (await use(store, wanted)).tier == "remote"


async def test_a_refused_file_is_not_looked_at_again_until_its_refusal_has_grown_old(bench: Bench) -> None:
    async with bench.store(failure_ttl_s=15.0) as store:
        for _ in range(3):
            with pytest.raises(MalformedFile, match="it is truncated"):
                await use(store, spec("broken"))
        assert bench.remote.fetched == ["demo/broken"]
        bench.clock.now += 16
        with pytest.raises(MalformedFile):
            await use(store, spec("broken"))
    assert bench.remote.fetched == ["demo/broken"] * 2


async def test_an_original_is_let_go_however_its_fetch_ends(bench: Bench) -> None:
    released: list[str] = []
    async with bench.store(release=lambda done: released.append(done.id)) as store:
        await use(store, spec("a"))
        with pytest.raises(MalformedFile):
            await use(store, spec("broken"))
    assert released == ["demo/a", "demo/broken"]


async def test_a_fault_of_our_own_reaches_the_waiter_as_it_is(bench: Bench) -> None:
    bench.remote.failures["demo/a"] = RuntimeError("ours")
    async with bench.store() as store:
        with pytest.raises(RuntimeError, match="ours"):
            await use(store, spec("a"))


async def test_a_failure_that_nobody_waits_for_is_quiet(bench: Bench) -> None:
    wanted = spec("a")
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    bench.remote.hold(wanted)
    bench.remote.failures[wanted.id] = HubUnavailable(wanted.id, "it did not answer within 10 s")
    async with bench.store() as store:
        asker = asyncio.create_task(use(store, wanted))
        await bench.remote.asked[wanted.id].wait()
        asker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asker
        bench.remote.let_through(wanted)
        await until(lambda: not store.state().in_flight)
    gc.collect()
    assert complaints == []


async def test_a_refused_file_leaves_nothing_on_disk(bench: Bench) -> None:
    async with bench.store() as store:
        with pytest.raises(MalformedFile):
            await use(store, spec("broken"))
        await until(lambda: not files(bench.folder / "admitted"))


async def test_a_slow_fetch_delays_no_other_adapter(bench: Bench) -> None:
    slow, quick = spec("slow"), spec("quick")
    bench.remote.hold(slow)
    async with bench.store() as store:
        waiting = asyncio.create_task(use(store, slow))
        await bench.remote.asked[slow.id].wait()
        assert (await use(store, quick)).tier == "remote"
        assert (await use(store, quick)).tier == "host"
        assert not waiting.done()
        bench.remote.let_through(slow)
        await waiting


async def test_downloads_that_fill_the_default_threads_do_not_hold_up_a_file_on_disk(bench: Bench) -> None:
    async with bench.store() as store:
        await use(store, spec("a"))
    release, busy = threading.Event(), threading.Event()

    def download() -> None:
        busy.set()
        release.wait()

    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    download_ends = loop.run_in_executor(None, download)
    await until(busy.is_set)
    try:
        async with bench.store() as store:
            lease = await asyncio.wait_for(use(store, spec("a")), timeout=60)
    finally:
        release.set()
    await download_ends
    assert lease.tier == "disk"


async def test_the_event_loop_runs_while_an_adapter_is_read(bench: Bench) -> None:
    started, release = threading.Event(), threading.Event()

    def slow_load(wanted: AdapterSpec, path: Path) -> bytes:
        started.set()
        assert release.wait(30)
        return load(wanted, path)

    async with bench.store(load=slow_load) as store:
        asker = asyncio.create_task(use(store, spec("a")))
        await until(started.is_set)
        release.set()
        assert (await asker).tier == "remote"


async def test_a_leased_adapter_is_never_evicted(bench: Bench) -> None:
    async with bench.store(budget_bytes=25) as store:
        async with store.lease(spec("a")) as held:
            for name in "bcd":
                await use(store, spec(name))
            assert store.is_resident(spec("a").key)
            async with store.lease(spec("a")) as again:
                assert again.adapter is held.adapter
        assert store.state().used_bytes == 20
        await use(store, spec("e"))
        await use(store, spec("f"))
        assert store.resident() == (spec("e").key, spec("f").key)


async def test_the_adapters_of_one_request_may_exceed_the_budget_and_settle_when_it_ends(bench: Bench) -> None:
    async with bench.store(budget_bytes=15) as store:
        async with store.lease_all([spec("a"), spec("b")]):
            assert store.state().used_bytes == 20
        assert len(store.resident()) == store.state().evictions == 1


@pytest.mark.parametrize("guess", [1, 10])
async def test_requests_wait_for_the_memory_that_others_hold_and_hold_none_meanwhile(bench: Bench, guess: int) -> None:
    async with bench.store(budget_bytes=45) as store:
        pairs = [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"), ("a", "h"), ("b", "g"), ("c", "f"), ("d", "e")]
        held: list[str] = []
        most, done = 0, 0

        async def ask(pair: tuple[str, str]) -> None:
            nonlocal most, done
            async with store.lease_all([replace(spec(name), size_bytes=guess) for name in pair]):
                held.extend(pair)
                most = max(most, len(set(held)))
                await until(lambda: most > 2)
                for name in pair:
                    held.remove(name)
            done += 1

        await asyncio.gather(*map(ask, pairs))
        assert (2 < most <= 4, done) == (True, 8)
        assert store.state().used_bytes <= 45


async def test_a_request_that_waits_too_long_for_memory_is_told_so(bench: Bench) -> None:
    async with bench.store(budget_bytes=15, pin_wait_s=0.05) as store, store.lease(spec("a")):
        with pytest.raises(HostMemoryFull, match=r"replica\.host_cache"):
            await use(store, spec("b"))
        waiting = asyncio.create_task(use(store, spec("c")))
        await asyncio.sleep(0)
        async with asyncio.timeout(0), store.lease_all([]) as none:
            assert none == []
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert store.state().pinned == 1
        assert (await use(store, spec("a"))).tier == "host"


async def test_an_adapter_larger_than_the_budget_is_served_and_then_dropped(bench: Bench) -> None:
    bench.remote.sizes["demo/huge"] = 200
    async with bench.store(budget_bytes=50) as store:
        await use(store, spec("small"))
        async with store.lease(spec("huge")) as lease:
            assert len(lease.adapter) == 200
            assert store.is_resident(spec("huge").key)
        assert not store.is_resident(spec("huge").key)
        assert (await use(store, spec("huge"))).tier == "disk"


async def test_a_damaged_canonical_file_is_made_anew(bench: Bench) -> None:
    async with bench.store() as store:
        await use(store, spec("a"))
    (canonical,) = (bench.folder / "admitted").glob("*/*.canonical")
    canonical.write_bytes(b"DEM")
    async with bench.store() as store:
        assert (await use(store, spec("a"))).tier == "remote"
    assert canonical.read_bytes() == b"DEMO/A XXX"


async def test_a_forgotten_adapter_leaves_memory_once_it_is_free(bench: Bench) -> None:
    async with bench.store() as store:
        async with store.lease(spec("a")):
            store.forget(spec("a").key)
            assert store.is_resident(spec("a").key)
        assert not store.is_resident(spec("a").key)
        assert (await use(store, spec("a"))).tier == "disk"


async def test_closing_ends_the_wait_with_an_error_worth_a_retry(bench: Bench) -> None:
    wanted = spec("a")
    bench.remote.hold(wanted)
    async with bench.store() as store:
        asker = asyncio.create_task(use(store, wanted))
        await bench.remote.asked[wanted.id].wait()
        await store.close()
        with pytest.raises(ReplicaLost):
            await asker


async def test_a_history_of_leases_failures_and_leavers_ends_with_no_pin_and_within_budget(
    bench: Bench,
) -> None:
    chance = random.Random(7)
    held: dict[str, int] = {}

    async def ask(store: AdapterStore[bytes], wanted: AdapterSpec) -> None:
        async with store.lease(wanted) as lease:
            held[wanted.key] = held.get(wanted.key, 0) + 1
            try:
                for _ in range(chance.randrange(5)):
                    await asyncio.sleep(0)
                    assert all(store.is_resident(key) for key, holders in held.items() if holders)
                assert lease.adapter.startswith(wanted.id.upper().encode())
            finally:
                held[wanted.key] -= 1

    async with bench.store(budget_bytes=25) as store:
        askers: list[asyncio.Task[None]] = []
        for _ in range(300):
            name = chance.choice(("a", "b", "c", "d", "broken"))
            askers.append(asyncio.create_task(ask(store, spec(name))))
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                chance.choice(askers).cancel()
        outcomes = await asyncio.gather(*askers, return_exceptions=True)
        await until(lambda: not store.state().in_flight)
        assert store.state().pinned == 0
        assert store.state().used_bytes <= 25
    allowed = (asyncio.CancelledError, LoraplexError)
    assert [outcome for outcome in outcomes if outcome is not None and not isinstance(outcome, allowed)] == []
    assert outcomes.count(None) > 100


async def until(is_so: Callable[[], bool]) -> None:
    """Let the loop run until something that no event tells of is so; the test's own time limit ends it."""
    while not is_so():  # noqa: ASYNC110
        await asyncio.sleep(0)
