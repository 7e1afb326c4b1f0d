"""How the images of one request are spread over replicas: a pure decision of the gateway and the simulator."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Sequence

from serve_app.core import GenerationRequest
from serve_app.routing.cost import STALLED_S, ReplicaView, RequestLoad, load_of, waits_s
from serve_app.work import LatencyModel

# Images drawn alone instead of in a batch are taken to need so much more of a device.
ALONE_COST = 0.15
# Spreading must end a request sooner by this share at least: it takes more device time in all.
LEAST_GAIN = 0.1


def parts_of(request: GenerationRequest, views: Iterable[ReplicaView]) -> tuple[int, ...]:
    """Return how many images the parts of a request have, the largest first; one number where it stays whole."""
    load = load_of(request)
    known = [(waits_s(load, view), view.pace) for view in views]
    return spread_images(request.num_images, load, known)


def spread_images(
    num_images: int, load: RequestLoad, replicas: Sequence[tuple[float, LatencyModel]]
) -> tuple[int, ...]:
    """Return how many images the parts of a request have, the largest first; they add up to `num_images`.

    Of each replica it is known when it would begin, its adapters there, and its pace. Each image goes where it would
    end first. Where that ends the whole not clearly sooner than one replica would, it stays whole.
    """
    if num_images == 1 or len(replicas) < 2:
        return (num_images,)
    image_units = load.units / num_images
    best = heapq.nsmallest(num_images, replicas, key=lambda known: known[0])
    counts = [0] * len(best)

    def end_s(index: int, count: int) -> float:
        begin_s, pace = best[index]
        return begin_s + pace.seconds(image_units * count) * (1 + ALONE_COST * (count == 1))

    for _ in range(num_images):
        counts[min(range(len(counts)), key=lambda index: (end_s(index, counts[index] + 1), index))] += 1
    least_s = best[0][0]
    spread_s = max(end_s(index, count) for index, count in enumerate(counts) if count)
    whole_s = min(end_s(index, num_images) for index in range(len(best)))
    if spread_s - least_s > (1 - LEAST_GAIN) * (whole_s - least_s):
        return (num_images,)
    return tuple(sorted(filter(None, counts), reverse=True))


def work_to_keep_s(views: Sequence[ReplicaView]) -> float | None:
    """Return the seconds of work that each replica keeps when another has joined; None where none could take more.

    That is the mean of those whose device makes progress: work of a stalled one is better off anywhere else.
    """
    ahead_s = [view.ahead_s for view in views if view.ahead_s < STALLED_S]
    return statistics.fmean(ahead_s) if ahead_s and len(views) > 1 else None
