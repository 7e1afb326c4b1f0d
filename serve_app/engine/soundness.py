"""Whether the device and the loaded weights are still what images may come from.

Owns the two verdicts, each of them for good, and when the weights are checked. Used by the device thread; whoever else
looks sees the verdicts alone.
"""

from __future__ import annotations

import logging

import torch

from serve_app.engine.device_faults import answers, headline, is_beyond_repair, is_out_of_memory
from serve_app.engine.integrity import Damage, PacedCheck

log = logging.getLogger(__name__)


class Soundness:
    """The verdicts: the loaded weights changed (`is_corrupt`), the device answers no more (`is_lost`)."""

    def __init__(self, base_id: str, device: torch.device, check: PacedCheck | None) -> None:
        self._base_id = base_id
        self._device = device
        self._check = check
        self.is_corrupt = False
        self.is_lost = False

    @property
    def can_go_on(self) -> bool:
        """Whether images may be drawn."""
        return not (self.is_corrupt or self.is_lost)

    @property
    def verdict(self) -> str:
        """Why no images may be drawn, in a word, for metrics; "closing" where they may."""
        return "weights" if self.is_corrupt else "device" if self.is_lost else "closing"

    @property
    def rounds(self) -> int:
        """How many times everything was checked and sound."""
        return 0 if self._check is None else self._check.rounds

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
            if not is_out_of_memory(error) and not self.judge(error):
                raise

    def check_all(self) -> None:
        """Check all weights."""
        if self._check is not None:
            self._note(self._check.check_all())

    def judge(self, error: Exception) -> bool:
        """Take note where an error says that the device is lost; return whether it does."""
        if is_beyond_repair(error) or not answers(self._device):
            log.critical("the device of %s is beyond repair: %s", self._base_id, headline(error))
            self.is_lost = True
        return self.is_lost

    def _note(self, damage: Damage | None) -> None:
        if damage is not None:
            log.critical("the loaded weights of %s have changed, in %s", self._base_id, damage.tensor)
            self.is_corrupt = True
