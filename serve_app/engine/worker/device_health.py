"""Whether the device and the loaded weights are still what images may come from.

Owns the two verdicts, each of them for good, and when the weights are checked. Used by the device thread; other threads
see the verdicts alone.
"""

from __future__ import annotations

import logging

import torch

from serve_app.engine.weights.integrity import CorruptTensor, ThrottledChecker
from serve_app.engine.weights.shortage import is_out_of_memory

log = logging.getLogger(__name__)


class DeviceHealth:
    """The verdicts: the loaded weights changed (`is_corrupt`), the device answers no more (`is_lost`)."""

    def __init__(self, base_id: str, device: torch.device, check: ThrottledChecker | None) -> None:
        self._base_id = base_id
        self._device = device
        self._check = check
        self.is_corrupt = False
        self.is_lost = False

    @property
    def is_healthy(self) -> bool:
        """Whether images may be drawn."""
        return not (self.is_corrupt or self.is_lost)

    @property
    def failure_reason(self) -> str:
        """Why no images may be drawn, in a word, for metrics; "closing" where they may."""
        return "weights" if self.is_corrupt else "device" if self.is_lost else "closing"

    @property
    def completed_rounds(self) -> int:
        """How many times everything was checked and sound."""
        return 0 if self._check is None else self._check.completed_rounds

    @property
    def pause_s(self) -> float | None:
        """How long to wait before the next slice where nothing else is to be done; None for ever."""
        return None if self._check is None else self._check.pause_s

    def check_slice(self) -> None:
        """Check some of the weights; where memory is short, not now."""
        if self._check is None:
            return
        try:
            self._note(self._check.check_next())
        except RuntimeError as error:
            if not is_out_of_memory(error) and not self.record_device_error(error):
                raise

    def check_all(self) -> None:
        """Check all weights."""
        if self._check is not None:
            self._note(self._check.check_all())

    def record_device_error(self, error: Exception) -> bool:
        """Take note where an error says that the device is lost; return whether it does."""
        if is_fatal(error) or not probe_device(self._device):
            log.critical("the device of %s is beyond repair: %s", self._base_id, first_line(error))
            self.is_lost = True
        return self.is_lost

    def _note(self, damage: CorruptTensor | None) -> None:
        if damage is not None:
            log.critical("the loaded weights of %s have changed, in %s", self._base_id, damage.tensor)
            self.is_corrupt = True


# After each of these every further call on the device fails, until the process ends.
_BROKEN = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "context is destroyed",
    "busy or unavailable",
    "no CUDA-capable device",
    "CUDA error: unknown error",
)


def is_fatal(error: BaseException) -> bool:
    """Whether the device will answer nothing more to this process."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _BROKEN)


def probe_device(device: torch.device) -> bool:
    """Whether a device still computes; a broken one fails at any operation."""
    try:
        return torch.ones(1, device=device).sum().item() == 1.0
    except RuntimeError as error:
        return is_out_of_memory(error)


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line; torch appends pages."""
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
