"""What the ranking is shown of many replicas leads to the answer that seeing all of them would."""

from __future__ import annotations

import random

import numpy as np
import pytest

from serve_app.bench.measuring.options import BenchmarkRefused
from serve_app.bench.simulation.compare import policies_named
from serve_app.bench.simulation.job import Jobs, Setting
from serve_app.bench.simulation.pool import Pool
from serve_app.bench.simulation.profile import read_profile
from serve_app.bench.simulation.routers import POLICIES, LoraplexRouter
from serve_app.bench.traffic.workload import AdapterAsk, Arrival, Workload
from serve_app.routing.cost import cost_s, tag_of

SIZE = 93_000_000
KEYS = [f"k{number}" for number in range(12)]


def random_pool(rng: random.Random, replicas: int) -> Pool:
    pool = Pool(replicas, per_node=8, host_bytes=4 * SIZE, disk_bytes=100 * SIZE)
    pool.is_open[:] = True
    for index in range(replicas):
        held = rng.sample(KEYS, rng.randrange(5))
        for key in held:
            pool.host_changed(index, key, ())
        if held and rng.random() < 0.7:
            applied = sorted(rng.sample(held, min(len(held), rng.choice((1, 1, 2)))))
            pool.last[index] = tag_of("|".join(f"{key}*1.0" for key in applied))
        if rng.random() < 0.2:
            pool.set_arriving(index, rng.choice(KEYS), 1.0)
        pool.end_s[index] = rng.choice((0.0, rng.uniform(0, 9)))
        pool.queued_s[index] = rng.choice((0.0, rng.uniform(0, 20)))
        pool.ongoing[index] = rng.randrange(16)
    for node in range(len(pool.disk)):
        for key in rng.sample(KEYS, 5):
            pool.to_disk(node, key, SIZE)
    return pool


@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_those_shown_costs_what_the_best_of_all_costs(seed: int) -> None:
    rng = random.Random(seed)
    profile = read_profile("a100")
    setting = Setting(profile, profile.base("sdxl"))
    pool = random_pool(rng, 200)
    router = LoraplexRouter(pool, setting, rng)
    for count in (0, 1, 1, 2, 3):
        asks = tuple(AdapterAsk(key) for key in rng.sample(KEYS, count))
        job = Jobs(Workload((), dict.fromkeys(KEYS, SIZE)), setting).job(0, Arrival(2.0, "sdxl", asks))
        everyone = np.arange(200)
        shown = router.representatives(job, everyone, 2.0)

        def least(indices: np.ndarray, job=job) -> float:
            pace = setting.timings.pace
            return min(cost_s(job.demand, pool.view(int(i), 2.0, pace)) for i in indices)

        assert least(shown) == pytest.approx(least(everyone), abs=1e-9)
        assert len(shown) <= 16


def test_full_replicas_are_passed_over_and_none_is_chosen_where_all_are_full() -> None:
    rng = random.Random(0)
    profile = read_profile("a100")
    setting = Setting(profile, profile.base("sdxl"))
    pool = random_pool(rng, 100)
    job = Jobs(Workload((), {"k0": SIZE}), setting).job(0, Arrival(0.0, "sdxl", (AdapterAsk("k0"),)))
    pool.ongoing[:] = setting.max_ongoing
    pool.ongoing[42] = 3
    for policy in POLICIES:
        if policy.name in ("loraplex", "least-loaded", "ray-multiplexed"):
            assert policy.router(pool, setting, rng)(job, 0.0) == 42
    pool.ongoing[42] = setting.max_ongoing
    assert LoraplexRouter(pool, setting, rng)(job, 0.0) is None


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BenchmarkRefused, match="there is no policy 'best'; there are loraplex, loraplex-whole"):
        policies_named(["best"])
