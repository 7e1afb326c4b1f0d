"""Which requests the canary of a base draws in its place.

Owns the choice, by the request alone: one that is sent again with its seed is drawn by the same base, and one that a
canary draws at some share it draws at every larger one. Must not know how a request is resolved or sent.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from hashlib import sha256

from serve_app.config import AppConfig, BaseModelConfig
from serve_app.families.family import Family

log = logging.getLogger(__name__)


class Canaries:
    """The canaries of one configuration; one that does not run, or is of another family, draws nothing."""

    def __init__(
        self,
        config: AppConfig,
        *,
        is_running: Callable[[str], Awaitable[bool]],
        family_of: Callable[[BaseModelConfig], Awaitable[Family | None]],
    ) -> None:
        self._config = config
        self._is_running = is_running
        self._family_of = family_of
        self._unlike: set[str] = set()

    async def instead_of(self, base: BaseModelConfig, *, seed: int, prompt: str) -> BaseModelConfig | None:
        """Return the canary that is to draw a request for a base; None where that draws it itself."""
        settings = self._config.canaries.get(base.id)
        if settings is None or not is_drawn(settings.base, settings.share, seed=seed, prompt=prompt):
            return None
        canary = self._config.base(settings.base)
        if canary is None or not await self._is_running(canary.id) or not await self._is_alike(canary, base):
            return None
        return canary

    async def _is_alike(self, canary: BaseModelConfig, base: BaseModelConfig) -> bool:
        first, second = await self._family_of(canary), await self._family_of(base)
        if first is None or second is None or first.kind == second.kind:
            return True
        if canary.id not in self._unlike:
            self._unlike.add(canary.id)
            log.error("%s draws nothing for %s: it is %s, not %s", canary.id, base.id, first.name, second.name)
        return False


def is_drawn(canary: str, share: float, *, seed: int, prompt: str) -> bool:
    """Whether a canary with a share draws a request; callers who always send the same seed are divided by prompt."""
    digest = sha256(f"{canary}\0{seed}\0{prompt}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
