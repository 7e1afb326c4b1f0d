"""The way to the replicas: slots, multiplexed ids, retries after a lost replica, and the errors of both sides.

Must not know HTTP or how a request was resolved.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve_app.config import BaseModelConfig, IngressSettings
from serve_app.core import GenerationEvent, GenerationRequest, GenerationResult, GivenBack, Progress, Starting
from serve_app.deployments.ingress.backpressure import Backpressure
from serve_app.deployments.ingress.key_slots import KeySlots
from serve_app.deployments.ingress.process_state import has_ended
from serve_app.deployments.ingress.starts import Starts
from serve_app.errors import LoraplexError, QueueFull, ReplicaLost
from serve_app.routing.known import known_replicas, on_joined, replicas_known
from serve_app.routing.spread import parts_of, work_to_keep_s
from serve_app.settings import ReplicaSettings
from serve_app.store.quarantine import Quarantine
from serve_app.work import work_units

log = logging.getLogger(__name__)

# A request whose process died on so many replicas is not sent to another.
MAX_DEATHS = 2
# Of the places that a base has for the requests of an ingress replica, what one key may have.
MOST_OF_PLACES = 0.75
# An accepted request that lost its place to others asks for one so often.
RESEND_AFTER_S = 0.5
# So long after a replica has joined, the others give back once more.
LEVEL_AGAIN_S = 3.0


@dataclass(slots=True)
class _Course:
    """A request on its way: as it is sent next, the replicas that it lost, and whether a picture was passed on."""

    request: GenerationRequest
    losses: list[Exception] = field(default_factory=list)
    has_shown: bool = False


class Dispatcher:
    """Sends settled requests to replicas through Serve handles.

    A request whose replica dies is sent again, at most `max_retries` times: its seed is fixed, so it gives the same
    image. A stream is sent again while no picture of it has been passed on, and then tells its progress from the start.
    One that two replicas died of is sent no more, and its adapters are quarantined. Cancelling a call stops the work.
    Of the parts of one request that lost their replicas, one at a time is sent again: it may be what ended them.
    """

    def __init__(
        self,
        settings: IngressSettings,
        handles: Mapping[str, DeploymentHandle],
        *,
        on_retry: Callable[[str, str], None],
        renew: Callable[[str, DeploymentHandle], None] = lambda base, used: None,
        starts: Starts | None = None,
        resend_after_s: float = RESEND_AFTER_S,
    ) -> None:
        """Send nothing yet, and know no bases; without `starts`, requests wait for replicas without a word.

        `renew` has a base found again whose application went, and may have come back.
        """
        self._on_retry = on_retry
        self._resend_after_s = resend_after_s
        self._attempts = settings.max_retries + 1
        self._quarantine = Quarantine(clock=time.monotonic)
        self._replica_settings: dict[str, ReplicaSettings] = {}
        self._pressures: dict[str, Backpressure] = {}
        self._slots: dict[str, KeySlots] = {}
        self._ingresses = settings.max_replicas
        self._handles = handles
        self._renew = renew
        self._starts = starts
        self._levelling: set[asyncio.Future[None]] = set()
        self._resending: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def serve(self, bases: Iterable[BaseModelConfig]) -> None:
        """Take requests for these bases, and by these settings from now on; what is counted stays.

        Bases that are served no more stay known, for the requests that are still with them.
        """
        for base in bases:
            self._replica_settings[base.id] = base.replica
            if base.id not in self._pressures:
                self._pressures[base.id] = Backpressure(time.monotonic)
                self._slots[base.id] = KeySlots(partial(self._slots_of_mine, base.id), time.monotonic)

    async def count_parts(self, request: GenerationRequest) -> tuple[int, ...]:
        """Return how many images each part of a request is to have, by what is known of the replicas now."""
        if not self._replica_settings[request.base_id].step_sharing or self._pressures[request.base_id].was_full_lately:
            return (request.num_images,)
        return parts_of(request, await known_replicas(request.base_id))

    def watch_replicas(self) -> None:
        """Have replicas give back what they have not begun whenever another joins; on the event loop."""
        for base_id in self._handles:
            on_joined(base_id, partial(self._start_levelling, base_id))

    def _start_levelling(self, base_id: str) -> None:
        task = asyncio.ensure_future(self._level_twice(base_id))
        self._levelling.add(task)
        task.add_done_callback(self._levelling.discard)

    async def _level_twice(self, base_id: str) -> None:
        await self._level(base_id)
        # Requests that were fetching adapters could not be given back, and others may have joined.
        await asyncio.sleep(LEVEL_AGAIN_S)
        await self._level(base_id)

    async def _level(self, base_id: str) -> None:
        keep_s = work_to_keep_s(await known_replicas(base_id))
        if keep_s is None:
            return
        try:
            given = await self._handles[base_id].broadcast("give_back", keep_s).results_async()
        except RayError as error:
            log.warning("not all replicas of %s could be asked to give back: %s", base_id, type(error).__name__)
        else:
            log.info("a replica of %s has joined: the others gave back %d requests", base_id, sum(given))

    async def __call__(self, request: GenerationRequest) -> GenerationResult:
        """Return the result of one request.

        Raises:
            QueueFull: the base has as much waiting as it accepts.
            BaseUnusable, NotReady: no replica of the base can start, or none in time.
            ReplicaLost: every attempt lost its replica.
        """
        course = self._begin(request)
        while len(course.losses) < self._attempts:
            async with self._attempt(course):
                return await self._result(course.request)
        raise ReplicaLost(base=request.base_id, attempts=self._attempts)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """Yield the events of one request.

        Raises:
            QueueFull: the base has as much waiting as it accepts.
            BaseUnusable, NotReady: no replica of the base can start, or none in time.
            ReplicaLost: the replica died after a picture was shown, or every attempt lost its replica.
        """
        course = self._begin(request)
        while len(course.losses) < self._attempts:
            async with self._attempt(course), aclosing(self._events(course.request)) as events:
                async for event in events:
                    course.has_shown |= not isinstance(event, Progress | Starting)
                    yield event
                return
        raise ReplicaLost(base=request.base_id, attempts=self._attempts)

    def _begin(self, request: GenerationRequest) -> _Course:
        """Return a request that may be sent.

        Raises:
            Quarantined, QueueFull: it may not.
        """
        self._quarantine.check(request)
        self._check_share(request)
        return _Course(request)

    @asynccontextmanager
    async def _attempt(self, course: _Course) -> AsyncGenerator[None]:
        """Send a request in the block. Where that fails and the request may be sent again, the block just ends.

        Raises:
            LoraplexError: it may not.
        """
        request = course.request
        async with self._turn_to_send(course):
            try:
                with self._sending(request), self._errors_of(request):
                    yield
            except GivenBack as given:
                course.request = replace(request, waited_s=given.waited_s)
            except QueueFull:
                # One that was accepted before waits where others have taken its place.
                if not course.losses and not request.waited_s:
                    raise
                await asyncio.sleep(self._resend_after_s)
            except DeploymentUnavailableError:
                await self._find_again(request.base_id)
            except (RayActorError, ReplicaLost) as error:
                course.losses.append(error)
                if course.has_shown:
                    raise ReplicaLost(base=request.base_id, attempts=len(course.losses)) from None
                await self._check_losses(request, course.losses)

    @asynccontextmanager
    async def _turn_to_send(self, course: _Course) -> AsyncGenerator[None]:
        """Have the parts of a request that lost their replicas sent again one after another."""
        if not course.losses:
            yield
            return
        async with self._resending.setdefault(course.request.request_id, asyncio.Lock()):
            self._quarantine.check(course.request)
            yield

    async def _result(self, request: GenerationRequest) -> GenerationResult:
        """Send a request, and tell its caller where no replica will take it in time; its work ends with this call."""
        sent = self._sent(request)
        return await (sent if self._starts is None else self._starts.result(request.base_id, sent, request.due))

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """Send a stream's request, and tell of a start that it waits for; its work ends with this generator."""
        sent = self._stream_sent(request)
        async with aclosing(sent):
            told = sent if self._starts is None else self._starts.events(request.base_id, sent, request.due)
            async with aclosing(told):
                async for event in told:
                    yield event

    async def _sent(self, request: GenerationRequest) -> GenerationResult:
        """Send a request once it has a slot."""
        async with self._slots[request.base_id].slot(request):
            response = self._handle(request).generate.remote(request)
            with _ended_with(response):
                return await response

    async def _stream_sent(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """Send a stream's request once it has a slot."""
        async with self._slots[request.base_id].slot(request):
            # With this option a call is an asynchronous generator, which Ray's types do not say.
            response: Any = self._handle(request).options(stream=True).generate_stream.remote(request)
            with _ended_with(response):
                async for event in response:
                    yield event

    @property
    def held(self) -> int | None:
        """How many requests wait for the bases, where one of these has lately refused another; else None."""
        pressures = self._pressures.values()
        is_at_limit = any(pressure.was_full_lately for pressure in pressures)
        return sum(pressure.in_flight for pressure in pressures) if is_at_limit else None

    def _check_share(self, request: GenerationRequest) -> None:
        """Refuse a key that has most of a base's places, so that there are some for others.

        Raises:
            QueueFull: it has.
        """
        places = self._replica_settings[request.base_id].max_queued_requests + self._count_slots(request.base_id)
        if request.share and self._pressures[request.base_id].held_by(request.share) >= MOST_OF_PLACES * places:
            raise self._queue_full(request)

    def _count_slots(self, base_id: str) -> int:
        return self._replica_settings[base_id].max_ongoing_requests * max(replicas_known(base_id), 1)

    def _slots_of_mine(self, base_id: str) -> float:
        """Return this ingress replica's part of a base's slots, if as many as may be share them."""
        return self._count_slots(base_id) / self._ingresses

    def _queue_full(self, request: GenerationRequest) -> QueueFull:
        limit = self._replica_settings[request.base_id].max_queued_requests
        retry_after_s = self._pressures[request.base_id].retry_after_s()
        return QueueFull(base=request.base_id, limit=limit, retry_after_s=retry_after_s)

    def _handle(self, request: GenerationRequest) -> DeploymentHandle:
        # A base-only request names no model: with an id it would stick to one replica.
        model_id = request.adapters[0].spec.key if request.adapters else ""
        return self._handles[request.base_id].options(multiplexed_model_id=model_id)

    async def _find_again(self, base_id: str) -> None:
        """Return where a base whose application went has one again.

        Raises:
            BaseUnusable: it has none, or one that has failed.
        """
        used = self._handles[base_id]
        if self._starts is not None:
            await self._starts.check(base_id)
        await asyncio.sleep(self._resend_after_s)
        self._renew(base_id, used)

    async def _check_losses(self, request: GenerationRequest, losses: list[Exception]) -> None:
        """Return where a request that lost its replica may be sent to another.

        Raises:
            Quarantined: it ended the processes of two replicas, and has adapters.
            ReplicaLost: it ended those of two, or it may still run on one that could not be reached.
        """
        error = losses[-1]
        log.warning(
            "request %s lost its replica of %s (attempt %d of %d): %s",
            request.request_id, request.base_id, len(losses), self._attempts, type(error).__name__,
        )  # fmt: skip
        self._on_retry(request.base_id, error.reason if isinstance(error, ReplicaLost) else "died")
        lost = ReplicaLost(base=request.base_id, attempts=len(losses))
        if isinstance(error, ActorUnavailableError) and not await has_ended(error.actor_id):
            raise lost from None
        # A replica that is lost may be found dead a second time before Serve has another.
        died = {loss.actor_id for loss in losses if isinstance(loss, RayActorError) and not loss.preempted}
        if len(died) >= MAX_DEATHS:
            log.error("request %s is not sent again: %d processes ended on it", request.request_id, len(died))
            self._quarantine.hold(request, f"{len(died)} replicas ended while they drew with it")
            raise lost from None

    def _sending(self, request: GenerationRequest) -> AbstractContextManager[None]:
        return self._pressures[request.base_id].track(work_units(request), request.share)

    @contextmanager
    def _errors_of(self, request: GenerationRequest) -> Iterator[None]:
        try:
            yield
        except BackPressureError:
            self._pressures[request.base_id].record_rejection()
            raise self._queue_full(request) from None
        except LoraplexError as error:
            # Ray wraps our error in one whose text is a remote traceback.
            cause = getattr(error, "cause", error)
            raise cause from None
        except RayTaskError as error:
            raise error.cause from None


@contextmanager
def _ended_with(response: Any) -> Iterator[None]:
    """Stop a call's work where the block is left while the call may still run."""
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit, RayActorError, ReplicaLost):
        response.cancel()
        raise
