"""What a router takes a node's disk to hold: whatever went through it last, as far as it fits.

Owns that guess. Must not know the disk: nobody tells routers what is on it.
"""

from __future__ import annotations

# However small adapters are, no more of them are remembered.
MAX_TAGS = 16_384


class DiskCacheEstimate:
    """The adapters on one node's disk, first in first out within a byte budget."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._used_bytes = 0
        self._sizes: dict[str, int] = {}

    def __contains__(self, tag: object) -> bool:
        """Tell whether the adapter is taken to be there."""
        return tag in self._sizes

    def put(self, tag: str, size_bytes: int) -> None:
        """Note that an adapter went through the disk; older ones make room."""
        self._used_bytes += size_bytes - self._sizes.pop(tag, 0)
        self._sizes[tag] = size_bytes
        while self._used_bytes > self._budget_bytes or len(self._sizes) > MAX_TAGS:
            self._used_bytes -= self._sizes.pop(next(iter(self._sizes)))
