"""What is used: adapters of a base by uses that fade, and devices by day, key and base. Pure but for the clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from serve_app.catalog.replica_report import DayUsage
from serve_app.core import AdapterSpec

# A use counts half after this long: the traffic of this hour, not of yesterday.
HALF_LIFE_S = 900.0
# No replica is asked to load more than these when it starts.
MAX_NAMED = 64


class UsageTracker:
    """The adapters of one base and their uses; only the most used of thousands are remembered."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin with nothing; `clock` returns monotonic seconds."""
        self._clock = clock
        self._uses: dict[str, tuple[AdapterSpec, float, float]] = {}

    def note(self, spec: AdapterSpec, count: int = 1) -> None:
        """Count uses of an adapter."""
        now_s = self._clock()
        _, uses, at_s = self._uses.get(spec.key, (spec, 0.0, now_s))
        self._uses[spec.key] = spec, _faded(uses, now_s - at_s) + count, now_s
        if len(self._uses) > 4 * MAX_NAMED:
            self._uses = {kept.key: self._uses[kept.key] for kept in self.most_used()}

    def most_used(self) -> tuple[AdapterSpec, ...]:
        """Return the adapters used most, the most used first."""
        now_s = self._clock()
        ranked = sorted(self._uses.values(), key=lambda entry: -_faded(entry[1], now_s - entry[2]))
        return tuple(spec for spec, _, _ in ranked[:MAX_NAMED])


def _faded(uses: float, age_s: float) -> float:
    return uses * math.exp2(-age_s / HALF_LIFE_S)


class Drawn:
    """What was drawn since it was taken last, by day (UTC), key and base."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin with nothing; `clock` returns seconds since 1970."""
        self._clock = clock
        self._rows: dict[tuple[str, str | None, str], DayUsage] = {}

    def note(self, key: str | None, base_id: str, *, images: int, device_s: float) -> None:
        """Count images that a key got from a base, and the device's time for them."""
        day = datetime.fromtimestamp(self._clock(), UTC).date().isoformat()
        self.put_back((DayUsage(day, key, base_id, images, device_s),))

    def take(self) -> tuple[DayUsage, ...]:
        """Return what was counted, and begin anew."""
        rows, self._rows = tuple(self._rows.values()), {}
        return rows

    def put_back(self, rows: Sequence[DayUsage]) -> None:
        """Count what was taken once more, since it could not be kept."""
        for row in rows:
            place = row.day, row.key, row.base_id
            known = self._rows.get(place, DayUsage(*place, 0, 0.0))
            self._rows[place] = replace(known, images=known.images + row.images, device_s=known.device_s + row.device_s)
