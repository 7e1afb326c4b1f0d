"""A batch cut into passes: which images of which request are drawn together.

Pure: no tensor, no thread. Must not know why a batch is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from serve_app.core import GenerationRequest

_SEEDS = 2**64


@dataclass(frozen=True, slots=True)
class Portion:
    """Images of one request: `count` of them from number `first` on; `place` is the request's in its batch."""

    place: int
    first: int
    count: int

    def of(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request for these images alone, each with the seed that it has in the whole.

        A part of a request asks for no previews, as nobody could tell of which images they are.
        """
        if self.count == request.num_images:
            return request
        return replace(request, num_images=self.count, seed=(request.seed + self.first) % _SEEDS, num_previews=0)


Pass = tuple[Portion, ...]


def passes_of(counts: Sequence[int], at_most: int | None) -> tuple[Pass, ...]:
    """Cut requests with so many images each into passes of at most so many images, in order; None for one pass."""
    if at_most is None or sum(counts) <= at_most:
        return (tuple(Portion(place, 0, count) for place, count in enumerate(counts)),)
    return tuple(_passes(counts, at_most))


def one_by_one(whole: Pass) -> tuple[Pass, ...]:
    """Cut a pass into passes of one image."""
    return tuple((Portion(part.place, part.first + n, 1),) for part in whole for n in range(part.count))


def images_in(whole: Pass) -> int:
    """Return how many images a pass draws."""
    return sum(part.count for part in whole)


def _passes(counts: Sequence[int], at_most: int) -> Iterator[Pass]:
    pending: list[Portion] = []
    room = at_most
    for place, count in enumerate(counts):
        first = 0
        while first < count:
            taken = min(count - first, room)
            pending.append(Portion(place, first, taken))
            first, room = first + taken, room - taken
            if not room:
                yield tuple(pending)
                pending, room = [], at_most
    if pending:
        yield tuple(pending)
