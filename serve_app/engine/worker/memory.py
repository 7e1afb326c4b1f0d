"""Memory of the device: recovers when it runs out, and bounds what a pass may take afterwards.

Owns the second try, the memory given back before it, and the count of both. Used by the device thread alone. Must not
know jobs or the queue.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.weights.prefetch import SwapPrefetcher
from serve_app.engine.weights.shortage import is_out_of_memory
from serve_app.engine.worker.device_health import first_line

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OomCounts:
    """How often memory ran out since the start: made good by a second try, and refused after it."""

    recovered: int = 0
    refused: int = 0


class OomRecovery:
    """The device's memory, as far as it can be made to suffice.

    Invariant: after `free_memory` the base is whole, even after failures: its own weights or a complete composition
    bound, each module in its dtype.
    """

    def __init__(
        self,
        pipeline: BasePipeline,
        weights: FusedWeights,
        prefetcher: SwapPrefetcher | None,
        *,
        verify: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """`verify` is called when memory was freed, to see whether the base is unharmed."""
        self._pipeline = pipeline
        self._weights = weights
        self._prefetcher = prefetcher
        self._verify = verify
        self._clock = clock
        self._allowance = PassSizeBackoff()
        self.shortages = OomCounts()

    def try_run(self, act: Callable[[], None]) -> bool:
        """Do something; False where memory ran out, and then everything that it held is gone."""
        try:
            act()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%s ran out of memory: %s", self._pipeline.base_id, first_line(error))
            return False
        return True

    def run_with_oom_retry(self, act: Callable[[], None]) -> bool:
        """Do something, once more with memory freed where it runs out; False where it ran out again."""
        if self.try_run(act):
            return True
        self.free_memory()
        is_done = self.try_run(act)
        if not is_done:
            self.free_memory()
        self.count(is_recovered=is_done)
        return is_done

    def count(self, *, is_recovered: bool) -> None:
        """Note how a shortage ended."""
        was = self.shortages
        if is_recovered:
            log.info("%s had memory enough at the second try", self._pipeline.base_id)
            self.shortages = replace(was, recovered=was.recovered + 1)
        else:
            log.error("%s was short of memory at the second try either", self._pipeline.base_id)
            self.shortages = replace(was, refused=was.refused + 1)

    def max_images_per_pass(self, pixels_each: int) -> int | None:
        """Return how many images of a size a pass should have; None for as many as there are."""
        return self._allowance.images(pixels_each, self._clock())

    def resume_prefetch(self) -> None:
        """Let swaps be prepared ahead again; for when no shortage limits a pass any more."""
        if self._prefetcher is not None:
            self._prefetcher.resume()

    def on_oom(self, pixels: int) -> None:
        """Note that a pass of so many pixels did not fit, and free what can be freed."""
        self._allowance.shrink(pixels, self._clock())
        self.free_memory()

    def free_memory(self) -> None:
        """Give back all memory that is there for speed alone, and see to it that the base is whole."""
        device = self._pipeline.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if self._prefetcher is not None:
            self._prefetcher.pause()
        self._weights.drop_spares()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self._pipeline.restore_dtypes()
        self.try_run(self._verify)


RECOVERY_S = 60.0
LONGEST_RECOVERY_S = 900.0


class PassSizeBackoff:
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
        self.update_limit(now_s)
        if self._limit is None and self._failed_pixels:
            is_repeated = now_s - self._changed_s < LONGEST_RECOVERY_S
            self._recovery_s = min(2 * self._recovery_s, LONGEST_RECOVERY_S) if is_repeated else RECOVERY_S
            self._failed_pixels = 0
        half = max(pixels // 2, 1)
        self._limit = half if self._limit is None else min(half, self._limit)
        self._failed_pixels = max(pixels, self._failed_pixels)
        self._changed_s = now_s

    def update_limit(self, now_s: float) -> int | None:
        """Grow the limit by the time that has passed; return how many pixels a pass may have, None for no limit."""
        while self._limit is not None and now_s - self._changed_s >= self._recovery_s:
            self._changed_s += self._recovery_s
            self._limit = None if 2 * self._limit >= self._failed_pixels else 2 * self._limit
        return self._limit

    def images(self, pixels_each: int, now_s: float) -> int | None:
        """Return how many images of a size a pass may have now, at least one; None for no limit."""
        limit = self.update_limit(now_s)
        return None if limit is None else max(limit // pixels_each, 1)
