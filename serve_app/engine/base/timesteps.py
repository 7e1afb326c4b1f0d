"""Timesteps that a scheduler looks up in tables of the host, without asking the device at each step which one it is.

Pipelines keep timesteps on the device and give a scheduler one of them at each step. Some classes read its value, for
which the host waits until the device has done all it was given. Values and tables were the host's to begin with.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

from torch import Tensor

# Those of the last line read one value a pass, to find their first step. UniPC would wait at each step all the same, to
# send coefficients of its own.
_READERS = frozenset((
    "DDIMScheduler", "DDPMScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
))  # fmt: skip


def read_timesteps_on_host(scheduler: Any) -> None:
    """Have an unused scheduler that reads timesteps read them on the host; its steps have the same bits."""
    if type(scheduler).__name__ in _READERS:
        scheduler.__class__ = _reading_on_host(type(scheduler))


@cache
def _reading_on_host(scheduler_class: Any) -> Any:
    class Reading(scheduler_class):
        sent_timesteps: Tensor | None = None

        @wraps(scheduler_class.set_timesteps)
        def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, *more: Any, **named: Any) -> None:
            super().set_timesteps(num_inference_steps, None, *more, **named)
            self.host_timesteps = self.timesteps
            self.timesteps = self.sent_timesteps = self.timesteps.to(device, copy=True)

        @wraps(scheduler_class.step)
        def step(self, model_output: Tensor, timestep: Any, *more: Any, **named: Any) -> Any:
            self.given_timestep, sent = timestep, self.timesteps
            if sent is not self.sent_timesteps or not _is_part_of(timestep, sent):  # set or made by others
                return super().step(model_output, timestep, *more, **named)
            self.timesteps = self.host_timesteps
            try:
                place = timestep.storage_offset()  # all that can be known of it without waiting
                return super().step(model_output, self.timesteps[place], *more, **named)
            finally:
                self.timesteps = sent

        def get_scalings_for_boundary_condition_discrete(self, timestep: Any) -> Any:
            # LCM's factors of tensors: made on the device they are rounded to the tensors' dtype.
            return super().get_scalings_for_boundary_condition_discrete(self.given_timestep)

    Reading.__name__, Reading.__module__ = scheduler_class.__name__, scheduler_class.__module__  # diffusers asks
    return Reading


def _is_part_of(timestep: Any, timesteps: Tensor) -> bool:
    return isinstance(timestep, Tensor) and timestep.untyped_storage()._cdata == timesteps.untyped_storage()._cdata
