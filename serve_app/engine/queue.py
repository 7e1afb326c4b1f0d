"""Which waiting requests run next, together: pure decisions, no thread, no tensor.

Owns the batch key (what requests must share to run in one pass) and the choice of the next batch. Must not
know pipelines, weights or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.core import GenerationRequest, Scale

# The adapters of a request in their order of application: (digest of the file, scale) each.
CompositionKey = tuple[tuple[str, Scale], ...]


@dataclass(frozen=True, slots=True)
class BatchKey:
    """What requests must have in common to share a pass: everything that is one value per pipeline call.

    Whether there is a negative prompt is part of it because pipelines tell "none" from "empty" (SDXL feeds
    zeros for none), and a call has either one text per image or none at all.
    """

    composition: CompositionKey
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str | None
    strength: float | None
    has_image: bool
    has_mask: bool
    has_negative_prompt: bool


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request in the queue: `ticket` names it, `num_images` is its share of a batch."""

    ticket: int
    key: BatchKey
    num_images: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The requests that run next, in one pass: `tickets` in order of arrival."""

    key: BatchKey
    tickets: tuple[int, ...]
    num_images: int


def batch_key(request: GenerationRequest, composition: CompositionKey) -> BatchKey:
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
    )


def next_batch(waiting: Sequence[Waiting], *, max_images: int) -> Batch | None:
    """Choose the next batch: the oldest request, and those behind it that can share its pass and still fit.

    `waiting` is in order of arrival. The oldest always runs, so nobody waits for more batches than there are
    requests before it. A request of more than `max_images` images runs alone. Preferring whatever is applied
    already was left out on purpose: a swap costs milliseconds, a turn costs seconds.
    """
    if not waiting:
        return None
    head = waiting[0]
    tickets, num_images = [head.ticket], head.num_images
    for item in waiting[1:]:
        if num_images >= max_images:
            break
        if item.key == head.key and num_images + item.num_images <= max_images:
            tickets.append(item.ticket)
            num_images += item.num_images
    return Batch(head.key, tuple(tickets), num_images)
