"""A request as the simulator carries it, and what is fixed for one run.

Owns the turn from an arrival to the values that production's own decisions take: its demand, its batch key, its work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from serve_app.bench.simulation.profile import BaseTimings, Profile
from serve_app.bench.traffic.workload import Arrival, Workload
from serve_app.core import GenerationRequest
from serve_app.engine.worker.scheduling import BatchKey, QueuedRequest, QueuePolicy, batch_key
from serve_app.engine.worker.turns import SharingPolicy
from serve_app.routing.cost import RequestLoad, RequiredAdapter, tag_of
from serve_app.routing.spread import ALONE_COST
from serve_app.work import work_units


@dataclass(frozen=True, slots=True)
class Setting:
    """The setting of one run, beside its requests.

    `noise` spreads the true time of passes and fetches around the predicted one (log-normal deviation).
    `is_fetching_early` says that an adapter is fetched when its request is admitted, not when its turn comes.
    `swap_s` replaces the profile's own swap, where a policy is one with another swap. `queue` orders whole passes,
    `sharing` those that take turns.
    """

    profile: Profile
    timings: BaseTimings
    noise: float = 0.0
    is_fetching_early: bool = True
    swap_s: float | None = None
    max_ongoing: int = 16
    queue: QueuePolicy = QueuePolicy()
    sharing: SharingPolicy = SharingPolicy()


@dataclass(slots=True)
class Job:
    """A request on its way, or a part of one: `number` is the request's, `ticket` its own.

    `missing` counts adapters that it waits for; times are seconds of the run's clock. `times_part` is the work of the
    whole request over that of this part: a part is as urgent as the whole.
    """

    number: int
    ticket: int
    at_s: float
    demand: RequestLoad
    key: BatchKey
    keys: frozenset[str]
    images: int
    steps: int
    predicted_s: float
    missing: int = 0
    times_part: float = 1.0

    @property
    def queued(self) -> QueuedRequest:
        """The job as the engine's queue knows it."""
        return QueuedRequest(self.ticket, self.key, self.images, arrived_s=self.at_s, units=self.demand.units)


class Jobs:
    """Makes jobs of arrivals; parts that arrivals share are made once."""

    def __init__(self, workload: Workload, setting: Setting) -> None:
        self._sizes = workload.sizes
        self._setting = setting
        self._tickets = 0
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
        self._tickets += 1
        return Job(number, self._tickets, arrival.at_s, demand, key, keys, arrival.images, arrival.steps, predicted_s)

    def part(self, whole: Job, images: int) -> Job:
        """Return the job of some of the images of a request; one that is drawn alone is charged for it."""
        units = whole.demand.units * images / whole.images * (1 + ALONE_COST * (images == 1))
        self._tickets += 1
        return replace(
            whole,
            ticket=self._tickets,
            demand=replace(whole.demand, units=units),
            images=images,
            predicted_s=self._setting.timings.pace.seconds(units),
            times_part=whole.images / images,
        )


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
