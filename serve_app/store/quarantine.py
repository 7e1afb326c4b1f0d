"""A circuit breaker for adapter sets whose images fail repeatedly on the device.

Pure except for its own counts: the clock is passed in. Must not know what fails, or how.
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

# Less than the number of failed batches after which a replica counts as broken: the adapter alone may be at fault.
MAX_FAILURES = 2
PERIOD_S = 60.0
LONGEST_S = 900.0
# Failures closer together than this belong to one pass.
SAME_PASS_S = 0.25
MAX_REMEMBERED = 1024

# With scales: an adapter that overflows at scale 8 may work at 1.
KeyedAdapterSet = tuple[tuple[str, Scale], ...]


@dataclass(frozen=True, slots=True)
class QuarantineEntry:
    """An adapter set in quarantine: keys and scales, the reason, and the seconds that are left."""

    keys: tuple[str, ...]
    scales: tuple[Scale, ...]
    reason: str
    left_s: int


@dataclass(slots=True)
class _Record:
    reason: str = ""
    failures: int = 0
    counted_at: float = -math.inf
    held_until: float = -math.inf


class Quarantine:
    """Counts the consecutive failures of each adapter set.

    After `MAX_FAILURES` it is refused for a minute. After that, each further failure refuses it again for twice as
    long. One successful image clears it. Requests without adapters are never refused.
    """

    def __init__(self, *, clock: Callable[[], float], on_change: Callable[[int], None] = lambda _: None) -> None:
        """`clock` returns monotonic seconds; `on_change` gets the number of adapter sets in quarantine."""
        self._clock = clock
        self._on_change = on_change
        self._records: OrderedDict[KeyedAdapterSet, _Record] = OrderedDict()

    @contextmanager
    def guard(self, request: GenerationRequest) -> Generator[None]:
        """Refuse a request whose adapters are in quarantine; otherwise record how the block ends.

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
        # Cancellations, refusals and deadlines say nothing about the adapters.
        self._records.pop(_adapter_set(request), None)
        self._on_change(self.held)

    def hold(self, request: GenerationRequest, reason: str) -> None:
        """Refuse the adapters of a request from now on.

        Raises:
            Quarantined: always, where it has any.
        """
        if request.adapters:
            record = self._records.setdefault(_adapter_set(request), _Record())
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
        """How many adapter sets are in quarantine."""
        now = self._clock()
        return sum(record.held_until > now for record in self._records.values())

    def holds(self) -> tuple[QuarantineEntry, ...]:
        """Return every adapter set in quarantine."""
        now = self._clock()
        return tuple(
            QuarantineEntry(
                keys=tuple(key for key, _ in adapter_set),
                scales=tuple(scale for _, scale in adapter_set),
                reason=record.reason,
                left_s=math.ceil(record.held_until - now),
            )
            for adapter_set, record in self._records.items()
            if record.held_until > now
        )

    def _check(self, request: GenerationRequest) -> None:
        record = self._records.get(_adapter_set(request))
        if record is None:
            return
        left_s = record.held_until - self._clock()
        if left_s > 0:
            # Other callers may see the refusal, so it does not quote the device's error.
            raise Quarantined(_names(request), record.reason.partition(":")[0], math.ceil(left_s))

    def _note_failure(self, request: GenerationRequest, error: NonFinite | InternalError) -> None:
        now, adapter_set = self._clock(), _adapter_set(request)
        record = self._records.setdefault(adapter_set, _Record())
        self._records.move_to_end(adapter_set)
        if now - record.counted_at >= SAME_PASS_S:
            record.failures, record.counted_at = record.failures + 1, now
            if record.failures >= MAX_FAILURES:
                last = error.reason if isinstance(error, NonFinite) else "the service failed on it"
                self._hold(record, f"its last {record.failures} tries failed: {last}")
        while len(self._records) > MAX_REMEMBERED:
            self._records.popitem(last=False)
        self._on_change(self.held)

    def _hold(self, record: _Record, reason: str) -> None:
        record.reason = reason
        record.held_until = self._clock() + min(PERIOD_S * 2 ** (record.failures - MAX_FAILURES), LONGEST_S)


def _adapter_set(request: GenerationRequest) -> KeyedAdapterSet:
    return tuple((use.spec.key, use.scale) for use in request.adapters)


def _names(request: GenerationRequest) -> str:
    return " with ".join(f"{use.spec.id} at scale {use.scale:g}" for use in request.adapters)
