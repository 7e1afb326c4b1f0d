"""How the images of one request are spread over replicas: a pure decision of the gateway and the simulator."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.work import LatencyModel

# Images drawn alone instead of in a batch are taken to need so much more of a device.
ALONE_COST = 0.15
# Spreading must end a request sooner by this share at least: it takes more device time in all.
LEAST_GAIN = 0.1


def spread_images(
    num_images: int, image_units: float, backlogs_s: Sequence[float], pace: LatencyModel
) -> tuple[int, ...]:
    """Return how many images each replica draws, in the replicas' order; they add up to `num_images`.

    Each image goes where it would end first. Where that ends the whole not clearly sooner than one replica would, the
    one with the least backlog draws all of them.
    """
    least = min(range(len(backlogs_s)), key=lambda index: (backlogs_s[index], index))
    counts = [0] * len(backlogs_s)

    def end_s(index: int, count: int) -> float:
        return backlogs_s[index] + pace.seconds(image_units * count) * (1 + ALONE_COST * (count == 1))

    for _ in range(num_images):
        counts[min(range(len(counts)), key=lambda index: (end_s(index, counts[index] + 1), index))] += 1
    spread_s = max(end_s(index, count) for index, count in enumerate(counts) if count)
    whole_s = backlogs_s[least] + pace.seconds(image_units * num_images)
    if num_images > 1 and spread_s - backlogs_s[least] <= (1 - LEAST_GAIN) * (whole_s - backlogs_s[least]):
        return tuple(counts)
    return tuple(num_images if index == least else 0 for index in range(len(counts)))
