"""Which waiting requests run next, together: pure decisions, no thread, no tensor.

Owns the batch key (what requests must share to run in one pass), the order of those who wait, how far that order may
be broken, and who waits in vain. Must not know pipelines or weights; the time is handed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from serve_app.core import (
    NO_OPTIONS,
    AdapterSetKey,
    GenerationRequest,
    PipelineOptions,
    Priority,
    PromptSyntax,
    SchedulerOption,
)
from serve_app.work import LatencyModel

# A request is given up for its deadline only if it would have to run twice as fast as predicted.
FASTEST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class BatchKey:
    """The key of requests that may share a pass: everything that is one value per pipeline call.

    So is the priority: an interactive request would take as long as the batch requests that it took along.
    Whether there is a negative prompt is part of it because pipelines tell "none" from "empty" (SDXL feeds
    zeros for none), and a call has either one text per image or none at all. All texts of a call have so many `chunks`.
    """

    composition: AdapterSetKey
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str | None
    strength: float | None
    has_image: bool
    has_mask: bool
    has_negative_prompt: bool
    options: PipelineOptions = NO_OPTIONS
    scheduler_options: tuple[tuple[str, SchedulerOption], ...] = ()
    prompt_syntax: PromptSyntax = "plain"
    chunks: int = 0
    priority: Priority = "interactive"


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How far the order of arrival may be broken.

    A request is overtaken when a pass begins whose first request comes after it. That may happen to it
    `max_overtakes` times, and for `max_overtaken_s` seconds from the first time on. A request of priority "batch"
    takes the place that it would have had `batch_delay_s` seconds later, so that it waits for interactive ones that
    come within that time and for no others.
    """

    max_overtakes: int = 4
    max_overtaken_s: float = 5.0
    batch_delay_s: float = 60.0


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """One request in the queue: `job_id` names it, `num_images` is its share of a batch, `units` its work.

    Times are on one clock, that of `now_s`. `times_skipped` counts how often it was overtaken, first at
    `overtaken_since_s`.
    """

    job_id: int
    key: BatchKey
    num_images: int
    arrived_s: float = 0.0
    deadline_s: float | None = None
    priority: Priority = "interactive"
    units: float = 0.0
    times_skipped: int = 0
    overtaken_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The requests that run next, in one pass: `tickets` in the queue's order."""

    key: BatchKey
    tickets: tuple[int, ...]
    num_images: int


def batch_key(request: GenerationRequest, composition: AdapterSetKey, chunks: int = 0) -> BatchKey:
    """Return what `request` must share with others to run beside them."""
    return BatchKey(
        composition=composition,
        width=request.width,
        height=request.height,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        scheduler=request.scheduler,
        strength=request.strength if request.image is not None else None,
        has_image=request.image is not None,
        has_mask=request.mask is not None,
        has_negative_prompt=request.negative_prompt is not None,
        options=request.options,
        scheduler_options=request.scheduler_options,
        prompt_syntax=request.prompt_syntax,
        chunks=chunks,
        priority=request.priority,
    )


def in_order(waiting: Iterable[QueuedRequest], policy: QueuePolicy) -> list[QueuedRequest]:
    """Return those who wait in the order in which they run if none overtakes another."""

    def place(item: QueuedRequest) -> tuple[float, int]:
        delay_s = policy.batch_delay_s if item.priority == "batch" else 0.0
        return item.arrived_s + delay_s, item.job_id

    return sorted(waiting, key=place)


def next_batch(
    waiting: Iterable[QueuedRequest],
    *,
    applied: AdapterSetKey | None,
    now_s: float,
    policy: QueuePolicy,
    max_images: int,
) -> Batch | None:
    """Choose the next batch: the first in order, and those behind it that can share its pass and still fit.

    The first is overtaken by the nearest request of the composition `applied` now, which saves a swap, as long as
    none before that one has been overtaken as often or as long as `policy` allows. None only where none waits. A
    request of more than `max_images` images runs alone. Joining a pass is not overtaking: it costs the others no
    turn.
    """
    order = in_order(waiting, policy)
    return batch_of(_first(order, applied, now_s, policy), order, max_images=max_images) if order else None


def batch_of(first: QueuedRequest, order: Sequence[QueuedRequest], *, max_images: int) -> Batch:
    """Return the pass that `first` begins: itself, and those of `order` that can share it and still fit."""
    tickets, num_images = [first.job_id], first.num_images
    for item in order:
        if num_images >= max_images:
            break
        if item.job_id != first.job_id and item.key == first.key and num_images + item.num_images <= max_images:
            tickets.append(item.job_id)
            num_images += item.num_images
    return Batch(first.key, tuple(tickets), num_images)


def remaining_after(
    waiting: Iterable[QueuedRequest], batch: Batch, *, now_s: float, policy: QueuePolicy
) -> list[QueuedRequest]:
    """Return those who still wait once `batch` has begun at `now_s`, in order, with who was overtaken noted."""
    left: list[QueuedRequest] = []
    has_begun = False
    for item in in_order(waiting, policy):
        if item.job_id in batch.tickets:
            has_begun = has_begun or item.job_id == batch.tickets[0]
        elif has_begun:
            left.append(item)
        else:
            since = now_s if item.overtaken_since_s is None else item.overtaken_since_s
            left.append(replace(item, times_skipped=item.times_skipped + 1, overtaken_since_s=since))
    return left


def unmeetable_deadlines(
    waiting: Sequence[QueuedRequest], *, now_s: float, pace: LatencyModel | None
) -> tuple[int, ...]:
    """Return the tickets of those whose deadline has passed, or cannot be met even at twice the predicted pace.

    `pace` None means that nothing is known yet. If only one request is waiting, it runs even if its deadline looks
    unreachable: rejecting it helps no other request, and only a real run can correct a wrong estimate.
    """

    def is_in_vain(item: QueuedRequest) -> bool:
        if item.deadline_s is None:
            return False
        needed_s = 0.0 if pace is None or len(waiting) == 1 else FASTEST_SHARE * pace.seconds(item.units)
        return now_s + needed_s >= item.deadline_s

    return tuple(item.job_id for item in waiting if is_in_vain(item))


def _first(
    order: Sequence[QueuedRequest], applied: AdapterSetKey | None, now_s: float, policy: QueuePolicy
) -> QueuedRequest:
    for item in order:
        if item.key.composition == applied:
            return item
        since = item.overtaken_since_s
        is_spent = since is not None and now_s - since >= policy.max_overtaken_s
        if is_spent or item.times_skipped >= policy.max_overtakes:
            break
    return order[0]
