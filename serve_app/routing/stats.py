"""What a replica tells the routers about itself, and the small form in which it travels.

Owns `ReplicaStats`, its encoding and its rounding. Every change of what travels is sent to every process that routes,
so the form is small and the numbers are rough. Must not know Ray, torch or how the numbers come about.
"""

from __future__ import annotations

import functools
import hashlib
import math
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.work import LatencyModel

# Eight characters for a key: among a million adapters two have the same with a chance of one in five hundred.
_DIGEST_BYTES = 6
_TAG_LENGTH = 8
# The most adapters of one tier that are told, the last used ones; the others count as fetched anew.
MAX_REPORTED = 512
# A replica tells that it lives at least this often, all of them at the same moment, so that a fleet at rest is one
# message in a while.
HEARTBEAT_S = 5.0
_BACKLOG_GRAIN_S = 0.1


@functools.lru_cache(maxsize=65_536)
def tag_of(key: str) -> str:
    """Return the short name under which an adapter's key travels."""
    return urlsafe_b64encode(hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES).digest()).decode()


@dataclass(frozen=True, slots=True)
class MeasuredCosts:
    """How many times the default costs each step took here: `TierCosts.measured` takes them."""

    swap: float = 1.0
    to_host: float = 1.0
    fetch: float = 1.0


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """A replica as it told of itself at `at_s`, in Unix seconds; adapters go by their tags.

    `applied`, `device`, `host` and `arriving` are as in `ReplicaView`. `is_stalled` says that its device makes no
    headway though it has work.
    """

    at_s: float
    backlog_s: float
    pace: LatencyModel
    applied: frozenset[str]
    device: frozenset[str]
    host: frozenset[str]
    arriving: frozenset[str]
    host_free_bytes: float
    measured: MeasuredCosts
    is_stalled: bool


def encode(stats: ReplicaStats) -> dict[str, Any]:
    """Return the stats in the form that travels: plain numbers and strings, rounded, without `at_s`."""
    measured = stats.measured
    return {
        "backlog": _grained(stats.backlog_s),
        "pace": (_rough(stats.pace.fixed_s), _rough(stats.pace.unit_s)),
        "applied": "".join(sorted(stats.applied)),
        "device": "".join(sorted(stats.device)),
        "host": "".join(sorted(stats.host)),
        "arriving": "".join(sorted(stats.arriving)),
        "free": _rough(stats.host_free_bytes),
        "measured": (_rough(measured.swap), _rough(measured.to_host), _rough(measured.fetch)),
        "stalled": stats.is_stalled,
    }


def decode(wire: Mapping[str, Any]) -> ReplicaStats | None:
    """Read what travelled; None where a replica has told nothing yet, or speaks another version's language."""
    try:
        return ReplicaStats(
            at_s=float(wire["at"]),
            backlog_s=float(wire["backlog"]),
            pace=LatencyModel(*map(float, wire["pace"])),
            applied=_tags(wire["applied"]),
            device=_tags(wire["device"]),
            host=_tags(wire["host"]),
            arriving=_tags(wire["arriving"]),
            host_free_bytes=float(wire["free"]),
            measured=MeasuredCosts(*map(float, wire["measured"])),
            is_stalled=bool(wire["stalled"]),
        )
    except (LookupError, TypeError, ValueError):
        return None


def _tags(joined: str) -> frozenset[str]:
    return frozenset(joined[i : i + _TAG_LENGTH] for i in range(0, len(joined), _TAG_LENGTH))


def _grained(seconds: float) -> float:
    """Round to a tenth of a second, and to two digits where that is coarser."""
    grain = max(_BACKLOG_GRAIN_S, 10.0 ** math.floor(math.log10(seconds)) / 10) if seconds > 0 else _BACKLOG_GRAIN_S
    return round(round(seconds / grain) * grain, 3)


def _rough(value: float) -> float:
    """Round to two digits, so that a measurement that hardly moves is no news."""
    return float(f"{value:.1e}")
