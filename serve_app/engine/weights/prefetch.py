"""The next composition, fused while the present one denoises.

Owns the helper thread, what it was asked for last, and the choice between binding its work and applying afresh. Must
not know the queue: it is told what comes next.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from serve_app.engine.weights.fused import AdapterSet, AdapterSetKey, FusedWeights, PreparedSwap, adapter_set_key

log = logging.getLogger(__name__)


class SwapPrefetcher:
    """Applies compositions, and prepares them beforehand in a thread of its own; used by the device thread.

    Invariants: what is bound is what `apply` was asked for, prepared or not, whatever was prepared meanwhile. While
    the weights change, nothing is being prepared. No adapter is kept for longer than it takes to prepare it.
    """

    def __init__(self, weights: FusedWeights, *, torch_threads: int | None = None) -> None:
        """Start the thread; it computes with as many threads as the device thread, lest bits depend on who fused."""
        self._weights = weights
        self._thread = ThreadPoolExecutor(1, "prepare-ahead", initializer=_set_threads, initargs=(torch_threads,))
        self._wanted: AdapterSetKey | None = None
        self._work: Future[PreparedSwap] | None = None
        self._has_room = True
        self._has_given_way = False
        self.bound = 0

    def prepare(self, composition: AdapterSet) -> None:
        """Begin to fuse what is expected next, and return at once.

        Does nothing where that is applied or prepared already, or was tried in vain, or something else is under way:
        ask again.
        """
        key = adapter_set_key(composition)
        if not (key and self._has_room) or key in (self._wanted, self._weights.applied):
            return
        if self._work is not None and not self._work.done():
            return
        self._wanted = key
        self._work = self._thread.submit(self._weights.prepare, tuple(composition))

    def apply(self, composition: AdapterSet) -> None:
        """Bind the composition: as prepared where it was, else fused now; fails as `FusedWeights.apply` does."""
        key = adapter_set_key(composition)
        if key == self._weights.applied:
            return
        prepared = self._finished()
        self._wanted = self._work = None
        if prepared is None or prepared.key != key:
            self._weights.apply(composition)
            return
        self._weights.bind(prepared)
        self.bound += 1

    def pause(self) -> None:
        """Wait for what is under way, let go of what was prepared, and prepare nothing until told to `resume`."""
        self._finished()
        self._wanted = self._work = None
        self._has_given_way = self._has_given_way or self._has_room
        self._has_room = False

    def resume(self) -> None:
        """Prepare again, for memory no longer runs out."""
        self._has_room = self._has_room or self._has_given_way
        self._has_given_way = False

    def close(self) -> None:
        """Wait for what is under way, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _finished(self) -> PreparedSwap | None:
        """Wait for the work under way; what fails here fails again, and is reported, when it is applied."""
        if self._work is None:
            return None
        try:
            return self._work.result()
        except torch.OutOfMemoryError:
            log.warning("the device has no room for second twins; adapters are fused when their turn comes")
            self._has_room = False
            self._weights.drop_spare_twins()
        except Exception:
            log.warning("an adapter could not be prepared ahead", exc_info=True)
        return None


def _set_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)
