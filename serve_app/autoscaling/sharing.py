"""Which bases have the GPUs of a cluster while they want more than there are.

Owns the decision, which is pure, what it must remember of a base, and how long a base can be kept waiting by it. Must
not know Ray, or where the numbers come from.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)

# A base that came keeps a replica for so many times as long as its start took, unless nobody asks for it.
STAY_STARTS = 4.0
# The start of a base that has never said how long it takes.
UNKNOWN_START_S = 20.0
# A replica beyond a base's first goes to another base only where that has so many times the work for it.
MOVE_FACTOR = 2.0
# Ray counts GPUs in ten-thousandths.
LEAST_GPU = 1e-4


@dataclass(frozen=True, slots=True)
class BaseNeed:
    """What a base has and wants. Each of its replicas takes `gpus`; `least` of them are never taken from it.

    `present` replicas run or start; `needed` are what its work needs now, `wanted` what it would have by itself, which
    goes down more slowly. A second of its work counts `weight` seconds. `came_s` is when it had its first replica after
    none, `grew_s` when it had its last further one, `quiet_s` since when it has no request; None where that is not so.
    A base `waits_s` since then where it has requests and no replica. What it has is `fixed` while its first one starts,
    and where it cannot be told anything.
    """

    gpus: float
    weight: float = 1.0
    least: int = 0
    present: int = 0
    needed: int = 0
    wanted: int = 0
    work_s: float = 0.0
    start_s: float = UNKNOWN_START_S
    came_s: float | None = None
    grew_s: float | None = None
    quiet_s: float | None = None
    waits_s: float | None = None
    is_fixed: bool = False

    @property
    def replicas(self) -> int:
        """How many replicas it has or would have."""
        return max(self.present, self.wanted)

    def stays(self, now_s: float) -> bool:
        """Whether its first replica may not be taken yet."""
        if self.came_s is None or now_s - self.came_s >= STAY_STARTS * self.start_s:
            return False
        # Giving it away costs a start: worth it once nobody has asked for as long as that takes.
        return self.quiet_s is None or now_s - self.quiet_s < self.start_s


@dataclass(frozen=True, slots=True)
class Share:
    """How many replicas a base is to have; where some of those present are taken, its own delays do not count."""

    replicas: int
    is_taken: bool = False


class _Claim(NamedTuple):
    """One replica that a base has or wants; those with the lowest rank are granted first."""

    rank: tuple[float, ...]
    number: int


def share_gpus(bases: Mapping[K, BaseNeed], gpus: float, now_s: float) -> dict[K, Share]:
    """Return how many replicas each base is to have of `gpus` GPUs.

    Where there are enough, that is what each wants by itself. Otherwise, in this order: the guaranteed replicas; the
    first replica of those that came lately and are asked for; one for each base that waits, the longest first; the
    first of those with work, most work first; further ones, by work for each; what is kept although nobody needs it.
    """
    left = gpus - sum(base.gpus * base.replicas for base in bases.values())
    if left >= -LEAST_GPU:
        return {key: Share(base.wanted) for key, base in bases.items()}
    keys = list(bases)
    claims = sorted(
        claim
        for number, key in enumerate(keys)
        for claim in _claims(bases[key], number, now_s)
    )  # fmt: skip
    granted = [0] * len(keys)
    left = gpus
    closed: set[int] = set()
    for claim in claims:
        each = bases[keys[claim.number]].gpus
        # A base that was refused one gets no later one: its replicas are counted, not named.
        if claim.number in closed or each > left + LEAST_GPU:
            closed.add(claim.number)
            continue
        granted[claim.number] += 1
        left -= each
    return {key: _share(bases[key], count) for key, count in zip(keys, granted, strict=True)}


def _share(base: BaseNeed, granted: int) -> Share:
    if granted < base.present:
        return Share(granted, is_taken=True)
    return Share(min(granted, base.wanted))


def _claims(base: BaseNeed, number: int, now_s: float) -> Iterable[_Claim]:
    work = base.work_s * base.weight
    grew_lately = base.grew_s is not None and now_s - base.grew_s < STAY_STARTS * base.start_s
    for index in range(base.replicas):
        is_present = index < base.present
        if index < base.least:
            rank = (0.0, index)
        elif base.is_fixed or (index == 0 and is_present and base.stays(now_s)):
            rank = (1.0, index)
        elif base.waits_s is not None:
            rank = (2.0, base.waits_s)
        elif index < base.needed and index == 0:
            rank = (3.0, -work)
        elif index < base.needed:
            keeps = is_present and grew_lately
            rank = (4.0, not keeps, -work / (index + 1) * (MOVE_FACTOR if is_present else 1.0))
        else:
            rank = (5.0, index, -math.inf if base.quiet_s is None else -base.quiet_s)
        yield _Claim(rank, number)


@dataclass(slots=True)
class History:
    """When a base came, grew and fell quiet, from what is seen of it."""

    came_s: float | None = None
    grew_s: float | None = None
    quiet_s: float | None = None
    running: int = 0

    def see(self, running: int, *, is_quiet: bool, now_s: float) -> None:
        """Take in how many replicas run, and whether the base has no request."""
        if not running:
            self.came_s = self.grew_s = None
        elif not self.running:
            self.came_s, self.grew_s = now_s, None
        elif running > self.running:
            self.grew_s = now_s
        self.running = running
        if not is_quiet:
            self.quiet_s = None
        elif self.quiet_s is None:
            self.quiet_s = now_s


@dataclass(frozen=True, slots=True)
class LongestWait:
    """How long a base without a replica waits at most for one to run: so many starts, so many ends of accepted work."""

    starts: float
    drains: int

    def seconds(self, *, start_s: float, drain_s: float) -> float:
        """Return it in seconds, of the slowest start and of the longest time in which accepted work is finished."""
        return self.starts * start_s + self.drains * drain_s


def longest_wait(bases: Iterable[tuple[int, float]], gpus: float) -> LongestWait | None:
    """Return the longest wait of bases of (fewest replicas, GPUs each); None where one may wait for ever.

    The worst that can be: every base has work all the time, and those before this one are just coming, where others
    still finish what they have accepted. In each round all that came stay for their time, finish and make room, and
    those that have waited longest start. Replicas are taken to be of the size of the largest.
    """
    listed = [(least, each) for least, each in bases if each > 0]
    sharing = [each for least, each in listed if not least]
    if not sharing:
        return LongestWait(0.0, 0)
    places = math.floor((gpus - sum(least * each for least, each in listed)) / max(sharing) + LEAST_GPU)
    if places < 1:
        return None
    rounds = math.ceil(max(0, len(sharing) - places) / places)
    return LongestWait(1.0 + rounds * (STAY_STARTS + 1.0), 1 + rounds)
