"""Who may use an adapter that not everybody may: checked with the caller's own token, and kept for a while.

Owns how long a caller's access counts as checked. It never outlasts its time, whatever the Hub does: a caller whose
access cannot be checked again is refused. Holds no token, only what tells tokens apart in this process.
"""

from __future__ import annotations

import asyncio
import copy
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from serve_app.core import HubToken
from serve_app.errors import LoraplexError, strip_traceback

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class _Checked(Generic[V]):
    outcome: V | LoraplexError
    expires_at: float


class CallerAccess(Generic[K, V]):
    """Remembers what `look_up` said about a key with a caller's token.

    Invariants: an answer is given to the token that it was found with alone; none is given later than `access_ttl_s`
    after its look-up began. One look-up per key and token runs at a time, and outlives askers who leave.
    """

    def __init__(
        self,
        look_up: Callable[[K, HubToken], Awaitable[V]],
        *,
        access_ttl_s: float,
        failure_ttl_s: float,
        clock: Callable[[], float],
        on_check: Callable[[str], None] = lambda _: None,
        max_entries: int = MAX_ENTRIES,
        salt: bytes | None = None,
    ) -> None:
        """Remember nothing yet.

        Args:
            look_up: Finds out, with the caller's token.
            access_ttl_s: How long a check of access counts.
            failure_ttl_s: How long a refusal is repeated without asking again.
            clock: Monotonic seconds.
            on_check: Told how each look-up ended: "ok", or the code of its refusal.
            max_entries: How many answers are kept, the least recently used being dropped.
            salt: What keeps the fingerprints of tokens from being compared with others'; None makes one up.
        """
        self._look_up = look_up
        self._access_ttl_s = access_ttl_s
        self._failure_ttl_s = min(failure_ttl_s, access_ttl_s)
        self._clock = clock
        self._on_check = on_check
        self._max_entries = max_entries
        self._salt = salt or secrets.token_bytes(32)
        self._checked: OrderedDict[tuple[bytes, K], _Checked[V]] = OrderedDict()
        self._flights: dict[tuple[bytes, K], asyncio.Task[_Checked[V]]] = {}

    async def get(self, key: K, token: HubToken) -> V:
        """Return what is known of a key with a token.

        Raises:
            LoraplexError: whatever the look-up raised, now or within the time that failures are kept.
        """
        mine = (hmac.digest(self._salt, token.value.encode(), "sha256"), key)
        checked = self._checked.get(mine)
        if checked is None or self._clock() >= checked.expires_at:
            flight = self._flights.get(mine)
            if flight is None:
                flight = self._flights[mine] = asyncio.ensure_future(self._check(mine, token))
                flight.add_done_callback(lambda _: self._flights.pop(mine, None))
            checked = await asyncio.shield(flight)
        else:
            self._checked.move_to_end(mine)
        if isinstance(checked.outcome, LoraplexError):
            raise copy.copy(checked.outcome)
        return checked.outcome

    async def _check(self, mine: tuple[bytes, K], token: HubToken) -> _Checked[V]:
        began = self._clock()
        checked: _Checked[V]
        try:
            checked = _Checked(await self._look_up(mine[1], token), began + self._access_ttl_s)
        except LoraplexError as error:
            checked = _Checked(strip_traceback(error), began + self._failure_ttl_s)
            self._on_check(error.code)
        else:
            self._on_check("ok")
        self._checked[mine] = checked
        self._checked.move_to_end(mine)
        while len(self._checked) > self._max_entries:
            self._checked.popitem(last=False)
        return checked
