"""Which adapters are kept from the device for a while, because their images fail on it again and again.

Pure but for its own books: the clock is given. Must not know what fails, or how.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from serve_app.core import GenerationRequest, Scale
from serve_app.errors import InternalError
from serve_app.refusals import NonFinite, Quarantined

# Fewer than the failed batches in a row after which a replica is taken to be broken, as it may be the adapter alone.
MAX_FAILURES = 2
PERIOD_S = 60.0
LONGEST_S = 900.0
# Failures closer to each other than this are those of one pass over the device.
SAME_PASS_S = 0.25
MAX_REMEMBERED = 1024

# The scales count: what overflows at eight times its strength does not at its own.
KeyedAdapterSet = tuple[tuple[str, Scale], ...]


@dataclass(frozen=True, slots=True)
class QuarantineEntry:
    """A composition that is refused now: the keys and scales of its adapters, why, and for how long."""

    keys: tuple[str, ...]
    scales: tuple[Scale, ...]
    reason: str
    left_s: int


@dataclass(slots=True)
class _Record:
    why: str = ""
    failures: int = 0
    counted_at: float = -math.inf
    held_until: float = -math.inf


class Quarantine:
    """Counts the failures in a row of each composition of adapters.

    After `MAX_FAILURES` it is refused for a minute; then one more failure suffices, for twice as long each time. One
    image that comes out clears it. Requests without adapters are never refused.
    """

    def __init__(self, *, clock: Callable[[], float], on_change: Callable[[int], None] = lambda _: None) -> None:
        """`clock` gives seconds that only grow; `on_change` hears how many compositions are refused now."""
        self._clock = clock
        self._on_change = on_change
        self._records: OrderedDict[KeyedAdapterSet, _Record] = OrderedDict()

    @contextmanager
    def watched(self, request: GenerationRequest) -> Generator[None]:
        """Refuse a request whose adapters are held; else learn from how the work inside ends.

        Raises:
            Quarantined: they failed too often.
        """
        if not request.adapters:
            yield
            return
        self._check(request)
        try:
            yield
        except (NonFinite, InternalError) as error:
            self._note_failure(request, error)
            raise
        # What is given up, refused or out of time says nothing about the adapters.
        self._records.pop(_composition(request), None)
        self._on_change(self.held)

    def hold(self, request: GenerationRequest, reason: str) -> None:
        """Refuse the adapters of a request from now on.

        Raises:
            Quarantined: always, where it has any.
        """
        if request.adapters:
            record = self._records.setdefault(_composition(request), _Record())
            record.failures = max(record.failures + 1, MAX_FAILURES)
            self._hold(record, reason)
            self._check(request)

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request whose adapters are held.

        Raises:
            Quarantined: they failed too often.
        """
        self._check(request)

    @property
    def held(self) -> int:
        """How many compositions are refused now."""
        now = self._clock()
        return sum(record.held_until > now for record in self._records.values())

    def holds(self) -> tuple[QuarantineEntry, ...]:
        """Return every composition that is refused now."""
        now = self._clock()
        return tuple(
            QuarantineEntry(
                keys=tuple(key for key, _ in composition),
                scales=tuple(scale for _, scale in composition),
                reason=record.why,
                left_s=math.ceil(record.held_until - now),
            )
            for composition, record in self._records.items()
            if record.held_until > now
        )

    def _check(self, request: GenerationRequest) -> None:
        record = self._records.get(_composition(request))
        if record is None:
            return
        left_s = record.held_until - self._clock()
        if left_s > 0:
            # What fails on the device may be told to others than its caller, and is not in the refusal.
            raise Quarantined(_names(request), record.why.partition(":")[0], math.ceil(left_s))

    def _note_failure(self, request: GenerationRequest, error: NonFinite | InternalError) -> None:
        now, composition = self._clock(), _composition(request)
        record = self._records.setdefault(composition, _Record())
        self._records.move_to_end(composition)
        if now - record.counted_at >= SAME_PASS_S:
            record.failures, record.counted_at = record.failures + 1, now
            if record.failures >= MAX_FAILURES:
                last = error.reason if isinstance(error, NonFinite) else "the service failed on it"
                self._hold(record, f"its last {record.failures} tries failed: {last}")
        while len(self._records) > MAX_REMEMBERED:
            self._records.popitem(last=False)
        self._on_change(self.held)

    def _hold(self, record: _Record, why: str) -> None:
        record.why = why
        record.held_until = self._clock() + min(PERIOD_S * 2 ** (record.failures - MAX_FAILURES), LONGEST_S)


def _composition(request: GenerationRequest) -> KeyedAdapterSet:
    return tuple((use.spec.key, use.scale) for use in request.adapters)


def _names(request: GenerationRequest) -> str:
    return " with ".join(f"{use.spec.id} at scale {use.scale:g}" for use in request.adapters)
