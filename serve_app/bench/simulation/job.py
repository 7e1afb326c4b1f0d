"""A request as the simulator carries it, and what is fixed for one run.

Owns the turn from an arrival to the values that production's own decisions take: its demand, its batch key, its work.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.bench.simulation.profile import BaseTimings, Profile
from serve_app.bench.traffic.workload import Arrival, Workload
from serve_app.core import GenerationRequest
from serve_app.engine.worker.scheduling import BatchKey, QueuePolicy, batch_key
from serve_app.routing.cost import RequestLoad, RequiredAdapter, tag_of
from serve_app.work import work_units


@dataclass(frozen=True, slots=True)
class Setting:
    """What one run is about, beside its requests.

    `noise` spreads the true time of passes and fetches around the predicted one (log-normal deviation).
    `is_fetching_early` says that an adapter is fetched when its request is admitted, not when its turn comes.
    `swap_s` replaces the profile's own swap, where a policy is one with another swap.
    """

    profile: Profile
    timings: BaseTimings
    noise: float = 0.0
    is_fetching_early: bool = True
    swap_s: float | None = None
    max_ongoing: int = 16
    queue: QueuePolicy = QueuePolicy()


@dataclass(slots=True)
class Job:
    """One request on its way: `missing` counts adapters that it waits for; times are seconds of the run's clock."""

    number: int
    at_s: float
    demand: RequestLoad
    key: BatchKey
    keys: frozenset[str]
    images: int
    predicted_s: float
    missing: int = 0
    began_s: float = -1.0
    done_s: float = -1.0


class Jobs:
    """Makes jobs of arrivals; whatever arrivals share is made once."""

    def __init__(self, workload: Workload, setting: Setting) -> None:
        self._sizes = workload.sizes
        self._setting = setting
        self._shapes: dict[object, tuple[BatchKey, float]] = {}
        self._demands: dict[object, tuple[RequestLoad, frozenset[str]]] = {}

    def job(self, number: int, arrival: Arrival) -> Job:
        """Return the job of the `number`-th arrival."""
        shape = (
            arrival.adapters, arrival.steps, arrival.images, arrival.width, arrival.height, arrival.guidance_scale,
        )  # fmt: skip
        if shape not in self._shapes:
            self._shapes[shape] = _shape(arrival)
        key, units = self._shapes[shape]
        asked = (tuple((ask.key, ask.scale) for ask in arrival.adapters), units)
        if asked not in self._demands:
            needs = tuple(RequiredAdapter(name, self._sizes[name]) for name, _ in asked[0])
            demand = RequestLoad(needs, units, tag_of("|".join(sorted(f"{name}*{scale}" for name, scale in asked[0]))))
            self._demands[asked] = (demand, demand.keys)
        demand, keys = self._demands[asked]
        predicted_s = self._setting.timings.pace.seconds(units)
        return Job(number, arrival.at_s, demand, key, keys, arrival.images, predicted_s)


def _shape(arrival: Arrival) -> tuple[BatchKey, float]:
    request = GenerationRequest(
        request_id="",
        base_id=arrival.base_id,
        prompt="",
        negative_prompt=None,
        adapters=(),
        width=arrival.width,
        height=arrival.height,
        steps=arrival.steps,
        guidance_scale=arrival.guidance_scale,
        scheduler=None,
        seed=0,
        num_images=arrival.images,
    )
    composition = tuple((ask.key, ask.scale) for ask in arrival.adapters)
    return batch_key(request, composition), work_units(request)
