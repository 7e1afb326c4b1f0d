"""How a replica ends that will answer nothing more."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest

from serve_app.deployments.replica.fail_fast import FailFast
from serve_app.engine.worker.state import WorkerState

WELL = WorkerState(waiting=0, running=1, applied=(), is_alive=True, failed_batches=0)


class Worker:
    """A worker that is as the test says."""

    def __init__(self) -> None:
        self.state = WELL
        self.abandoned: list[str] = []

    def snapshot(self) -> WorkerState:
        return self.state

    def fail_all(self, why: str) -> None:
        self.abandoned.append(why)
        self.state = replace(self.state, is_alive=False, stalled_s=0.0)


class Case:
    """A worker, what watches it, and whether the process has been ended."""

    def __init__(self) -> None:
        self.worker = Worker()
        self.ended = asyncio.Event()
        self.leaving = FailFast(cast(Any, self.worker), "demo/sd15", stall_timeout_s=10.0, end=self.ended.set)


def test_a_hung_device_ends_the_process_once_its_jobs_were_given_up() -> None:
    async def run() -> None:
        case = Case()
        assert case.leaving.check_and_exit() is None
        await case.leaving.block_if_exiting()
        case.worker.state = replace(WELL, stalled_s=11.0)
        assert case.leaving.check_failed()
        found = case.leaving.check_and_exit()  # and again: what is found first is what is told
        assert found is not None
        assert "no progress for 11 s" in found.message
        assert case.worker.abandoned == ["stalled"]
        assert not case.ended.is_set()
        await asyncio.wait_for(case.ended.wait(), 60.0)

    asyncio.run(run())


def test_whoever_comes_meanwhile_waits_for_the_end_that_sends_it_elsewhere() -> None:
    async def run() -> None:
        case = Case()
        case.worker.state = replace(WELL, is_lost=True)
        assert case.leaving.check_and_exit() is not None
        comes = asyncio.create_task(case.leaving.block_if_exiting())
        await asyncio.wait_for(case.ended.wait(), 60.0)
        assert not comes.done()
        comes.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("state", [replace(WELL, is_corrupt=True, is_alive=False), replace(WELL, failed_batches=3)])
def test_an_ailment_that_serve_is_to_see_first_does_not_end_the_process(state: WorkerState) -> None:
    async def run() -> None:
        case = Case()
        case.worker.state = state
        assert case.leaving.check_and_exit() is not None
        assert case.leaving.check_failed() is state.is_corrupt
        await case.leaving.block_if_exiting()
        assert case.worker.abandoned == []

    asyncio.run(run())


def test_a_worker_that_is_closed_in_good_order_is_not_ill() -> None:
    async def run() -> None:
        case = Case()
        case.leaving.stop()
        case.worker.state = replace(WELL, is_alive=False)
        assert case.leaving.check_and_exit() is None

    asyncio.run(run())
