"""What one key may have of a base's slots, and in which order its requests get them."""

from __future__ import annotations

import asyncio

from serve_app.core import GenerationRequest, Priority
from serve_app.deployments.ingress.key_slots import KeySlots
from tests.clock import Clock
from tests.engine_cases import request


class Slots:
    """Four slots, of which a key may have three; requests hold them until they are told to end."""

    def __init__(self) -> None:
        self.count = 4
        self.clock = Clock(100.0)
        self.slots = KeySlots(lambda: self.count, self.clock)
        self.running: list[int] = []
        self._ends: dict[int, asyncio.Event] = {}
        self._calls: dict[int, asyncio.Task[None]] = {}

    async def ask(self, seed: int, *, priority: Priority = "interactive", waited_s: float = 0.0) -> None:
        asked = request(seed=seed, share="key", priority=priority, waited_s=waited_s)
        self._ends[seed] = asyncio.Event()
        self._calls[seed] = asyncio.create_task(self._run(asked))
        self.clock.now += 1.0
        await self._settle()

    def let_end(self, seed: int) -> None:
        self._ends[seed].set()

    async def end(self, seed: int) -> None:
        self.let_end(seed)
        await self._settle()

    async def cancel(self, *seeds: int) -> None:
        for seed in seeds:
            self._calls[seed].cancel()
        await self._settle()

    async def _run(self, asked: GenerationRequest) -> None:
        async with self.slots.slot(asked):
            self.running.append(asked.seed)
            try:
                await self._ends[asked.seed].wait()
            finally:
                self.running.remove(asked.seed)

    @staticmethod
    async def _settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)


async def test_of_one_key_interactive_requests_go_first_and_then_who_has_waited_longest() -> None:
    slots = Slots()
    for seed in range(4):
        await slots.ask(seed, priority="batch")
    await slots.ask(4)
    await slots.ask(5, waited_s=60.0)
    assert slots.running == [0, 1, 2]
    for ended in (0, 1, 2):
        await slots.end(ended)
    assert slots.running == [5, 4, 3]


async def test_a_slot_of_one_who_left_goes_to_the_next() -> None:
    slots = Slots()
    for seed in range(6):
        await slots.ask(seed)
    await slots.cancel(3)
    await slots.cancel(0)
    assert slots.running == [1, 2, 4]
    await slots.end(1)
    assert slots.running == [2, 4, 5]


async def test_one_who_leaves_at_the_moment_of_its_turn_takes_no_slot_along() -> None:
    slots = Slots()
    for seed in range(5):
        await slots.ask(seed)
    slots.let_end(0)
    await asyncio.sleep(0)
    assert slots.running == [1, 2], "its turn has come, and it does not know yet"
    await slots.cancel(3)
    assert slots.running == [1, 2, 4]


async def test_slots_of_a_replica_that_has_joined_are_given_when_the_next_request_comes_or_ends() -> None:
    slots = Slots()
    for seed in range(6):
        await slots.ask(seed)
    slots.count = 8
    await slots.end(0)
    assert slots.running == [1, 2, 3, 4, 5]
