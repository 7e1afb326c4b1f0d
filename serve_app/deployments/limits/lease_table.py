"""The books of keys with limits, for a service of several ingress replicas: who has which requests under way.

Owns the counting across holders, each an ingress replica, whose messages may come late, twice, in another order or not
at all, and who may die. A holder numbers its requests in order, and tells from time to time which of them are under
way. Must not know Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.api.http.limits import Allowances, KeyAllowance
from serve_app.config import KeyLimits
from serve_app.errors import KeyLimitReached, LoraplexError


@dataclass(frozen=True, slots=True)
class Lease:
    """One request under way: on whose account, and its number at its holder."""

    number: int
    key: str
    limits: KeyLimits


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a holder has under way: `held` was let in, `asked` waits for its answer; `up_to` is the last number given
    out, so that whatever is not named up to there is over."""

    holder: str
    up_to: int
    held: tuple[Lease, ...]
    asked: frozenset[int]


@dataclass(slots=True)
class _Entry:
    allowance: KeyAllowance
    images: int = 0


@dataclass(slots=True)
class _Holder:
    heard_at: float
    leases: dict[int, _Entry] = field(default_factory=dict[int, _Entry])
    # Those that ended since the last heartbeat, which an older message must not bring back.
    ended: set[int] = field(default_factory=set[int])


class LeaseBooks:
    """Grants what keys may still do, over all holders.

    Invariants: while every holder is heard, no key has more requests under way than its limit. Whatever is lost, the
    books agree with what is under way after the next heartbeat. A holder that is silent for `patience_s` has nothing
    under way.
    """

    def __init__(self, *, clock: Callable[[], float], patience_s: float) -> None:
        self._clock = clock
        self._patience_s = patience_s
        self._allowances = Allowances(clock=clock)
        self._holders: dict[str, _Holder] = {}

    def begin(self, holder: str, lease: Lease) -> KeyLimitReached | None:
        """Let a request in, or return why not."""
        self._forget_the_silent()
        known = self._heard(holder)
        if lease.number in known.ended or lease.number in known.leases:
            return None
        allowance = self._allowances.of(lease.key, lease.limits)
        try:
            allowance.begin()
        except KeyLimitReached as refusal:
            return refusal
        known.leases[lease.number] = _Entry(allowance)
        return None

    def spend(self, holder: str, lease: Lease, count: int) -> LoraplexError | None:
        """Take images off what the key of a request may draw, or return why not."""
        known = self._heard(holder)
        if lease.number in known.ended:
            return None
        entry = known.leases.get(lease.number) or _adopt(known, lease, self._allowances)
        try:
            entry.allowance.spend_images(count)
        except LoraplexError as refusal:
            return refusal
        entry.images += count
        return None

    def end(self, holder: str, number: int, *, drew: bool) -> None:
        """Note that a request is over; its images come back unless it `drew` them."""
        known = self._heard(holder)
        known.ended.add(number)
        if (entry := known.leases.pop(number, None)) is not None:
            entry.allowance.end()
            if not drew:
                entry.allowance.return_images(entry.images)

    def heard(self, beat: Heartbeat) -> None:
        """Put the books of a holder right."""
        known = self._heard(beat.holder)
        for lease in beat.held:
            if lease.number not in known.leases and lease.number not in known.ended:
                _adopt(known, lease, self._allowances)
        under_way = {lease.number for lease in beat.held} | beat.asked
        for number in [number for number in known.leases if number <= beat.up_to and number not in under_way]:
            # Nobody knows what became of its images, so they stay spent.
            known.leases.pop(number).allowance.end()
        # A begin may still be on its way for what ended while it was asked for.
        known.ended = {number for number in known.ended if number > beat.up_to or number in under_way}

    @property
    def under_way(self) -> int:
        """How many requests are under way."""
        return sum(len(holder.leases) for holder in self._holders.values())

    def _heard(self, holder: str) -> _Holder:
        known = self._holders.setdefault(holder, _Holder(self._clock()))
        known.heard_at = self._clock()
        return known

    def _forget_the_silent(self) -> None:
        latest = self._clock() - self._patience_s
        for name in [name for name, holder in self._holders.items() if holder.heard_at < latest]:
            for entry in self._holders.pop(name).leases.values():
                entry.allowance.end()


def _adopt(holder: _Holder, lease: Lease, allowances: Allowances) -> _Entry:
    entry = holder.leases[lease.number] = _Entry(allowances.of(lease.key, lease.limits))
    entry.allowance.adopt()
    return entry
