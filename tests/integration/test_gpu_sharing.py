"""More bases than GPUs on real Ray: each answers, although those that have the GPUs are asked all the time."""

from __future__ import annotations

import asyncio

import pytest
from ray.serve.handle import DeploymentHandle

from tests.replicas.shared_gpus import BASES, GPUS, sleeping_bases
from tests.replicas.sleeper import sleeping_request

# A replica is a process, which takes a while to start where the machine is busy.
WAIT_S = 240.0
START_S = 2.0

pytestmark = pytest.mark.slow


async def test_every_base_answers_while_those_with_the_gpus_are_busy(cluster: int) -> None:
    with sleeping_bases(START_S) as bases:
        await _answers_of_all(bases)


async def _answers_of_all(bases: list[DeploymentHandle]) -> None:
    number = iter(range(1_000_000))

    async def ask(base: int) -> None:
        await bases[base].generate.remote(sleeping_request(next(number)))

    async def keep_asking(base: int) -> None:
        while True:
            await ask(base)

    first, others = range(GPUS), range(GPUS, BASES)
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*map(ask, first))
        busy = [asyncio.ensure_future(keep_asking(base)) for base in first]
        await asyncio.gather(*map(ask, others))
        for call in busy:
            call.cancel()
