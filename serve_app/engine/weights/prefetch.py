"""The next composition, fused while the present one denoises.

Owns the helper thread, what it was asked for last, and the choice between binding its work and applying afresh. Must
not know the queue: it is told what comes next.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from serve_app.core import AdapterSetKey
from serve_app.engine.weights.fused import AdapterSet, FusedWeights, PreparedSwap, adapter_set_key
from serve_app.engine.weights.shortage import is_out_of_memory

log = logging.getLogger(__name__)

# After a shortage of its own nothing is prepared for so long.
RETRY_AFTER_S = 60.0
UNTIL_RESUMED = math.inf


class SwapPrefetcher:
    """Applies compositions, and prepares them beforehand in a thread of its own; used by the device thread.

    Invariants: the last composition given to `apply` is bound, even if another was prepared meanwhile. While
    the weights change, nothing is being prepared. No adapter is kept for longer than it takes to prepare it. Before
    `retry_at_s`, on the clock, nothing is prepared: memory ran out.
    """

    def __init__(
        self,
        weights: FusedWeights,
        *,
        torch_threads: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the thread; it computes with as many threads as the device thread, lest bits depend on who fused."""
        self._weights = weights
        self._thread = ThreadPoolExecutor(1, "prepare-ahead", initializer=_set_threads, initargs=(torch_threads,))
        self._wanted: AdapterSetKey | None = None
        self._work: Future[PreparedSwap] | None = None
        self._clock = clock
        self.retry_at_s = 0.0
        self.bound = 0

    def prepare(self, composition: AdapterSet) -> None:
        """Begin to fuse what is expected next, and return at once.

        Does nothing where that is applied or prepared already, or was tried in vain, or something else is under way,
        or memory ran out lately: ask again.
        """
        key = adapter_set_key(composition)
        if not key or self._clock() < self.retry_at_s or key in (self._wanted, self._weights.applied):
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
        self.retry_at_s = UNTIL_RESUMED

    def resume(self) -> None:
        """Prepare again after a `pause`, for memory no longer runs out."""
        if self.retry_at_s == UNTIL_RESUMED:
            self.retry_at_s = 0.0

    def close(self) -> None:
        """Wait for what is under way, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _finished(self) -> PreparedSwap | None:
        """Wait for the work under way; a failure here is repeated, and reported, when the swap is applied."""
        if self._work is None:
            return None
        try:
            return self._work.result()
        except Exception as error:
            if is_out_of_memory(error):
                log.warning("no room to prepare an adapter ahead; not tried again for %.0f s", RETRY_AFTER_S)
                self.retry_at_s = self._clock() + RETRY_AFTER_S
                self._weights.drop_spare_buffers()
            else:
                log.warning("an adapter could not be prepared ahead", exc_info=True)
        return None


def _set_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)
