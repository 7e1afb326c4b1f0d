"""Access to adapters that are not public: checked with the caller's own token, and cached for that token only.

Owns how long a check of access is valid. It is never extended: a caller whose access cannot be checked again is
refused. Keeps no token, only a keyed digest that tells tokens apart in this process.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from serve_app.catalog.resolving.lookups import MAX_ENTRIES, CachePolicy, SingleFlightCache
from serve_app.core import HubToken
from serve_app.errors import LoraplexError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class CallerAccess(Generic[K, V]):
    """Caches the outcome of `look_up` for a key and a caller's token.

    Invariants: an answer is used only for the token that it was found with, and for at most `access_ttl_s` after its
    look-up began.
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
    ) -> None:
        """Start with an empty cache.

        Args:
            look_up: Asks the Hub with the caller's token.
            access_ttl_s: How long a check of access is valid.
            failure_ttl_s: How long a refusal is repeated without asking again.
            clock: Monotonic seconds.
            on_check: Called after each look-up with "ok" or the code of its refusal.
            max_entries: How many answers, and how many refusals, are kept.
        """
        self._look_up = look_up
        self._on_check = on_check
        self._salt = secrets.token_bytes(32)
        policy: CachePolicy[V] = CachePolicy(
            lambda _: access_ttl_s, min(failure_ttl_s, access_ttl_s), grace_s=None, max_entries=max_entries
        )
        self._cache: SingleFlightCache[tuple[bytes, K], V] = SingleFlightCache(policy, clock=clock)

    async def get(self, key: K, token: HubToken) -> V:
        """Return the value of a key for a token.

        Raises:
            LoraplexError: raised by the look-up, now or within the time that failures are kept.
        """
        mine = (hmac.digest(self._salt, token.value.encode(), "sha256"), key)
        return await self._cache.get(mine, lambda: self._check(key, token))

    async def _check(self, key: K, token: HubToken) -> V:
        try:
            found = await self._look_up(key, token)
        except LoraplexError as error:
            self._on_check(error.code)
            raise
        self._on_check("ok")
        return found
