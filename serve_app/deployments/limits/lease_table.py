"""The books of keys with limits, for a service of several ingress replicas: who has which requests under way.

Owns the counting across holders, each an ingress replica, whose messages may come late, twice, in another order or not
at all, and who may die. A holder numbers its requests in order, and tells from time to time which of them are under
way. Must not know Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.api.http.limits import KeyQuota, KeyQuotas
from serve_app.config import KeyLimits
from serve_app.errors import KeyLimitReached, LoraplexError


@dataclass(frozen=True, slots=True)
class RequestLease:
    """One request under way: on whose account, and its number at its holder."""

    number: int
    key: str
    limits: KeyLimits


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The requests of one ingress replica: `held` were accepted, `asked` still wait for a reply.

    Every request with a number up to `last_issued` that is in neither list has ended.
    """

    holder: str
    last_issued: int
    held: tuple[RequestLease, ...]
    asked: frozenset[int]


@dataclass(slots=True)
class _Entry:
    allowance: KeyQuota
    images: int = 0


@dataclass(slots=True)
class _Holder:
    heard_at: float
    leases: dict[int, _Entry] = field(default_factory=dict[int, _Entry])
    # Those that ended since the last heartbeat, which an older message must not bring back.
    ended: set[int] = field(default_factory=set[int])


class LeaseTable:
    """Grants what keys may still do, over all holders.

    Invariants: while every holder is heard, no key has more requests under way than its limit. Whatever is lost, the
    books agree with what is under way after the next heartbeat. A holder that is silent for `patience_s` has nothing
    under way.
    """

    def __init__(self, *, clock: Callable[[], float], patience_s: float) -> None:
        self._clock = clock
        self._patience_s = patience_s
        self._allowances = KeyQuotas(clock=clock)
        self._holders: dict[str, _Holder] = {}

    def begin(self, holder: str, lease: RequestLease) -> KeyLimitReached | None:
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

    def spend(self, holder: str, lease: RequestLease, count: int) -> LoraplexError | None:
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

    def apply_heartbeat(self, beat: Heartbeat) -> None:
        """Put the books of a holder right."""
        known = self._heard(beat.holder)
        for lease in beat.held:
            if lease.number not in known.leases and lease.number not in known.ended:
                _adopt(known, lease, self._allowances)
        under_way = {lease.number for lease in beat.held} | beat.asked
        for number in [number for number in known.leases if number <= beat.last_issued and number not in under_way]:
            # Nobody knows what became of its images, so they stay spent.
            known.leases.pop(number).allowance.end()
        # A begin may still be on its way for what ended while it was asked for.
        known.ended = {number for number in known.ended if number > beat.last_issued or number in under_way}

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


def _adopt(holder: _Holder, lease: RequestLease, allowances: KeyQuotas) -> _Entry:
    entry = holder.leases[lease.number] = _Entry(allowances.of(lease.key, lease.limits))
    entry.allowance.adopt()
    return entry
