"""Decides which request has the device for the next step: pure, no thread, no tensor.

Owns the order of passes that may be suspended between two steps and of requests that have not begun, the books of
device time that the order goes by, and what a change of adapters may cost. Used by the device thread and by the
simulator. Must not know pipelines or weights; every time is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from serve_app.core import Priority
from serve_app.engine.worker.scheduling import AdapterSetKey

# The share of the device's time that changes of adapters may take for the sake of turns.
MAX_CHANGE_SHARE = 0.03
# Time without changes counts for later ones as far back as this.
CREDIT_WINDOW_S = 60.0
# The time that changes may take before anything has run.
FIRST_CREDIT_S = 0.1
# The device time that a caller has had is forgotten with this time constant.
FAIRNESS_WINDOW_S = 20.0
# The newest change's share in what a change is taken to cost.
NEWEST_CHANGE = 0.2
# A request that has waited so much longer goes before one with 1/e of its work, and sooner the smaller both are: each
# time that it takes alone counts as well.
AGE_S = 40.0
AGE_SLOWDOWN = 4.0
_FORGOTTEN_S = _LEAST_S = 1e-3


@dataclass(frozen=True, slots=True)
class SharingPolicy:
    """How passes take turns on one device.

    At most `max_in_progress` passes have begun and not ended. A request whose slowdown, the time from its arrival to
    its end over the time that it takes alone, would reach `max_slowdown` even if it ran now goes before all others of
    its caller that arrived later. For one of priority "batch" that time begins `batch_delay_s` after its arrival.
    """

    max_in_progress: int = 8
    max_slowdown: float = 20.0
    batch_delay_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim to the device: a pass that has begun, or a request that waits.

    `ticket` names it, `share` is whose it is. `remaining_s` is the device time that it still needs, `whole_s` what it
    needs in all. A part of a request is as urgent as the whole, which has `times_part` its work.
    """

    ticket: int
    composition: AdapterSetKey
    arrived_s: float
    remaining_s: float
    whole_s: float
    share: str = ""
    priority: Priority = "interactive"
    is_begun: bool = False
    times_part: float = 1.0

    @property
    def left_s(self) -> float:
        """The work left by which it is ranked."""
        return self.remaining_s * self.times_part

    def is_overdue(self, now_s: float, policy: SharingPolicy) -> bool:
        """Whether its slowdown would reach the bound even if it ran now to its end."""
        since_s = self.arrived_s + (policy.batch_delay_s if self.priority == "batch" else 0.0)
        return now_s - since_s + self.left_s >= policy.max_slowdown * self.whole_s * self.times_part


class DeviceBooks:
    """The device time that each caller has had, and what changes of adapters took. Not thread-safe.

    `kept` are the compositions to which a change computes nothing; such changes have a price of their own.
    """

    def __init__(self, change_s: float = 0.0) -> None:
        """Start with nothing used; `change_s` is what a change is taken to cost until one was measured."""
        self.change_s = change_s
        self.binding_s = 0.0
        self.kept: Set[AdapterSetKey] = frozenset()
        self.changes = 0
        self.bindings = 0
        self.changing_s = 0.0
        self.working_s = 0.0
        self._credit_s = FIRST_CREDIT_S
        self._had_s: dict[str, float] = {}
        self._decayed_at = -math.inf

    def arrived(self, share: str, work_s: float, others: Collection[str]) -> None:
        """Note a request of a caller, whose work is over its weight; `others` are those who have requests here.

        A caller who comes back starts level with those who had least, but for this request's work: the time it
        had while no other asked does not count against it, and the time it did not ask for gives it no more than that.
        """
        if share not in others:
            level_s = min(map(self.had_s, others)) - work_s if others else max(self._had_s.values(), default=0.0)
            self._had_s[share] = max(self.had_s(share), level_s)

    def worked(self, parts: Mapping[str, float], seconds: float, now_s: float) -> None:
        """Note device time that ended at `now_s`, and which part of it each caller had, over its weight."""
        self.working_s += seconds
        self._gain(MAX_CHANGE_SHARE * seconds)
        self._decay(now_s)
        for share, part in parts.items():
            self._had_s[share] = self._had_s.get(share, 0.0) + seconds * part

    def changed(self, seconds: float, *, was_kept: bool = False) -> None:
        """Note a change of adapters; `was_kept` says that nothing had to be computed for it."""
        if was_kept:
            self.binding_s += (NEWEST_CHANGE if self.bindings else 1.0) * (seconds - self.binding_s)
        else:
            newest = NEWEST_CHANGE if self.changes > self.bindings else 1.0
            self.change_s += newest * (seconds - self.change_s)
        self.changes += 1
        self.bindings += was_kept
        self.changing_s += seconds
        self._gain(-seconds)

    def had_s(self, share: str) -> float:
        """Return the device time that a caller has had over its weight, forgotten by and by."""
        return self._had_s.get(share, 0.0)

    def cost_s(self, composition: AdapterSetKey) -> float:
        """Return what a change to a composition takes."""
        return self.binding_s if composition in self.kept else self.change_s

    def can_afford(self, seconds: float) -> bool:
        """Whether changes of so many seconds leave all of them within their share of the time."""
        return self._credit_s >= seconds

    def quantum_s(self, composition: AdapterSetKey) -> float:
        """How far a caller may get ahead before the device changes to another's composition: that is to stay cheap."""
        return 2 * self.cost_s(composition) / MAX_CHANGE_SHARE

    def _gain(self, seconds: float) -> None:
        most_s = MAX_CHANGE_SHARE * CREDIT_WINDOW_S
        self._credit_s = max(-most_s, min(self._credit_s + seconds, most_s))

    def _decay(self, now_s: float) -> None:
        share = math.exp(-max(0.0, now_s - self._decayed_at) / FAIRNESS_WINDOW_S)
        self._had_s = {name: had_s * share for name, had_s in self._had_s.items() if had_s * share > _FORGOTTEN_S}
        self._decayed_at = now_s


class ChooseTurn(Protocol):
    """Decides whose turn it is: `next_claim`, but for tests."""

    def __call__(
        self,
        claims: Sequence[Claim],
        *,
        holder: int | None,
        applied: AdapterSetKey,
        now_s: float,
        books: DeviceBooks,
        policy: SharingPolicy,
    ) -> Claim | None:
        """Return one of the claims."""
        ...


def next_claim(
    claims: Sequence[Claim],
    *,
    holder: int | None,
    applied: AdapterSetKey,
    now_s: float,
    books: DeviceBooks,
    policy: SharingPolicy,
) -> Claim | None:
    """Choose who has the device for the next step; None only where there are no claims.

    First comes the caller that had the least device time, then who is overdue, by arrival, then interactive before
    batch, then the least work left, counting a change of adapters and its age. `holder` is the
    ticket of the pass that had the device for the last step, None where it has ended: it keeps the device unless a
    change is worth its cost.
    """
    able = _able(claims, now_s, policy)
    if not able:
        return None
    order = _Order(applied, now_s, books, policy)
    current = next((claim for claim in able if claim.ticket == holder), None)
    share = min((claim.share for claim in able), key=books.had_s)
    first = min((claim for claim in able if claim.share == share), key=order.place)
    if current is None:
        return first
    if current.share != share:
        if books.had_s(current.share) - books.had_s(share) > books.quantum_s(first.composition):
            return first
        first = min((claim for claim in able if claim.share == current.share), key=order.place)
    return first if order.is_worth_a_change(current, first) else current


def ranked(
    claims: Iterable[Claim], *, applied: AdapterSetKey, now_s: float, books: DeviceBooks, policy: SharingPolicy
) -> list[Claim]:
    """Return claims in the order in which they would have the device if nothing else came."""
    order = _Order(applied, now_s, books, policy)
    return sorted(claims, key=lambda claim: (books.had_s(claim.share), order.place(claim)))


def _able(claims: Sequence[Claim], now_s: float, policy: SharingPolicy) -> list[Claim]:
    """Return those that may go on or begin.

    Where there are several places, the last is kept for one that is overdue, or whose caller has none.
    """
    begun = [claim.share for claim in claims if claim.is_begun]
    free = policy.max_in_progress - len(begun)
    needed = 1 if policy.max_in_progress <= 2 else 2

    def may_begin(claim: Claim) -> bool:
        return free >= needed or (free > 0 and (claim.share not in begun or claim.is_overdue(now_s, policy)))

    return [claim for claim in claims if claim.is_begun or may_begin(claim)]


@dataclass(frozen=True, slots=True)
class _Order:
    """The order among the claims of one caller."""

    applied: AdapterSetKey
    now_s: float
    books: DeviceBooks
    policy: SharingPolicy

    def place(self, claim: Claim) -> tuple[bool, bool, float, int]:
        """Return what sorts claims: those that are overdue by arrival, the others by priority and remaining work."""
        if claim.is_overdue(self.now_s, self.policy):
            return False, False, claim.arrived_s, claim.ticket
        change_s = 0.0 if claim.composition == self.applied else self.books.cost_s(claim.composition)
        age_s = self.now_s - claim.arrived_s
        age = age_s / AGE_S + age_s / max(AGE_SLOWDOWN * claim.whole_s * claim.times_part, _LEAST_S)
        return True, claim.priority == "batch", math.log(claim.left_s + change_s + _LEAST_S) - age, claim.ticket

    def is_worth_a_change(self, current: Claim, first: Claim) -> bool:
        """Whether a pass should be set aside for another of the same caller."""
        if first is current or first.is_overdue(self.now_s, self.policy):
            return True
        if first.composition == current.composition:
            return first.priority != current.priority or first.left_s < current.left_s
        there_and_back_s = 2 * self.books.cost_s(first.composition)
        if not self.books.can_afford(there_and_back_s):
            return False
        gain_s = current.left_s - first.left_s - there_and_back_s
        return first.priority != current.priority or gain_s > 0
