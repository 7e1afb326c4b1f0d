"""How much one pass may draw, after memory has run out.

Owns the limit and its recovery. Pure: every time is handed in. Must not know torch or what a pass is.
"""

from __future__ import annotations

RECOVERY_S = 60.0
LONGEST_RECOVERY_S = 900.0


class Allowance:
    """The pixels that the images of one pass may have together; one image is always allowed.

    A pass that did not fit halves its size. After `RECOVERY_S` without a failure the limit doubles, until what failed
    would be tried again. If that fails too, the next recovery takes twice as long, up to `LONGEST_RECOVERY_S`; a pass
    that has failed for so long no more is forgotten.
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._failed_pixels = 0
        self._changed_s = 0.0
        self._recovery_s = RECOVERY_S

    def shrink(self, pixels: int, now_s: float) -> None:
        """Note that a pass of so many pixels did not fit."""
        self.limit(now_s)
        if self._limit is None and self._failed_pixels:
            is_repeated = now_s - self._changed_s < LONGEST_RECOVERY_S
            self._recovery_s = min(2 * self._recovery_s, LONGEST_RECOVERY_S) if is_repeated else RECOVERY_S
            self._failed_pixels = 0
        half = max(pixels // 2, 1)
        self._limit = half if self._limit is None else min(half, self._limit)
        self._failed_pixels = max(pixels, self._failed_pixels)
        self._changed_s = now_s

    def limit(self, now_s: float) -> int | None:
        """Return how many pixels a pass may have now; None for no limit."""
        while self._limit is not None and now_s - self._changed_s >= self._recovery_s:
            self._changed_s += self._recovery_s
            self._limit = None if 2 * self._limit >= self._failed_pixels else 2 * self._limit
        return self._limit

    def images(self, pixels_each: int, now_s: float) -> int | None:
        """Return how many images of a size a pass may have now, at least one; None for no limit."""
        limit = self.limit(now_s)
        return None if limit is None else max(limit // pixels_each, 1)
